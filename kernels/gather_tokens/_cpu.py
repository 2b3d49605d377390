"""When does csrc/gather_tokens/gather_tokens_cpu.cpp, the compiled fuseer::gather_tokens.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(x, ids):
    if REASON is not None:
        return REASON
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, not on the CPU"
    return None
