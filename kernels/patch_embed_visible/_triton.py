"""When and how does patch_embed_visible run on Triton? As a matrix product whose rows are read, patch by patch, where the images lie."""

import torch

from fuseer.kernels import _tl, checks, dispatch
from fuseer.kernels._tl import tl, triton
from fuseer.kernels.patch_embed_visible import reference

BLOCK_M = 1024
MERGED = 1024
# fewer rows than this are not worth a program of their own, whose sums another launch adds
ROWS_A_SPLIT = 512


def unsupported(images, weight, bias, ids_keep, pos_embed, mean, std):
    return _tl.refusal(images=images, weight=weight, bias=bias, pos_embed=pos_embed)


def forward(images, weight, bias, ids_keep, pos_embed, mean, std):
    """out [B, keep, D]; an id that is no patch gives a row of NaN."""
    D = len(weight)
    out = weight.new_empty((*ids_keep.shape, D), dtype=reference.out_dtype(weight, pos_embed))
    checks.patch_ids("patch_embed_visible", "ids_keep", ids_keep, images, weight.shape[3])
    with torch.cuda.device_of(images):
        options, R = tile(weight, ids_keep.numel()), ids_keep.numel()
        arguments = (*_visible(images, weight, ids_keep, mean, std), weight.reshape(D, -1).contiguous())
        arguments = (*arguments, *_strided(bias, 1), *_strided(pos_embed, 2), out)
        grid = (triton.cdiv(D, options["BLOCK_D"]) * triton.cdiv(R, options["BLOCK_R"]),)
        _tl.launch(_embed, grid, *arguments, **_constants(weight), **options)
    return out


def backward(dout, images, weight, bias, ids_keep, pos_embed, mean, std):
    """(dweight, dbias, dpos_embed). Partial sums over spans of rows, then their sum in order; patches are read again where they lie."""
    D, K, R = len(weight), weight[0].numel(), ids_keep.numel()
    dweight = weight.new_empty(weight.shape)
    dbias, dpositions = (weight.new_empty(0) if x is None else x.new_empty(x.shape) for x in (bias, pos_embed))
    checks.patch_ids("patch_embed_visible", "ids_keep", ids_keep, images, weight.shape[3])
    with torch.cuda.device_of(images):
        options, padded = tile(weight, R), _constants(weight)["LINES"] * _constants(weight)["PAD"]
        target = _tl.target(images.device)
        # sm_80 has registers for half the rows where bytes are normalised on the way
        rows = options["BLOCK_K"] if mean is None or target.capability >= (9, 0) else max(16, options["BLOCK_K"] // 2)
        options |= {"BLOCK_K": min(options["BLOCK_D"], max(16, _tl.power_of_two(padded))), "BLOCK_R": rows}
        tiles = (triton.cdiv(padded, options["BLOCK_K"]), triton.cdiv(D, options["BLOCK_D"]))
        splits = _splits(R, tiles[0] * tiles[1], target)
        span = triton.cdiv(triton.cdiv(R, splits), options["BLOCK_R"]) * options["BLOCK_R"]
        numbers = D * K + (0 if bias is None else D)
        partial = torch.empty((splits, numbers), dtype=torch.float32, device=images.device)
        arguments = (*_visible(images, weight, ids_keep, mean, std), dout, *dout.stride(), span, partial, numbers)
        _tl.launch(_weight_sums, (*tiles, splits), *arguments, BIAS=bias is not None, **_constants(weight), **options)
        merge = (partial, numbers, splits, dweight, None if bias is None else dbias)
        _tl.launch(_merge, (triton.cdiv(numbers, MERGED),), *merge, SPLIT_AT=D * K, BLOCK_N=MERGED, num_warps=4)
        if pos_embed is not None:
            block = min(1024, _tl.power_of_two(D))
            arguments = (dout, *dout.stride(), ids_keep, *ids_keep.stride(), R, ids_keep.shape[1], dpositions)
            grid = (len(pos_embed), triton.cdiv(D, block))
            _tl.launch(_position_sums, grid, *arguments, D=D, BLOCK_D=block, BLOCK_M=BLOCK_M, num_warps=4)
    return dweight, dbias, dpositions


def tile(weight, rows):
    """Rows, columns and depth of a product: what registers hold, and 99 KiB of shared memory."""
    half = weight.dtype in dispatch.HALF
    block_r, block_d, block_k, warps, stages = (128, 128, 64, 8, 3) if half else (64, 64, 32, 4, 2)
    constants = _constants(weight)
    return {
        "BLOCK_R": min(block_r, max(16, _tl.power_of_two(rows))),
        "BLOCK_D": min(block_d, max(16, _tl.power_of_two(len(weight)))),
        "BLOCK_K": min(block_k, max(16, _tl.power_of_two(constants["LINES"] * constants["PAD"]))),
        "num_warps": warps,
        "num_stages": stages,
    }


def _splits(rows, tiles, target):
    """Over how many programs the rows of a tile of dweight are split: a power of two, for two programs a multiprocessor."""
    return 1 << max(0, min(2 * target.multiprocessors // tiles, rows // ROWS_A_SPLIT, 64).bit_length() - 1)


def _constants(weight):
    """A patch of p x p pixels in C channels is C p lines, each padded to a power of two; numbers are multiplied in the weight's dtype."""
    D, C, _, p = weight.shape
    precision = "ieee" if torch.version.hip else "tf32x3" if weight.dtype == torch.float32 else "tf32"
    return {"D": D, "LINES": C * p, "PATCH": p, "PAD": _tl.power_of_two(p), "PRECISION": precision, "LIKE": _dtype(weight)}


def _dtype(weight):
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(weight.dtype, tl.float32)


def _visible(images, weight, ids_keep, mean, std):
    """The kernels' arguments about the rows of patches: where they lie, and what normalises them."""
    across, of_channels = images.shape[3] // weight.shape[3], (None if x is None else x.float().contiguous() for x in (mean, std))
    P = (images.shape[2] // weight.shape[3]) * across
    return images, *images.stride(), *of_channels, ids_keep, *ids_keep.stride(), ids_keep.numel(), ids_keep.shape[1], across, P


def _strided(x, axes):
    """Pointer and strides of an optional tensor."""
    return (None, *axes * (0,)) if x is None else (x, *x.stride())


@triton.jit
def _patches(
    r, ids_ptr, ids_row, ids_column, R, M, across, P, of_image, of_line, of_pixel, PATCH: tl.constexpr
):  # fmt: skip
    """(how far the patches of rows r are from the first pixel, their ids, whether there are such)."""
    b, m = (r // M).to(tl.int64), (r % M).to(tl.int64)
    id = tl.load(ids_ptr + b * ids_row + m * ids_column, mask=r < R, other=-1)
    there = (id >= 0) & (id < P)
    id = tl.where(there, id, 0).to(tl.int32)
    line, column = (id // across * PATCH).to(tl.int64), (id % across * PATCH).to(tl.int64)
    return b * of_image + line * of_line + column * of_pixel, id, there


@triton.jit
def _pixels(
    x_ptr, offsets, there, k, of_channel, of_line, of_pixel, mean_ptr, std_ptr,
    LINES: tl.constexpr, PATCH: tl.constexpr, PAD: tl.constexpr, LIKE: tl.constexpr,
):  # fmt: skip
    """(numbers k of the patches [r, k] as factors, where they are in a row of the weight [k], whether they are [k]).

    A line of PATCH pixels is PAD long here, so that a block begins where the compiler knows it to; what is added is 0.
    """
    line, x = k // PAD, k % PAD
    c, y = line // PATCH, line % PATCH
    columns = c.to(tl.int64) * of_channel + y.to(tl.int64) * of_line + x.to(tl.int64) * of_pixel
    valid = line < LINES if PATCH == PAD else (line < LINES) & (x < PATCH)
    mask = there[:, None] & valid[None, :]
    pixels = tl.load(x_ptr + offsets[:, None] + columns[None, :], mask=mask, other=0)
    if mean_ptr is not None:
        inverse = 1.0 / tl.load(std_ptr + c, mask=valid, other=1.0)
        shift = -tl.load(mean_ptr + c, mask=valid, other=0.0) * inverse
        pixels = tl.where(mask, tl.fma(pixels.to(tl.float32), (inverse / 255)[None, :], shift[None, :]), 0.0)
    return _factor(pixels, LIKE), line * PATCH + x, valid


@triton.jit
def _factor(x, LIKE: tl.constexpr):
    """x rounded to the dtype in which it is multiplied. The interpreter multiplies float32 alone."""
    x = x.to(LIKE)
    if _tl.IN_PYTHON:
        x = x.to(tl.float32)
    return x


@triton.jit
def _embed(
    x_ptr, of_image, of_channel, of_line, of_pixel, mean_ptr, std_ptr, ids_ptr, ids_row, ids_column, R, M, across, P,
    w_ptr, bias_ptr, bias_column, pos_ptr, pos_row, pos_column, out_ptr,
    D: tl.constexpr, LINES: tl.constexpr, PATCH: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr, LIKE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of out. Tiles of the same rows are neighbours, so that the second finds their pixels in the cache."""
    tiles: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    r = tl.program_id(0) // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(0) % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    offsets, id, there = _patches(r, ids_ptr, ids_row, ids_column, R, M, across, P, of_image, of_line, of_pixel, PATCH)
    out = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(0, LINES * PAD, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x, k_weight, valid = _pixels(
            x_ptr, offsets, there, k, of_channel, of_line, of_pixel, mean_ptr, std_ptr, LINES, PATCH, PAD, LIKE
        )  # fmt: skip
        rows = w_ptr + d.to(tl.int64)[:, None] * (LINES * PATCH) + k_weight[None, :]
        w = tl.load(rows, mask=(d < D)[:, None] & valid[None, :], other=0.0)
        out = tl.dot(x, tl.trans(_factor(w, LIKE)), out, input_precision=PRECISION)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + d.to(tl.int64) * bias_column, mask=d < D, other=0.0).to(tl.float32)[None, :]
    mask = (r < R)[:, None] & (d < D)[None, :]
    if pos_ptr is not None:
        positions = pos_ptr + id.to(tl.int64)[:, None] * pos_row + d.to(tl.int64)[None, :] * pos_column
        out += tl.load(positions, mask=mask & there[:, None], other=0.0).to(tl.float32)
    out = tl.where(there[:, None], out, float("nan"))
    tl.store(out_ptr + r.to(tl.int64)[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_sums(
    x_ptr, of_image, of_channel, of_line, of_pixel, mean_ptr, std_ptr, ids_ptr, ids_row, ids_column, R, M, across, P,
    dout_ptr, dout_image, dout_row, dout_column, span, partial_ptr, numbers, BIAS: tl.constexpr,
    D: tl.constexpr, LINES: tl.constexpr, PATCH: tl.constexpr, PAD: tl.constexpr, PRECISION: tl.constexpr, LIKE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dweight, and with BIAS of dbias behind it, summed over one span of rows."""
    split = tl.program_id(2)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    dw = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, R), BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        offsets, _, there = _patches(r, ids_ptr, ids_row, ids_column, R, M, across, P, of_image, of_line, of_pixel, PATCH)
        x, _, _ = _pixels(x_ptr, offsets, there, k, of_channel, of_line, of_pixel, mean_ptr, std_ptr, LINES, PATCH, PAD, LIKE)
        rows = dout_ptr + (r // M).to(tl.int64) * dout_image + (r % M).to(tl.int64) * dout_row
        dout = tl.load(rows[:, None] + d.to(tl.int64)[None, :] * dout_column, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0)
        if BIAS:
            dbias += tl.sum(dout.to(tl.float32), 0)
        dw = tl.dot(tl.trans(_factor(dout, LIKE)), x, dw, input_precision=PRECISION)
    line, x = k // PAD, k % PAD
    here = partial_ptr + split.to(tl.int64) * numbers
    valid = (line < LINES) & (x < PATCH)
    places = d.to(tl.int64)[:, None] * (LINES * PATCH) + (line * PATCH + x)[None, :]
    tl.store(here + places, dw, mask=(d < D)[:, None] & valid[None, :])
    if BIAS:
        tl.store(here + D * LINES * PATCH + d, dbias, mask=(d < D) & (tl.program_id(0) == 0))


@triton.jit
def _merge(partial_ptr, numbers, splits, dw_ptr, dbias_ptr, SPLIT_AT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The sums over all spans in their order: the first SPLIT_AT numbers are dweight, the others dbias."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    here = partial_ptr + n
    for _ in range(0, splits):
        total += tl.load(here, mask=n < numbers, other=0.0)
        here += numbers
    tl.store(dw_ptr + n, total.to(dw_ptr.dtype.element_ty), mask=n < SPLIT_AT)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + (n - SPLIT_AT), total.to(dbias_ptr.dtype.element_ty), mask=(n >= SPLIT_AT) & (n < numbers))


@triton.jit
def _position_sums(
    dout_ptr, dout_image, dout_row, dout_column, ids_ptr, ids_row, ids_column, R, M, dpos_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The sum of the rows of dout at one position, in their order."""
    position = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, R, BLOCK_M):
        r = start + tl.arange(0, BLOCK_M)
        ids = tl.load(ids_ptr + (r // M).to(tl.int64) * ids_row + (r % M).to(tl.int64) * ids_column, mask=r < R, other=-1)
        left = ids == position
        for _ in range(tl.sum(left.to(tl.int32), 0)):
            taker = tl.min(tl.where(left, r, R), 0)
            row = dout_ptr + (taker // M).to(tl.int64) * dout_image + (taker % M).to(tl.int64) * dout_row
            total += tl.load(row + d.to(tl.int64) * dout_column, mask=d < D, other=0.0).to(tl.float32)
            left = left & (r != taker)
    tl.store(dpos_ptr + position.to(tl.int64) * D + d, total.to(dpos_ptr.dtype.element_ty), mask=d < D)
