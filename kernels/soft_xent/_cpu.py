"""When does csrc/soft_xent/soft_xent_cpu.cpp, the compiled fuseer::soft_xent.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(logits, target, temperature, weights, target_center, target_temperature):
    if REASON is not None:
        return REASON
    if logits.device.type != "cpu":
        return f"logits are on {logits.device.type}, not on the CPU"
    return None
