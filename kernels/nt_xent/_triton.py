"""When and how does nt_xent run on Triton? Rows of 256 values and fewer are compared tile by tile, wider ones strip by strip."""

import math

import torch

from fuseer.kernels import _contrast, _strips, _tl, dispatch
from fuseer.kernels._tl import tl, triton

# the upper triangle leaves one sum for every row and block of rows; where these are more bytes, rows are swept whole instead
TRIANGLE_BYTES = 64 << 20
BLOCK_K = 32


def unsupported(z1, z2, temperature, normalize, same_rows, gradient, group_name):
    return _contrast.refusal(z1=z1, z2=z2)


def forward(z1, z2, temperature, normalize, same_rows, gradient, group_name):
    """(loss, dz1, dz2), as reference.py says. Products of all pairs: half of them for the loss alone, all of them with a group;
    then all of them once more for the gradient, and one product with the rows. Nothing is as large as all pairs.
    """
    rows, counts, rank = dispatch.gather_rows(torch.cat((z1, z2)), group_name, same_rows)
    first, own = sum(counts[:rank]), counts[rank]
    contrast = _contrast.Contrast(rows[first : first + own], rows, temperature, normalize, views=2, first=first)
    scale = len(counts) / max(1, rows.shape[0])
    with torch.cuda.device_of(z1):
        inverse = _contrast.inverse_norms(rows, normalize)
        statistics, misses, losses = _statistics(contrast, *_sums(contrast, inverse, group_name))
        loss = _contrast.total(losses, scale)
        if not gradient:
            return loss, loss.new_empty((0,)), loss.new_empty((0,))
        if rows.shape[0]:
            statistics = dispatch.gather_rows(statistics, group_name, counts=counts)[0]
        body = _gradient if contrast.width <= _contrast.FUSED_D else _strip_gradient
        return loss, *body(contrast, inverse, statistics, misses, scale / temperature)


def _sums(contrast, inverse, group_name):
    """(tops or None, sums) [S, 2N] over the negatives of each own row, in S parts."""
    rows, inverses = contrast.y.shape[0], (contrast.of_rows(inverse), inverse)
    if contrast.width > _contrast.FUSED_D:
        return _strips.sweep(contrast, *inverses, gradient=False)[:2]
    target = _tl.target(contrast.x.device)
    options = _triangle_tile(contrast, target)
    blocks = triton.cdiv(rows, options["BLOCK_N"])
    if group_name or not contrast.fixed or 4 * blocks * rows > TRIANGLE_BYTES:
        return _contrast.sweep(contrast, *inverses, gradient=False)[:2]
    sums = torch.empty((blocks, rows), dtype=torch.float32, device=contrast.x.device)
    constants = {**_contrast.precision(contrast, target), "D": contrast.width}
    arguments = (contrast.x, inverse, rows, rows // 2, *contrast.scales, sums)
    _tl.launch(_triangle, (triton.cdiv(blocks, 2), blocks + 1), *arguments, **constants, **options)
    return None, sums


def _triangle_tile(contrast, target):
    """A square of products: smaller where the large ones are too few for the device, or would not fit into registers."""
    whole = contrast.x.dtype == torch.bfloat16
    large = (contrast.y.shape[0] // 128) ** 2 >= 4 * target.multiprocessors and (whole or target.capability >= (9, 0))
    block_k = min(64 if whole else 32, contrast.constants["BLOCK_D"])
    return {"BLOCK_N": 128 if large else 64, "BLOCK_K": block_k, "num_warps": 8 if large else 4, "num_stages": 2}


def _statistics(contrast, tops, sums):
    """(statistics [2N, 2] as ranks exchange them, 1 - probability of the positive [2N], losses [2N]) of the own rows."""
    rows = contrast.x.shape[0]
    statistics, losses = sums.new_empty((rows, 2)), sums.new_empty((rows,))
    misses, options = torch.empty_like(losses), _contrast.row_tile(contrast.width)
    arguments = (contrast.x, rows // 2, *contrast.scales, contrast.temperature * math.log(2), tops, sums, sums.shape[0])
    constants = {name: contrast.constants[name] for name in ("NORMALIZE", "FIXED", "D", "BLOCK_D")}
    grid = (triton.cdiv(rows, options["BLOCK_N"]),)
    _tl.launch(_outcomes, grid, *arguments, statistics, misses, losses, **constants, BLOCK_S=_contrast.BLOCK_S, **options)
    return statistics, misses, losses


def _gradient(contrast, inverse, statistics, misses, scale):
    x, target = contrast.x, _tl.target(contrast.x.device)
    options = _contrast.tile(contrast, target)
    rows, columns = x.shape[0] // 2, contrast.y.shape[0]
    programs, blocks = 2 * triton.cdiv(rows, options["BLOCK_N"]), triton.cdiv(columns, options["BLOCK_M"])
    splits = _tl.splits(programs, blocks, target)
    span = triton.cdiv(blocks, splits) * options["BLOCK_M"]
    o = statistics.new_empty((splits, *x.shape))
    memory = (x, contrast.y, inverse, *contrast.sizes[1:], *contrast.scales, span, statistics, misses, o)
    constants = {name: value for name, value in contrast.constants.items() if name != "VIEWS"}
    _tl.launch(_row_gradient, (programs, splits), *memory, **constants, **_contrast.precision(contrast, target), **options)
    return _projected(contrast, o, scale)


def _strip_gradient(contrast, inverse, statistics, misses, scale):
    """The gradient of rows too wide for a program: weights of a strip by a kernel, both products by torch."""
    x = contrast.x
    o = statistics.new_empty((1, *x.shape))
    own = contrast.of_rows(inverse)
    for begin, end, products in _strips.strips(contrast):
        weights = _strips.weights_like(products, contrast.y)
        memory = (products, own, inverse, *contrast.sizes[1:], begin, *contrast.scales[:2], statistics, misses, weights)
        options = _strips.run_of_columns(products)
        grid = (end - begin, triton.cdiv(products.shape[1], options["BLOCK_M"]))
        _tl.launch(_strip_weights, grid, *memory, NORMALIZE=contrast.normalize, **options)
        o[0, begin:end] = _strips.product(weights, contrast.y)
    return _projected(contrast, o, scale)


def _projected(contrast, o, scale):
    """(dz1, dz2) from the parts o [S, 2N, D] of the gradient of the unit rows."""
    parts, rows, width = o.shape
    dz1, dz2 = (o.new_empty((rows // 2, width)) for _ in range(2))
    constants = {name: contrast.constants[name] for name in ("NORMALIZE", "D", "BLOCK_D")}
    options = {"BLOCK_S": min(_contrast.BLOCK_S, parts), "num_warps": min(16, max(1, constants["BLOCK_D"] // 128))}
    _tl.launch(_merge_gradient, (rows,), contrast.x, o, parts, rows // 2, scale, dz1, dz2, **constants, **options)
    return dz1, dz2


@triton.jit
def _triangle(
    x_ptr, inverse_ptr, M, N, high, low, shift, sums_ptr,
    PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums of one tile (i, j >= i) over its columns, the part j of rows i, and over its rows, the part i of rows j.

    Two rows of the triangle, i and T - 1 - i, have T + 1 tiles together, for which there are T + 1 programs.
    """
    T = tl.cdiv(M, BLOCK_N)
    i, k = tl.program_id(0), tl.program_id(1)
    longer = k < T - i
    # the middle row of an odd number is its own partner
    if longer or 2 * i + 1 < T:
        j = tl.where(longer, i + k, k - 1)
        i = tl.where(longer, i, T - 1 - i)
        n, m = i * BLOCK_N + tl.arange(0, BLOCK_N), j * BLOCK_N + tl.arange(0, BLOCK_N)
        z, _ = _contrast.products(x_ptr, n, n < M, x_ptr, m, m < M, PRECISION, False, D, BLOCK_K)
        factor = _tl.divided(tl.load(inverse_ptr + n, mask=n < M, other=0.0), high, low)
        z = z * tl.load(inverse_ptr + m, mask=m < M, other=0.0)[None, :] * factor[:, None]
        other = tl.where(n < N, n + N, n - N)
        apart = (m[None, :] != n[:, None]) & (m[None, :] != other[:, None])
        e = tl.where(apart & (n < M)[:, None] & (m < M)[None, :], tl.exp2(z - shift), 0.0)
        tl.store(sums_ptr + j.to(tl.int64) * M + n, tl.sum(e, 1), mask=n < M)
        if i != j:
            tl.store(sums_ptr + i.to(tl.int64) * M + m, tl.sum(e, 0), mask=m < M)


@triton.jit
def _outcomes(
    x_ptr, N, high, low, shift, unit, tops_ptr, sums_ptr, parts, statistics_ptr, misses_ptr, losses_ptr,
    NORMALIZE: tl.constexpr, FIXED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Loss of each own row, 1 - p of its positive, and (top, sum) with p_j = exp((y_j - top)/temperature)/sum, the parts in their order.

    The sum is that of the exponentials under the shift which a reader makes of `top`, to the last bit.
    """
    R = 2 * N
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = _contrast.load_rows(x_ptr, n, n < R, D, BLOCK_D).to(tl.float32)
    y = _contrast.load_rows(x_ptr, tl.where(n < N, n + N, n - N), n < R, D, BLOCK_D).to(tl.float32)
    z = tl.sum(x * y, 1) * _contrast.inverse_of(y, NORMALIZE) * _tl.divided(_contrast.inverse_of(x, NORMALIZE), high, low)
    top = tl.full([BLOCK_N], shift if FIXED else _tl.LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, parts, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        mask, here = (s < parts)[:, None] & (n < R)[None, :], s.to(tl.int64)[:, None] * R + n[None, :]
        part = tl.load(sums_ptr + here, mask=mask, other=0.0)
        if not FIXED:
            tops = tl.load(tops_ptr + here, mask=mask, other=_tl.LOWEST)
            higher = tl.maximum(top, tl.max(tops, 0))
            sums = sums * tl.exp2(top - higher)
            part = part * tl.exp2(tops - higher[None, :])
            top = higher
        sums += tl.sum(part, 0)
    loss, _, miss = _contrast.outcome(z, top, sums)
    told = tl.zeros([BLOCK_N], tl.float32) + tl.where(unit > 0, 1.0, -1.0) if FIXED else tl.maximum(top, z) * unit
    read = _tl.divided(told, high, low)
    here = statistics_ptr + n.to(tl.int64) * 2
    tl.store(here, told, mask=n < R)
    tl.store(here + 1, sums * tl.exp2(top - read) + tl.exp2(z - read), mask=n < R)
    tl.store(misses_ptr + n, miss, mask=n < R)
    tl.store(losses_ptr + n, loss, mask=n < R)


@triton.jit
def _load_statistics(statistics_ptr, r, mask, high, low, shift, FIXED: tl.constexpr):
    """(top, rate) of rows r: their probabilities are 2**(logit - top) * rate; FIXED, top is the shift. Rate 0 where the mask is off."""
    here = statistics_ptr + r.to(tl.int64) * 2
    top = _tl.divided(tl.load(here, mask=mask, other=0.0), high, low)
    sums = tl.load(here + 1, mask=mask, other=1.0)
    rate = 1.0 / sums
    if FIXED:
        rate = rate * tl.exp2(shift - top)
        top = tl.zeros_like(top) + shift
    return top, tl.where(mask, rate, 0.0)


@triton.jit
def _row_gradient(
    x_ptr, y_ptr, inverse_ptr, N, M, first, high, low, shift, span, statistics_ptr, misses_ptr, o_ptr,
    NORMALIZE: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_j (p_ij + p_ji - 2 [j is the other view of i]) y_j/|y_j| of a block of own rows over one span of columns."""
    split = tl.program_id(1)
    r, valid, own, other = _contrast.block_of_rows(tl.program_id(0), N, first, BLOCK_N)
    factor = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORMALIZE:
        factor = tl.load(inverse_ptr + own, mask=valid, other=0.0)
    factor = _tl.divided(factor, high, low)
    top, rate = _load_statistics(statistics_ptr, own, valid, high, low, shift, FIXED)
    miss = tl.load(misses_ptr + r, mask=valid, other=0.0) + tl.load(misses_ptr + (other - first), mask=valid, other=0.0)
    if BLOCK_K == BLOCK_D:
        x = _contrast.operand(_contrast.load_rows(x_ptr, r, valid, D, BLOCK_D), x_ptr)
    o = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        if BLOCK_K == BLOCK_D:
            y = _contrast.operand(_contrast.load_rows(y_ptr, m, m < M, D, BLOCK_D), y_ptr)
            z = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            z, _ = _contrast.products(x_ptr, r, valid, y_ptr, m, m < M, PRECISION, False, D, BLOCK_K)
        inverse = tl.full([BLOCK_M], 1.0, tl.float32)
        if NORMALIZE:
            inverse = tl.load(inverse_ptr + m, mask=m < M, other=0.0)
        its_top, its_rate = _load_statistics(statistics_ptr, m, m < M, high, low, shift, FIXED)
        z = z * inverse[None, :] * factor[:, None]
        if FIXED:
            w = tl.exp2(z - shift) * (rate[:, None] + its_rate[None, :])
        else:
            # of what is no pair of negatives, the exponential may be infinite
            there = (m[None, :] != own[:, None]) & (m[None, :] != other[:, None]) & (m < M)[None, :]
            z = tl.where(there, z, float("-inf"))
            w = tl.exp2(z - top[:, None]) * rate[:, None] + tl.exp2(z - its_top[None, :]) * its_rate[None, :]
        w = tl.where(m[None, :] == other[:, None], -miss[:, None], tl.where(m[None, :] == own[:, None], 0.0, w))
        if BLOCK_K < BLOCK_D:
            y = _contrast.operand(_contrast.load_rows(y_ptr, m, m < M, D, BLOCK_D), y_ptr)
        o = tl.dot(_contrast.operand(w * inverse[None, :], y_ptr), y, o, input_precision=PRECISION)
    _contrast.store_rows(o_ptr + split.to(tl.int64) * (2 * N) * D, r, valid, o, D, BLOCK_D)


@triton.jit
def _strip_weights(
    s_ptr, x_inverse_ptr, y_inverse_ptr, N, M, first, begin, high, low, statistics_ptr, misses_ptr, w_ptr,
    NORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What `_row_gradient` weighs columns by, 1/|y| included, of one row of a strip of products at a run of columns."""
    row = begin + tl.program_id(0)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    z, own, other = _strips.strip_logits(s_ptr, x_inverse_ptr, y_inverse_ptr, None, N, M, first, begin, high, low, m, 2, NORMALIZE)
    top, rate = _load_statistics(statistics_ptr, first + row, row < 2 * N, high, low, 0.0, False)
    its_top, its_rate = _load_statistics(statistics_ptr, m, m < M, high, low, 0.0, False)
    w = tl.exp2(z - top) * rate + tl.exp2(z - its_top) * its_rate
    w = tl.where(m == other, -tl.load(misses_ptr + row) - tl.load(misses_ptr + (other - first)), w)
    if NORMALIZE:
        w = w * tl.load(y_inverse_ptr + m, mask=m < M, other=0.0)
    tl.store(w_ptr + tl.program_id(0).to(tl.int64) * M + m, w.to(w_ptr.dtype.element_ty), mask=m < M)


@triton.jit
def _merge_gradient(
    x_ptr, o_ptr, parts, N, scale, dz1_ptr, dz2_ptr,
    NORMALIZE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dz of one own row from the parts of its sum, in their order."""
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    o = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, parts, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        here = (s.to(tl.int64) * (2 * N) + row)[:, None] * D + d[None, :]
        o += tl.sum(tl.load(o_ptr + here, mask=(s < parts)[:, None] & (d < D)[None, :], other=0.0), 0)
    n = row + tl.arange(0, 1)
    x = _contrast.load_rows(x_ptr, n, n < 2 * N, D, BLOCK_D).to(tl.float32)
    dz = _contrast.projected(o[None, :] * scale, x, NORMALIZE)
    _contrast.store_rows(tl.where(row >= N, dz2_ptr, dz1_ptr), n - tl.where(row >= N, N, 0), n < 2 * N, dz, D, BLOCK_D)
