"""When and how does gather_patches run on Triton? A program for each block of a patch's pixels; images of any strides are read in place."""

import torch

from fuseer.kernels import _tl, checks
from fuseer.kernels._tl import tl, triton

TILE = 1024
BLOCK_M = 64


def unsupported(images, ids, patch):
    return _tl.refusal(images=images)


def forward(images, ids, patch):
    """The patches asked for, [B, M, patch * patch * C]; an id that is no patch gives NaN."""
    (B, C, _, _), M = images.shape, ids.shape[1]
    n = patch * patch * C
    out = images.new_empty((B, M, n))
    checks.ids("gather_patches", "ids", ids, _grid(images, patch)[1])
    with torch.cuda.device_of(images):
        block = min(TILE, _tl.power_of_two(n))
        arguments = (images, *images.stride(), ids, *ids.stride(), M, *_grid(images, patch), out)
        options = {"PATCH": patch, "CHANNELS": C, "BLOCK_N": block, "num_warps": 4}
        _tl.launch(_gather, (B * M, triton.cdiv(n, block)), *arguments, **options)
    return out


def backward(dout, images, ids, patch):
    """dimages: every patch is written by one program, which finds the rows that took it among those of its image, in their order."""
    (B, C, _, _), M = images.shape, ids.shape[1]
    n, (across, P) = patch * patch * C, _grid(images, patch)
    dimages = images.new_empty(images.shape)
    checks.ids("gather_patches", "ids", ids, P)
    with torch.cuda.device_of(images):
        block = min(TILE, _tl.power_of_two(n))
        arguments = (dout, *dout.stride(), ids, *ids.stride(), M, across, P, dimages, *dimages.stride())
        options = {"PATCH": patch, "CHANNELS": C, "BLOCK_N": block, "BLOCK_M": BLOCK_M, "num_warps": 4}
        _tl.launch(_scatter, (B * P, triton.cdiv(n, block)), *arguments, **options)
    return dimages


def _grid(images, patch):
    """(patches in a row of them, P)"""
    across = images.shape[3] // patch
    return across, (images.shape[2] // patch) * across


@triton.jit
def _pixels(j, id, across, of_channel, of_line, of_pixel, PATCH: tl.constexpr, CHANNELS: tl.constexpr):
    """How far numbers j, in the order row, column, channel, of patch `id` are from the beginning of their image."""
    c, x, y = j % CHANNELS, j // CHANNELS % PATCH, j // (CHANNELS * PATCH)
    line, column = id // across * PATCH + y, id % across * PATCH + x
    return c.to(tl.int64) * of_channel + line.to(tl.int64) * of_line + column.to(tl.int64) * of_pixel


@triton.jit
def _gather(
    x_ptr, of_image, of_channel, of_line, of_pixel, ids_ptr, ids_row, ids_column, M, across, P, out_ptr,
    PATCH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block of one row of out."""
    n: tl.constexpr = PATCH * PATCH * CHANNELS
    row = tl.program_id(0).to(tl.int64)
    b, m = row // M, row % M
    id = tl.load(ids_ptr + b * ids_row + m * ids_column)
    there = (id >= 0) & (id < P)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = _pixels(j, id.to(tl.int32), across, of_channel, of_line, of_pixel, PATCH, CHANNELS)
    x = tl.load(x_ptr + b * of_image + offsets, mask=(j < n) & there, other=float("nan"))
    tl.store(out_ptr + row * n + j, x, mask=j < n)


@triton.jit
def _scatter(
    dout_ptr, dout_image, dout_row, dout_column, ids_ptr, ids_row, ids_column, M, across, P,
    dx_ptr, of_image, of_channel, of_line, of_pixel,
    PATCH: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A block of one patch of dimages: the sum of the rows of dout that took it, 0 where none did."""
    n: tl.constexpr = PATCH * PATCH * CHANNELS
    patch = tl.program_id(0)
    b, id = (patch // P).to(tl.int64), patch % P
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        ids = tl.load(ids_ptr + b * ids_row + m.to(tl.int64) * ids_column, mask=m < M, other=-1)
        left = ids == id
        # most blocks hold no taker, and of a permutation there is one in all
        for _ in range(tl.sum(left.to(tl.int32), 0)):
            taker = tl.min(tl.where(left, m, M), 0)
            row = dout_ptr + b * dout_image + taker.to(tl.int64) * dout_row
            total += tl.load(row + j.to(tl.int64) * dout_column, mask=j < n, other=0.0).to(tl.float32)
            left = left & (m != taker)
    offsets = _pixels(j, id, across, of_channel, of_line, of_pixel, PATCH, CHANNELS)
    tl.store(dx_ptr + b * of_image + offsets, total.to(dx_ptr.dtype.element_ty), mask=j < n)
