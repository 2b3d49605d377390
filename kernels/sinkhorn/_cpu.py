"""When does csrc/sinkhorn/sinkhorn_cpu.cpp, the compiled fuseer::sinkhorn.cpu, run?"""

import torch

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(scores, epsilon, iterations, group_name):
    if REASON is not None:
        return REASON
    if scores.device.type != "cpu":
        return f"scores are on {scores.device.type}, not on the CPU"
    if scores.dtype == torch.float64:
        return "its arithmetic is float32; float64 belongs to reference"
    return None
