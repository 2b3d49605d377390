"""When does csrc/patch_mask/patch_mask_cpu.cpp, the compiled fuseer::patch_mask.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(noise, keep):
    if REASON is not None:
        return REASON
    if noise.device.type != "cpu":
        return f"noise is on {noise.device.type}, not on the CPU"
    return None
