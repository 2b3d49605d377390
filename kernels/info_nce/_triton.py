"""When and how does info_nce run on Triton? As attention whose values are its keys: loss and gradient from one pass over them."""

import torch

from fuseer.kernels import _contrast, _strips, _tl, checks, dispatch
from fuseer.kernels._tl import tl, triton


def unsupported(query, keys, positive, positive_index, temperature, normalize, gradient, group_name):
    return _contrast.refusal(query=query, keys=keys, positive=positive, positive_index=positive_index)


def forward(query, keys, positive, positive_index, temperature, normalize, gradient, group_name):
    """(loss, dquery), as reference.py says; keys are read once. The gradient is a weighted mean of the keys, less the positive."""
    if positive_index is not None and dispatch.indices_are_checked(query.device):
        checks.indices_within("info_nce", "positive_index", positive_index, len(keys))
    query, keys, positive, index = (None if x is None else x.contiguous() for x in (query, keys, positive, positive_index))
    counted = dispatch.mean_share(query, group_name) if group_name else None
    scale = 1.0 if group_name else 1 / max(1, query.shape[0])
    contrast = _contrast.Contrast(query, keys, temperature, normalize, index=index)
    with torch.cuda.device_of(query):
        inverse = _contrast.inverse_norms(query, normalize)
        if contrast.width <= _contrast.FUSED_D:
            sums = _contrast.sweep(contrast, inverse, None, gradient)
        else:
            sums = _strips.sweep(contrast, inverse, _contrast.inverse_norms(keys, normalize), gradient)
        losses, dquery = _finished(contrast, keys if positive is None else positive, sums, scale / temperature, counted)
        return _contrast.total(losses, scale, counted), losses.new_empty((0,)) if dquery is None else dquery


def _finished(contrast, positive, sums, scale, counted):
    """Losses [N], and the gradient where the sums have one, from the parts of the sums."""
    tops, sums, o = sums
    losses = sums.new_empty(sums.shape[1:])
    dquery = None if o is None else sums.new_empty(contrast.x.shape)
    constants = {name: contrast.constants[name] for name in ("NORMALIZE", "FIXED", "D", "BLOCK_D")}
    arguments = (contrast.x, positive, contrast.index, losses.shape[0], *contrast.scales, tops, sums, o, sums.shape[0])
    options = {"BLOCK_S": min(_contrast.BLOCK_S, sums.shape[0]), "num_warps": _contrast.row_tile(contrast.width)["num_warps"]}
    _tl.launch(_finish, losses.shape, *arguments, scale, counted, losses, dquery, **constants, **options)
    return losses, dquery


@triton.jit
def _finish(
    q_ptr, p_ptr, index_ptr, N, high, low, shift, tops_ptr, sums_ptr, o_ptr, parts, scale, counted_ptr, losses_ptr, dq_ptr,
    NORMALIZE: tl.constexpr, FIXED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Loss of one row and its gradient, share sum_m 2**(z_m - top) k_m/|k_m| - (1 - p) positive/|positive|, the parts in their order."""
    row = tl.program_id(0)
    n = row + tl.arange(0, 1)
    q = _contrast.load_rows(q_ptr, n, n < N, D, BLOCK_D).to(tl.float32)
    at = n if index_ptr is None else tl.load(index_ptr + n)
    p = _contrast.load_rows(p_ptr, at, n < N, D, BLOCK_D).to(tl.float32)
    inverse = _contrast.inverse_of(p, NORMALIZE)
    z = tl.sum(q * p, 1) * inverse * _tl.divided(_contrast.inverse_of(q, NORMALIZE), high, low)
    top = tl.full([1], shift if FIXED else _tl.LOWEST, tl.float32)
    sums = tl.zeros([1], tl.float32)
    o = tl.zeros([BLOCK_D], tl.float32)
    d = tl.arange(0, BLOCK_D)
    for start in range(0, parts, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        here = s.to(tl.int64) * N + row
        part = tl.load(sums_ptr + here, mask=s < parts, other=0.0)
        weight = tl.full([BLOCK_S], 1.0, tl.float32)
        if not FIXED:
            tops = tl.load(tops_ptr + here, mask=s < parts, other=_tl.LOWEST)
            higher = tl.maximum(top, tl.max(tops, 0))
            weight = tl.exp2(tops - tl.max(higher, 0))
            old = tl.exp2(top - higher)
            sums, top = sums * old, higher
            if o_ptr is not None:
                o = o * tl.max(old, 0)
        sums += tl.sum(part * weight, 0)
        if o_ptr is not None:
            rows = o_ptr + here[:, None] * D + d[None, :]
            o += tl.sum(tl.load(rows, mask=(s < parts)[:, None] & (d < D)[None, :], other=0.0) * weight[:, None], 0)
    loss, share, miss = _contrast.outcome(z, top, sums)
    tl.store(losses_ptr + n, loss)
    if dq_ptr is not None:
        dq = share[:, None] * o[None, :] - (miss * inverse)[:, None] * p
        dq = _contrast.projected(_contrast.scaled(dq, scale, counted_ptr), q, NORMALIZE)
        _contrast.store_rows(dq_ptr, n, n < N, dq, D, BLOCK_D)
