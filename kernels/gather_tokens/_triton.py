"""When and how does gather_tokens run on Triton? Rows are copied; the gradient finds, token by token, the rows to sum."""

import torch

from fuseer.kernels import _tl, checks
from fuseer.kernels._tl import tl, triton

TILE, BLOCK_M = 4096, 64


def unsupported(x, ids):
    return _tl.refusal(x=x)


def forward(x, ids):
    """out [B, M, D]; a row whose id lies outside x is NaN. One launch: each row read and written once."""
    checks.ids("gather_tokens", "ids", ids, x.shape[1])
    (B, P, D), M = x.shape, ids.shape[1]
    out = x.new_empty((B, M, D))
    memory, constants = _tl.tiles_of_tokens(x, TILE)
    with torch.cuda.device_of(x):
        grid = (triton.cdiv(B * M, constants["BLOCK_N"]), triton.cdiv(D, constants["BLOCK_D"]))
        _tl.launch(_gather, grid, *memory, ids, *ids.stride(), B * M, M, P, out, **constants)
    return out


def backward(dout, ids, patches):
    """dx [B, patches, D]. One launch: each row of dout read once, each row of dx written once, ids read twice by every block of tokens."""
    checks.ids("gather_tokens", "ids", ids, patches)
    B, M, D = dout.shape
    dx = dout.new_empty((B, patches, D))
    memory, constants = _tl.tiles_of_tokens(dout, TILE)
    with torch.cuda.device_of(dout):
        blocks = triton.cdiv(patches, constants["BLOCK_N"])
        grid = (B * blocks, triton.cdiv(D, constants["BLOCK_D"]))
        constants["BLOCK_M"] = min(BLOCK_M, _tl.power_of_two(M))
        _tl.launch(_sum_places, grid, *memory, ids, *ids.stride(), M, patches, blocks, dx, **constants)
    return dx


@triton.jit
def _gather(
    x_ptr, x_image, x_row, x_column, d_units, ids_ptr, ids_image, ids_column, N, M, P, out_ptr,
    CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, m] = x[b, ids[b, m]] of BLOCK_N rows n = b M + m."""
    n, D = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), d_units * UNIT
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b, m = n // M, n % M
    p = tl.load(ids_ptr + b.to(tl.int64) * ids_image + m.to(tl.int64) * ids_column, mask=n < N, other=-1)
    inside = (p >= 0) & (p < P)
    offsets = _tl.token_offsets(x_image, x_row, x_column, b, p, d, CONTIGUOUS, UNIT)
    x = tl.load(x_ptr + offsets, mask=inside[:, None] & (d < D)[None, :], other=float("nan"))
    tl.store(out_ptr + n.to(tl.int64)[:, None] * D + d[None, :], x, mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _next_place(row_ptr, ids_column, M, p, m, BLOCK_M: tl.constexpr):
    """The first place after m to which each token p went; M where there is none."""
    found = m * 0 + M
    for start in range(0, M, BLOCK_M):
        k = start + tl.arange(0, BLOCK_M)
        ids = tl.load(row_ptr + k.to(tl.int64) * ids_column, mask=k < M, other=-1)
        here = (ids[None, :] == p[:, None]) & (k[None, :] > m[:, None])
        found = tl.minimum(found, tl.min(tl.where(here, k[None, :], M), 1))
    return found


@triton.jit
def _sum_places(
    dout_ptr, dout_image, dout_row, dout_column, d_units, ids_ptr, ids_image, ids_column, M, P, blocks, dx_ptr,
    CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dx[b, p] = the sum of dout[b, m] over the places m with ids[b, m] = p, in their order, for BLOCK_N tokens of one image."""
    b, D = tl.program_id(0) // blocks, d_units * UNIT
    p = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_ptr = ids_ptr + b.to(tl.int64) * ids_image
    m = _next_place(row_ptr, ids_column, M, p, p * 0 - 1, BLOCK_M)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # once where ids are unique
    while tl.min(m, 0) < M:
        offsets = _tl.token_offsets(dout_image, dout_row, dout_column, b, m, d, CONTIGUOUS, UNIT)
        total += tl.load(dout_ptr + offsets, mask=(m < M)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        m = _next_place(row_ptr, ids_column, M, p, m, BLOCK_M)
    dx = dx_ptr + (b.to(tl.int64) * P + p)[:, None] * D + d[None, :]
    tl.store(dx, total.to(dx_ptr.dtype.element_ty), mask=(p < P)[:, None] & (d < D)[None, :])
