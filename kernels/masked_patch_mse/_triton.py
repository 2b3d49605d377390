"""When and how does masked_patch_mse run on Triton? Targets are made in registers, of pixels and predictions that are read in place."""

import torch

from fuseer.kernels import _tl, checks
from fuseer.kernels._tl import tl, triton
from fuseer.kernels.masked_patch_mse.reference import EPS, patches

TILE, LARGEST = 1024, 16384
EPSILON = tl.constexpr(EPS)


def unsupported(pred, images, ids_masked, patch, normalize, reduction):
    if pred.shape[2] > LARGEST:
        return f"a program holds patches of at most {LARGEST} numbers, and these have {pred.shape[2]}"
    return _tl.refusal(pred=pred, images=images)


def forward(pred, images, ids_masked, patch, normalize, reduction):
    """The loss and statistics [B, M, 2], as reference.py says. Masked pixels and predictions are read once; a patch outside is NaN."""
    checks.patch_ids("masked_patch_mse", "ids_masked", ids_masked, images, patch)
    B, M = ids_masked.shape
    loss = torch.empty((B, M), dtype=torch.float32, device=pred.device)
    statistics = loss.new_empty((B, M, 2))
    with torch.cuda.device_of(pred):
        memory, constants = _memory(pred, images, ids_masked, patch)
        grid = (triton.cdiv(B * M, constants["BLOCK_N"]),)
        _tl.launch(_losses, grid, *memory, B * M, loss, statistics, **constants, NORMALIZE=normalize)
        return (loss.mean() if reduction == "mean" else loss), statistics


def backward(dloss, pred, images, ids_masked, statistics, patch, normalize, reduction):
    """dpred. One launch: masked pixels and predictions are read once, every row of dpred is written once; ids are read by every block."""
    checks.patch_ids("masked_patch_mse", "ids_masked", ids_masked, images, patch)
    dpred = pred.new_empty(pred.shape)
    B, rows, n = pred.shape
    scale = 2.0 / n / (ids_masked.numel() if reduction == "mean" else 1)
    strides = (0, 0) if reduction == "mean" else dloss.stride()
    with torch.cuda.device_of(pred):
        memory, constants = _memory(pred, images, ids_masked, patch)
        constants["BLOCK_M"] = min(256, _tl.power_of_two(ids_masked.shape[1]))
        grid = (triton.cdiv(B * rows, constants["BLOCK_N"]),)
        _tl.launch(_gradient, grid, *memory, B * rows, dloss, *strides, scale, statistics, dpred, **constants)
    return dpred


def _memory(pred, images, ids_masked, patch):
    """The kernels' arguments about memory and sizes, strides of pred in UNITs, and their constants."""
    _, C, H, W = images.shape
    n, P, contiguous = pred.shape[2], patches(images, patch), pred.stride(2) == 1
    unit = _tl.unit(n, pred.stride(0), pred.stride(1)) if contiguous else 1
    block = _tl.power_of_two(n)
    constants = {"CONTIGUOUS": contiguous, "UNIT": unit, "BY_ID": pred.shape[1] == P, "SIDE": patch, "CHANNELS": C}
    constants["MIXED"] = (C == 1 or images.stride(1) == 1) and images.stride(3) == C
    constants |= {"BLOCK_N": max(1, TILE // block), "BLOCK_K": block, "num_warps": max(4, min(16, block // 256))}
    of_pred = (pred, pred.stride(0) // unit, pred.stride(1) // unit, pred.stride(2))
    sizes = (ids_masked.shape[1], P, W // patch)
    return (*of_pred, images, *images.stride(), ids_masked, *ids_masked.stride(), *sizes), constants


@triton.jit
def _pixels(
    x_ptr, x_image, x_channel, x_row, x_column, across, b, p, k, mask,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Pixels k of patches p of images b in float32, in the order row, column, channel; NaN where masked off.

    MIXED: a row of the patch is one piece of memory in that order.
    """
    row, place = k // (SIDE * CHANNELS), k % (SIDE * CHANNELS)
    first = b.to(tl.int64) * x_image + (p // across) * SIDE * x_row + (p % across) * SIDE * x_column
    within = row.to(tl.int64) * x_row
    if MIXED:
        within += place
    else:
        within += (place // CHANNELS).to(tl.int64) * x_column + (place % CHANNELS).to(tl.int64) * x_channel
    return tl.load(x_ptr + first[:, None] + within[None, :], mask=mask, other=float("nan")).to(tl.float32)


@triton.jit
def _predictions(
    pred_ptr, pred_image, pred_row, pred_column, b, r, k, mask, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Numbers k of rows r of images b in float32; NaN where masked off."""
    rows = b.to(tl.int64) * pred_image * UNIT + r.to(tl.int64) * pred_row * UNIT
    k_offset = k if CONTIGUOUS else k.to(tl.int64) * pred_column
    return tl.load(pred_ptr + rows[:, None] + k_offset[None, :], mask=mask, other=float("nan")).to(tl.float32)


@triton.jit
def _two_sums(one, one_lost, other, other_lost):
    """The sum of two rounded sums, and of what they and it lost."""
    total = one + other
    seen = total - one
    return total, one_lost + other_lost + ((one - (total - seen)) + (other - seen))


@triton.jit
def _losses(
    pred_ptr, pred_image, pred_row, pred_column, x_ptr, x_image, x_channel, x_row, x_column, ids_ptr, ids_image, ids_column,
    M, P, across, N, loss_ptr, statistics_ptr,
    CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, BY_ID: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr,
    MIXED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of BLOCK_N masked patches n = b M + m.

    The sum goes with what its roundings lost: of a patch of little contrast the target is a thousand times the distance from its mean.
    """
    PIXELS: tl.constexpr = SIDE * SIDE * CHANNELS
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    b, m = n // M, n % M
    p = tl.load(ids_ptr + b.to(tl.int64) * ids_image + m.to(tl.int64) * ids_column, mask=n < N, other=-1)
    held = (k < PIXELS)[None, :]
    mask = ((p >= 0) & (p < P))[:, None] & held
    x = _pixels(x_ptr, x_image, x_channel, x_row, x_column, across, b, p, k, mask, SIDE, CHANNELS, MIXED)
    pred = _predictions(pred_ptr, pred_image, pred_row, pred_column, b, p if BY_ID else m, k, mask, CONTIGUOUS, UNIT)
    mean, inverse = tl.zeros([BLOCK_N], tl.float32), tl.full([BLOCK_N], 1.0, tl.float32)
    if NORMALIZE:
        whole, lost = tl.reduce((tl.where(held, x, 0.0), tl.zeros([BLOCK_N, BLOCK_K], tl.float32)), 1, _two_sums)
        near = (whole + lost) / PIXELS
        mean = near + (tl.fma(near, -1.0 * PIXELS, whole) + lost) / PIXELS
        distance = tl.where(held, x - mean[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(distance * distance, 1) / (PIXELS - 1) + EPSILON)
    error = tl.where(held, pred - (x - mean[:, None]) * inverse[:, None], 0.0)
    tl.store(loss_ptr + n, tl.sum(error * error, 1) / PIXELS, mask=n < N)
    tl.store(statistics_ptr + 2 * n.to(tl.int64), mean, mask=n < N)
    tl.store(statistics_ptr + 2 * n.to(tl.int64) + 1, inverse, mask=n < N)


@triton.jit
def _compared(
    ids_ptr, ids_image, ids_column, M, dloss_ptr, dloss_image, dloss_column, b, r, inside, BY_ID: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """Of rows r of pred: the last place in ids that points at each, or -1, and the sum of the gradients of these places' losses."""
    if BY_ID:
        place, weight = r * 0 - 1, r * 0.0
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            mask = inside[:, None] & (m < M)[None, :]
            own = b.to(tl.int64)[:, None]
            ids = tl.load(ids_ptr + own * ids_image + m.to(tl.int64)[None, :] * ids_column, mask=mask, other=-1)
            here = ids == r[:, None]
            dloss = tl.load(dloss_ptr + own * dloss_image + m.to(tl.int64)[None, :] * dloss_column, mask=here, other=0.0)
            place = tl.maximum(place, tl.max(tl.where(here, m[None, :], -1), 1))
            weight += tl.sum(dloss.to(tl.float32), 1)
    else:
        place = tl.where(inside, r, -1)
        offsets = b.to(tl.int64) * dloss_image + r.to(tl.int64) * dloss_column
        weight = tl.load(dloss_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return place, weight


@triton.jit
def _gradient(
    pred_ptr, pred_image, pred_row, pred_column, x_ptr, x_image, x_channel, x_row, x_column, ids_ptr, ids_image, ids_column,
    M, P, across, N, dloss_ptr, dloss_image, dloss_column, scale, statistics_ptr, dpred_ptr,
    CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, BY_ID: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr,
    MIXED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dpred of BLOCK_N rows of pred: dloss scale (pred - target), or 0 where a row is compared with nothing."""
    PIXELS: tl.constexpr = SIDE * SIDE * CHANNELS
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows = P if BY_ID else M
    b, r = n // rows, n % rows
    place, weight = _compared(
        ids_ptr, ids_image, ids_column, M, dloss_ptr, dloss_image, dloss_column, b, r, n < N, BY_ID, BLOCK_M
    )  # fmt: skip
    masked = place >= 0
    p = tl.load(ids_ptr + b.to(tl.int64) * ids_image + place.to(tl.int64) * ids_column, mask=masked, other=-1)
    mask = ((p >= 0) & (p < P))[:, None] & (k < PIXELS)[None, :]
    here = statistics_ptr + 2 * (b.to(tl.int64) * M + place)
    mean, inverse = tl.load(here, mask=masked, other=0.0), tl.load(here + 1, mask=masked, other=0.0)
    x = _pixels(x_ptr, x_image, x_channel, x_row, x_column, across, b, p, k, mask, SIDE, CHANNELS, MIXED)
    pred = _predictions(pred_ptr, pred_image, pred_row, pred_column, b, r, k, mask, CONTIGUOUS, UNIT)
    dpred = (pred - (x - mean[:, None]) * inverse[:, None]) * (weight * scale)[:, None]
    dpred = tl.where(masked[:, None], dpred, 0.0).to(dpred_ptr.dtype.element_ty)
    tl.store(dpred_ptr + n.to(tl.int64)[:, None] * PIXELS + k[None, :], dpred, mask=(n < N)[:, None] & (k < PIXELS)[None, :])
