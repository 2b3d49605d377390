"""When and how does unshuffle_tokens run on Triton? One launch forward; backward one over dout, and one or two that merge its sums."""

import torch

from fuseer.kernels import _tl, checks
from fuseer.kernels._tl import tl, triton

TILE, BACKWARD_TILE = 4096, 2048
MERGED, PARTS = 2048, 32


def unsupported(x, ids_restore, mask_token, pos_embed):
    return _tl.refusal(x=x, mask_token=mask_token, pos_embed=pos_embed)


def forward(x, ids_restore, mask_token, pos_embed):
    """out [B, P, D]. Kept rows are read once, the output is written once."""
    checks.permutations("unshuffle_tokens", "ids_restore", ids_restore)
    (B, keep, D), P = x.shape, ids_restore.shape[1]
    out = x.new_empty((B, P, D))
    memory, constants = _tl.tiles_of_tokens(x, TILE)
    beside = (mask_token.contiguous(), None if pos_embed is None else pos_embed.contiguous())
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(B * P, constants["BLOCK_N"]), triton.cdiv(D, constants["BLOCK_D"]))
        _tl.launch(_unshuffle, grid, *memory, ids_restore, *ids_restore.stride(), B * P, P, keep, *beside, out, **constants)
    return out


def backward(dout, ids_restore, keep, mask_token_dtype, pos_embed_dtype):
    """dx [B, keep, D], dmask_token [D] and, where it has a dtype, dpos_embed [P, D]. dout is read once, dx written once.

    A program has some positions, of a run of images; what it sums over them is merged by another launch, in a fixed order.
    """
    checks.permutations("unshuffle_tokens", "ids_restore", ids_restore)
    B, P, D = dout.shape
    memory, constants = _tl.tiles_of_tokens(dout, BACKWARD_TILE)
    blocks, columns = triton.cdiv(P, constants["BLOCK_N"]), triton.cdiv(D, constants["BLOCK_D"])
    splits = _tl.splits(blocks * columns, B, _tl.target(dout.device))
    dx, dmask_token = dout.new_empty((B, keep, D)), dout.new_empty((D,), dtype=mask_token_dtype)
    masked = dout.new_empty((splits * blocks, D), dtype=torch.float32)
    dpos_embed = dmask_token.new_empty((0,)) if pos_embed_dtype is None else dout.new_empty((P, D), dtype=pos_embed_dtype)
    totals = dpos_embed if splits == 1 else dout.new_empty((splits, *dpos_embed.shape), dtype=torch.float32)
    with torch.cuda.device_of(dout):
        arguments = (*memory, ids_restore, *ids_restore.stride(), B, P, keep, triton.cdiv(B, splits), dx, masked)
        totals_or_none = None if pos_embed_dtype is None else totals
        _tl.launch(_scatter, (blocks, splits, columns), *arguments, totals_or_none, **constants)
        _merge(masked, dmask_token)
        if totals is not dpos_embed and pos_embed_dtype is not None:
            _merge(totals, dpos_embed)
    return dx, dmask_token, dpos_embed


def _merge(parts, total):
    """total <- parts[0] + parts[1] + ..."""
    block_s = min(PARTS, _tl.power_of_two(len(parts)))
    constants = {"BLOCK_S": block_s, "BLOCK_N": MERGED // block_s, "num_warps": 4}
    _tl.launch(_sum_parts, (triton.cdiv(total.numel(), constants["BLOCK_N"]),), parts, len(parts), total.numel(), total, **constants)


@triton.jit
def _unshuffle(
    x_ptr, x_image, x_row, x_column, d_units, ids_ptr, ids_image, ids_column, N, P, keep, token_ptr, pos_ptr, out_ptr,
    CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, i] = (x[b, r] if r = ids[b, i] < keep else token) + pos[i] of BLOCK_N rows n = b P + i."""
    n, D = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), d_units * UNIT
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b, i = n // P, n % P
    r = tl.load(ids_ptr + b.to(tl.int64) * ids_image + i.to(tl.int64) * ids_column, mask=n < N, other=keep)
    kept, here = (r >= 0) & (r < keep), (n < N)[:, None] & (d < D)[None, :]
    token = tl.load(token_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    offsets = _tl.token_offsets(x_image, x_row, x_column, b, r, d, CONTIGUOUS, UNIT)
    x = tl.load(x_ptr + offsets, mask=kept[:, None] & (d < D)[None, :], other=0.0)
    out = tl.where(kept[:, None], x.to(tl.float32), token[None, :])
    if pos_ptr is not None:
        out += tl.load(pos_ptr + i.to(tl.int64)[:, None] * D + d[None, :], mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + n.to(tl.int64)[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def _scatter(
    dout_ptr, dout_image, dout_row, dout_column, d_units, ids_ptr, ids_image, ids_column, B, P, keep, span, dx_ptr, masked_ptr, totals_ptr,
    CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx[b, r] = dout[b, i] for r = ids[b, i] < keep; the sums of the other rows, and of all rows of a position, over `span` images."""
    split, D = tl.program_id(1), d_units * UNIT
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    here = (i < P)[:, None] & (d < D)[None, :]
    masked = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    totals = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for image in range(split * span, tl.minimum((split + 1) * span, B)):
        b = tl.full((), image, tl.int64)
        r = tl.load(ids_ptr + b * ids_image + i.to(tl.int64) * ids_column, mask=i < P, other=keep)
        kept = (r >= 0) & (r < keep)
        rows = tl.load(dout_ptr + _tl.token_offsets(dout_image, dout_row, dout_column, b, i, d, CONTIGUOUS, UNIT), mask=here, other=0.0)
        tl.store(dx_ptr + (b * keep + r)[:, None] * D + d[None, :], rows, mask=kept[:, None] & (d < D)[None, :])
        masked += tl.where(kept[:, None], 0.0, rows.to(tl.float32))
        if totals_ptr is not None:
            totals += rows.to(tl.float32)
    part = split * tl.num_programs(0) + tl.program_id(0)
    tl.store(masked_ptr + part.to(tl.int64) * D + d, tl.sum(masked, 0), mask=d < D)
    if totals_ptr is not None:
        own = totals_ptr + (split.to(tl.int64) * P + i)[:, None] * D + d[None, :]
        tl.store(own, totals.to(totals_ptr.dtype.element_ty), mask=here)


@triton.jit
def _sum_parts(parts_ptr, S, N, total_ptr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """total[n] = sum_s parts[s, n]."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        total += tl.load(parts_ptr + s.to(tl.int64)[:, None] * N + n[None, :], mask=(s < S)[:, None] & (n < N)[None, :], other=0.0)
    tl.store(total_ptr + n, tl.sum(total, 0).to(total_ptr.dtype.element_ty), mask=n < N)
