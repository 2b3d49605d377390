"""When does csrc/lars_update_/lars_update_cpu.cpp, the compiled fuseer::lars_update_.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(params, grads, momenta, *options):
    if REASON is not None:
        return REASON
    if params[0].device.type != "cpu":
        return f"params are on {params[0].device.type}, not on the CPU"
    return None
