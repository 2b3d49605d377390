"""When does csrc/gather_patches/gather_patches_cpu.cpp, the compiled fuseer::gather_patches.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(images, ids, patch):
    if REASON is not None:
        return REASON
    if images.device.type != "cpu":
        return f"images are on {images.device.type}, not on the CPU"
    return None
