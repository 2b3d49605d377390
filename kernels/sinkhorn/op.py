"""How is sinkhorn called, checked and dispatched?"""

import torch

from fuseer.kernels import checks, dispatch
from fuseer.kernels.sinkhorn import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)


def _fake(scores, epsilon, iterations, group_name):
    return torch.empty(scores.shape, dtype=dispatch.compute_dtype(scores.dtype), device=scores.device)


RAW = dispatch.register(
    "sinkhorn",
    "(Tensor scores, float epsilon, int iterations, str group_name) -> Tensor",
    _fake,
    triton=_triton.forward,
    cpu=dispatch.COMPILED,
    reference=dispatch.widened(reference.sinkhorn),
)


def sinkhorn(scores, *, epsilon=0.05, iterations=3, group=None, backend=None):
    """codes = the balanced soft assignment of N samples to K prototypes after `iterations` Sinkhorn-Knopp steps.

    scores [..., N, K] (similarities; any strides; any leading axes, each an independent problem) -> codes [..., N, K], every
    row summing to 1; float32 for half inputs, else the dtype of scores. Equal to normalising exp(scores/epsilon) over samples
    and then over prototypes, `iterations` times, but finite at any finite score.
    Not differentiable: scores are detached, and the codes never require grad.
    group=None means this process alone, also when torch.distributed is initialised; with a group the rows of all its ranks are
    one problem (N may differ per rank and be 0), for one MAX and `iterations` SUM all-reduces of [..., K], which all leading
    axes share.
    Raises ValueError for K < 1, iterations < 1, epsilon <= 0, an unknown backend; TypeError for dtypes; RuntimeError where the
    backend asked for cannot run.
    Source: Cuturi 2013; Caron et al. 2020 (SwAV), distributed_sinkhorn in main_swav.py.
    """
    checks.tensor("sinkhorn", "scores", scores, "[..., N, K]")
    checks.prototypes("sinkhorn", "scores", scores)
    checks.positive("sinkhorn", "epsilon", epsilon)
    checks.at_least("sinkhorn", "iterations", iterations, 1)
    args = (scores.detach(), float(epsilon), iterations, dispatch.group_name("sinkhorn", group))
    return RAW[dispatch.choose("sinkhorn", IMPLS, backend, *args)](*args)
