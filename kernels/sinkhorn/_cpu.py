"""When does csrc/sinkhorn/sinkhorn_cpu.cpp, the compiled fuseer::sinkhorn.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(scores, epsilon, iterations, group_name):
    if REASON is not None:
        return REASON
    if scores.device.type != "cpu":
        return f"scores are on {scores.device.type}, not on the CPU"
    return None
