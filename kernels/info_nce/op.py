"""How is info_nce called, checked, dispatched and differentiated?"""

import torch
from torch.autograd.function import once_differentiable

from fuseer.kernels import checks, dispatch
from fuseer.kernels.info_nce import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)


def _fake(query, keys, positive, positive_index, temperature, normalize, gradient, group_name):
    dtype = dispatch.compute_dtype(query.dtype)
    return query.new_empty((), dtype=dtype), query.new_empty(query.shape if gradient else (0,), dtype=dtype)


RAW = dispatch.register(
    "info_nce",
    "(Tensor query, Tensor keys, Tensor? positive, Tensor? positive_index, float temperature, bool normalize, bool gradient,"
    " str group_name) -> (Tensor loss, Tensor dquery)",
    _fake,
    triton=_triton.forward,
    cpu=_cpu.forward,
    reference=reference.forward,
)


class _InfoNce(torch.autograd.Function):
    """The raw op makes the gradient in the same pass over the keys, which may change before the backward."""

    @staticmethod
    def forward(ctx, backend, query, *others):
        loss, dquery = RAW[backend](query, *others)
        ctx.save_for_backward(dquery)
        ctx.dtype = query.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        (dquery,) = ctx.saved_tensors
        return None, (dquery * dloss).to(ctx.dtype), None, None, None, None, None, None, None


def info_nce(query, keys, *, positive=None, positive_index=None, temperature=0.2, normalize=True, group=None, backend=None):
    """The mean over rows n of log sum_c exp(l_nc) - l_np: the cross-entropy of telling the positive p among all candidates c.

    l = <query_n, candidate>/temperature, both divided by max(|.|, 1e-12) with `normalize`. query [N, D]; candidates are keys [Q, D]
    and, where `positive` [N, D] is given, that row as one more (MoCo v1 and v2 with a queue of keys); with `positive_index` [N]
    int64 the positive is that row of keys (MoCo v3: gathered keys, row n + this rank's offset). Exactly one of the two. Any strides.
    A scalar, float32, or float64 where query is. Differentiable in query alone, once; keys may be overwritten before the backward.
    Loss and gradient come from one pass over the keys; the N x Q matrix never exists.
    group: rank r returns W * (sum over its own rows)/(rows of all ranks); gradients averaged over ranks are those of the global mean. N
    may differ between ranks and be 0. Keys are not gathered here. Raises ValueError for shapes, a temperature of 0, an index outside
    keys (on a GPU only with FUSEER_CHECK_INDICES=1, since looking waits for the device); TypeError for dtypes.
    Source: He et al. 2020, arXiv 1911.05722; facebookresearch/moco moco/builder.py; Chen et al. 2021 (MoCo v3), arXiv 2104.02057.
    """
    checks.tensor("info_nce", "query", query, "[N, D]")
    checks.tensor("info_nce", "keys", keys, "[Q, D]")
    checks.shape("info_nce", "keys", keys, "[Q, D] with query's D", (keys.shape[0], query.shape[1]))
    if (positive is None) == (positive_index is None):
        given = "neither" if positive is None else "both"
        raise ValueError(f"info_nce: exactly one of positive [N, D] and positive_index [N] must be given; got {given}")
    if positive is not None:
        checks.tensor("info_nce", "positive", positive, "[N, D]")
        checks.shape("info_nce", "positive", positive, "[N, D] of query", query.shape)
    for name, x in (("keys", keys), ("positive", positive)):
        if x is not None:
            checks.same_dtype("info_nce", "query", query, name, x)
            checks.same_device("info_nce", "query", query, name, x)
    if positive_index is not None:
        checks.row_indices("info_nce", "positive_index", positive_index, "query", query, "keys", keys)
    checks.nonzero("info_nce", "temperature", temperature)
    gradient = torch.is_grad_enabled() and query.requires_grad
    options = (float(temperature), bool(normalize), gradient, dispatch.group_name("info_nce", group))
    arguments = (query, keys, positive, positive_index, *options)
    return _InfoNce.apply(dispatch.choose("info_nce", IMPLS, backend, *arguments), *arguments)
