"""When does csrc/ema_update_/ema_update_cpu.cpp, the compiled fuseer::ema_update_.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(teacher, student, momentum, momentum_scalar, shadow):
    if REASON is not None:
        return REASON
    if teacher[0].device.type != "cpu":
        return f"teacher are on {teacher[0].device.type}, not on the CPU"
    return None
