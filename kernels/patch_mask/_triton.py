"""When and how does patch_mask run on Triton? One launch that counts, for every patch, the patches before it."""

import torch

from fuseer.kernels import _tl
from fuseer.kernels._tl import tl, triton

BLOCK_I, TILE = 32, 2048
# the key of NaN: one more than that of infinity, so that one can be added to any key
NAN_KEY = tl.constexpr(0x7F800001)


def unsupported(noise, keep):
    return _tl.refusal(noise=noise)


def forward(noise, keep):
    """ids_keep, ids_restore and mask. A row is read once by each of its P / BLOCK_I programs; P comparisons a patch, of any P."""
    B, P = noise.shape
    ids_restore = torch.empty((B, P), dtype=torch.int64, device=noise.device)
    ids_keep, mask = ids_restore.new_empty((B, keep)), torch.empty((B, P), dtype=torch.float32, device=noise.device)
    block_i = min(BLOCK_I, _tl.power_of_two(P))
    constants = {"BLOCK_I": block_i, "BLOCK_J": min(TILE // block_i, _tl.power_of_two(P)), "num_warps": 4}
    with torch.cuda.device_of(noise):
        grid = (B, triton.cdiv(P, block_i))
        _tl.launch(_ranks, grid, noise, *noise.stride(), P, keep, ids_keep, ids_restore, mask, **constants)
    return ids_keep, ids_restore, mask


@triton.jit
def _keys(row_ptr, j, P, column):
    """Integers in the order of the numbers at j: -0 is 0, and NaN, which also stands beyond P, comes after infinity."""
    x = tl.load(row_ptr + j.to(tl.int64) * column, mask=j < P, other=float("nan")).to(tl.float32)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), NAN_KEY)


@triton.jit
def _ranks(
    noise_ptr, noise_row, noise_column, P, keep, ids_keep_ptr, ids_restore_ptr, mask_ptr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """rank_i = how many j have (noise_j, j) < (noise_i, i), for BLOCK_I patches of one image; and what follows from the rank."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    own = _keys(noise_ptr + b * noise_row, i, P, noise_column)
    rank = tl.zeros([BLOCK_I], tl.int32)
    for start in range(0, P, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        key = _keys(noise_ptr + b * noise_row, j, P, noise_column)
        # of equal keys the one further left is before; none beyond P is, for NaN stands there
        before = key[None, :] < own[:, None] + (j[None, :] < i[:, None]).to(tl.int32)
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(ids_restore_ptr + b * P + i, rank.to(tl.int64), mask=i < P)
    tl.store(mask_ptr + b * P + i, (rank >= keep).to(tl.float32), mask=i < P)
    tl.store(ids_keep_ptr + b * keep + rank, i.to(tl.int64), mask=(i < P) & (rank < keep))
