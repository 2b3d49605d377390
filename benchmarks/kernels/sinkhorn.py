"""What does sinkhorn have to beat, and what can nobody avoid?"""

import torch

from benchmarks.measure import Work
from fuseer.kernels.dispatch import compute_dtype
from fuseer.kernels.sinkhorn import cases
from fuseer.kernels.testing import Case


@torch.no_grad()
def official(scores, epsilon, iterations):
    """SwAV's loop, in place as published; DINOv2 and DINOv3 run the same one on float32 copies."""
    plan = torch.exp(scores.float() / epsilon).t()
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(1, keepdim=True)
        plan /= plan.shape[0]
        plan /= plan.sum(0, keepdim=True)
        plan /= plan.shape[1]
    plan *= plan.shape[1]
    return plan.t()


def third_party(arguments):
    from lightly.loss.swav_loss import sinkhorn

    return {"lightly": lambda scores, epsilon, iterations: sinkhorn(scores, iterations=iterations, epsilon=epsilon)}


def work(arguments):
    """Scores read once, codes written once; one exponential a score; an exponent, a row and a column sum a step, and the codes."""
    scores, n = arguments["scores"], arguments["iterations"]
    size = scores.numel()
    return Work(size * (scores.element_size() + compute_dtype(scores.dtype).itemsize), size, size * (2 * n + 2))


def sweeps():
    """{letter: {its size: case}}, the other sizes being those of training."""
    return {
        "K": {k: Case(f"512x{k}", cases._cosines(512, k)) for k in (256, 1024, 3000, 16384, 65536)},
        "N": {n: Case(f"{n}x3000", cases._cosines(n, 3000)) for n in (32, 128, 512, 2048, 8192)},
    }
