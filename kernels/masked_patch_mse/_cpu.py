"""When does csrc/masked_patch_mse/masked_patch_mse_cpu.cpp, the compiled fuseer::masked_patch_mse.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(pred, images, ids_masked, patch, normalize, reduction):
    if REASON is not None:
        return REASON
    if pred.device.type != "cpu":
        return f"pred is on {pred.device.type}, not on the CPU"
    return None
