"""When does csrc/patch_embed_visible/patch_embed_visible_cpu.cpp, the compiled fuseer::patch_embed_visible.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(images, weight, bias, ids_keep, pos_embed, mean, std):
    if REASON is not None:
        return REASON
    if images.device.type != "cpu":
        return f"images are on {images.device.type}, not on the CPU"
    return None
