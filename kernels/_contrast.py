"""How do Triton kernels compare rows with rows? For every op whose loss is a softmax over products of rows."""

import math
from dataclasses import dataclass

import torch

from fuseer.kernels import _tl
from fuseer.kernels._tl import tl, triton

# widest rows whose gradient a program holds in registers; above, _strips.py
FUSED_D = 256
# widest row that a program holds at all, 32 values a thread in 16 warps
WIDEST_D = 16384
# normalised rows have logits in +-1/temperature; where the ends are this near, float32 holds every exponential under one shift
FIXED_RANGE = 85.0
# norms are clamped here, as torch.nn.functional.normalize does
SHORTEST = tl.constexpr(1e-12)
BLOCK_S = 16


@dataclass(frozen=True)
class Contrast:
    """Rows x [V N, D] against columns y [M, D], all dense. Logits, to the base 2: <x_n, y_m>/temperature/ln 2, of unit rows if `normalize`.

    What a row is not compared with: V = 2 views of N rows each, which are columns first, first + 1, ..., leave out their own column
    and that of their other view; a single view leaves out column index[n], where there is an index.
    """

    x: torch.Tensor
    y: torch.Tensor
    temperature: float
    normalize: bool
    views: int = 1
    first: int = 0
    index: torch.Tensor | None = None

    @property
    def width(self):
        return self.x.shape[1]

    @property
    def fixed(self):
        """Whether one shift, 1/|temperature|, serves all rows; otherwise each has its maximum."""
        return self.normalize and 2 / abs(self.temperature) < FIXED_RANGE

    @property
    def scales(self):
        """log2(e)/temperature in two floats, and the shift."""
        high, low = _tl.inverse(abs(self.temperature) * math.log(2))
        sign = math.copysign(1.0, self.temperature)
        return sign * high, sign * low, high + low

    @property
    def sizes(self):
        """The kernels' arguments about rows and columns."""
        return self.index, self.x.shape[0] // self.views, self.y.shape[0], self.first

    def of_rows(self, columns):
        """The part of a vector over columns that is about the rows, which are columns too; None of None."""
        return columns if columns is None else columns[self.first : self.first + self.x.shape[0]]

    @property
    def constants(self):
        wide = {"D": self.width, "BLOCK_D": max(16, _tl.power_of_two(self.width))}
        return {"VIEWS": self.views, "NORMALIZE": self.normalize, "FIXED": self.fixed, **wide}


def refusal(**tensors):
    """Why these rows cannot be compared here, in words; None where they can."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dim() == 2 and tensor.shape[1] > WIDEST_D:
            return f"a program holds rows of up to {WIDEST_D} values and {name} are {list(tensor.shape)}"
    return _tl.refusal(**tensors)


def fills(contrast, target):
    """Whether tiles of 128 rows and 64 columns, in runs worth a program, are enough for all multiprocessors."""
    return contrast.x.shape[0] * contrast.y.shape[0] >= 128 * 64 * _tl.BLOCKS_A_SPLIT * target.multiprocessors


def precision(contrast, target):
    """How tl.dot multiplies float32: as six products of bfloat16 or three of TF32, and float16 made float32, which TF32 holds, as one.

    Both are as exact as float32; six are the faster on sm_90 where tiles are large, three where they are small.
    """
    if torch.version.hip:
        return {"PRECISION": "ieee"}
    if contrast.x.dtype != torch.float32:
        return {"PRECISION": "tf32"}
    six = target.capability[0] == 9 and contrast.width <= 128 and fills(contrast, target)
    return {"PRECISION": "bf16x6" if six else "tf32x3"}


def tile(contrast, target):
    """Rows and columns of a product and how the kernels go about it: what registers hold, and 99 KiB of shared memory.

    Narrow rows of bfloat16 are kept whole. The parts of a product of float32 would not leave registers for that: there, and where rows
    are wide, a product is summed over BLOCK_K at a time, and columns are loaded again, from the cache, to be summed. Small tiles are
    for those who would not fill the device with large ones. Measured on an H100, docs/gpu.md.
    """
    wide, full = contrast.width > 128, fills(contrast, target)
    if contrast.x.dtype == torch.bfloat16:
        narrow = (128, 64 if target.capability >= (9, 0) else 32, 128, 8)
        block_n, block_m, block_k, warps = (64, 32, 64, 8) if wide else narrow
    elif wide:
        block_n, block_m, block_k, warps = (32, 16, 32, 4) if full else (16, 32, 32, 4)
    elif full and target.capability[0] == 9:
        # 32 at a time cost 33 spills, and are a quarter faster on an H100 than what has none
        block_n, block_m, block_k, warps = 128, 64, 32 if contrast.x.dtype == torch.float32 else 16, 8
    else:
        block_n, block_m, block_k, warps = (64, 32, 16, 4) if full else (32, 32, 32, 4)
    block_k = min(block_k, contrast.constants["BLOCK_D"])
    return {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 2}


def row_tile(width):
    """How many whole rows of that width a program holds, 16 values a thread in 4 warps or more, and its warps."""
    block_d = max(16, _tl.power_of_two(width))
    return {"BLOCK_N": max(1, 2048 // block_d), "num_warps": min(16, max(4, block_d // 1024))}


def inverse_norms(x, normalize):
    """1/max(|row|, 1e-12) of every row, [N]; None without `normalize`."""
    if not normalize:
        return None
    inverse, options = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device), row_tile(x.shape[1])
    wide = {"D": x.shape[1], "BLOCK_D": max(16, _tl.power_of_two(x.shape[1]))}
    _tl.launch(_inverse_norms, (triton.cdiv(x.shape[0], options["BLOCK_N"]),), x, inverse, x.shape[0], **wide, **options)
    return inverse


def total(losses, scale, counted=None):
    """scale * counted * sum of the losses, in a fixed order; `counted` is a scalar on the device, 1 where it is None."""
    loss = losses.new_empty(())
    _tl.launch(_total, (1,), losses, scale, counted, loss, losses.shape[0], BLOCK_N=1024, num_warps=4)
    return loss


def sweep(contrast, x_inverse, y_inverse, gradient):
    """(tops or None, sums) [S, V N] of 2**(logit - top) over S spans of columns and, where asked for, those sums of y/|y|, [S, V N, D].

    x_inverse, y_inverse: the inverse norms of rows and columns; those of columns are found on the way where they are None.
    """
    x, target = contrast.x, _tl.target(contrast.x.device)
    options = tile(contrast, target)
    if contrast.normalize and y_inverse is None and x.dtype != torch.bfloat16 and target.capability < (9, 0):
        # where tensor cores add up in registers, none are left for the norms
        options["BLOCK_M"] = max(16, options["BLOCK_M"] // 2)
    rows, columns = x.shape[0] // contrast.views, contrast.y.shape[0]
    programs, blocks = contrast.views * triton.cdiv(rows, options["BLOCK_N"]), triton.cdiv(columns, options["BLOCK_M"])
    splits = _tl.splits(programs, blocks, target)
    span = triton.cdiv(blocks, splits) * options["BLOCK_M"]
    sums = torch.empty((splits, x.shape[0]), dtype=torch.float32, device=x.device)
    tops = None if contrast.fixed else torch.empty_like(sums)
    o = sums.new_empty((*sums.shape, contrast.width)) if gradient else None
    arguments = (x, contrast.y, x_inverse, y_inverse, *contrast.sizes, *contrast.scales, span, tops, sums, o)
    _tl.launch(_sweep, (programs, splits), *arguments, **contrast.constants, **precision(contrast, target), **options)
    return tops, sums, o


@triton.jit
def operand(x, rows_ptr):
    """x as a factor beside rows of rows_ptr: bfloat16 beside bfloat16, else float32. The interpreter multiplies no bfloat16."""
    if rows_ptr.dtype.element_ty == tl.bfloat16:
        x = x.to(tl.bfloat16)
        if _tl.IN_PYTHON:
            x = x.to(tl.float32)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def load_rows(x_ptr, r, mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows r of a dense matrix as they are; 0 where the mask is off and from column D on."""
    d = tl.arange(0, BLOCK_D)
    pointers = x_ptr + r.to(tl.int64)[:, None] * D + d[None, :]
    if D == BLOCK_D:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    return tl.load(pointers, mask=mask[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(x_ptr, r, mask, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    pointers = x_ptr + r.to(tl.int64)[:, None] * D + d[None, :]
    if D == BLOCK_D:
        tl.store(pointers, x, mask=mask[:, None])
    else:
        tl.store(pointers, x, mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def inverse_root(squares, NORMALIZE: tl.constexpr):
    """1/max(sqrt(squares), 1e-12); 1 without NORMALIZE. Rounded to nearest: the temperature multiplies its error."""
    one = tl.full(squares.shape, 1.0, tl.float32)
    return tl.div_rn(one, tl.maximum(tl.sqrt_rn(squares), SHORTEST)) if NORMALIZE else one


@triton.jit
def inverse_of(x, NORMALIZE: tl.constexpr):
    """1/max(|row|, 1e-12) of each float32 row; 1 without NORMALIZE."""
    return inverse_root(tl.sum(x * x, 1), NORMALIZE)


@triton.jit
def projected(g, x, NORMALIZE: tl.constexpr):
    """The gradient of float32 rows x, g that of x/max(|x|, 1e-12); a norm below the clamp is a constant."""
    if NORMALIZE:
        squares = tl.sum(x * x, 1)
        inverse = inverse_root(squares, NORMALIZE)
        unit = x * inverse[:, None]
        along = tl.where(tl.sqrt_rn(squares) >= SHORTEST, tl.sum(g * unit, 1), 0.0)
        g = (g - unit * along[:, None]) * inverse[:, None]
    return g


@triton.jit
def outcome(z, top, sums):
    """(loss in nats, share, miss) of a row: positive logit z, sums = sum of 2**(logit - top) over the negatives; all to the base 2.

    p_m = 2**(logit - top) * share; miss = 1 - p of the positive. The loss is log(1 + 2**d), d = log2 sum + top - z, and both
    keep their digits where they are small.
    """
    LN2: tl.constexpr = 0.6931471805599453
    d = tl.log2(sums) + (top - z)
    small = tl.exp2(-tl.abs(d))
    grown = 1.0 + small
    # log(1 + x) = log(u) x/(u - 1), u = 1 + x rounded; without negatives d = -inf, small and the loss are 0
    log = tl.where(grown == 1.0, small, tl.log(grown) * (small / tl.where(grown == 1.0, 1.0, grown - 1.0)))
    miss = tl.where(d > 0, 1.0, small) / grown
    return tl.maximum(d, 0.0) * LN2 + log, tl.where(sums > 0, miss / tl.where(sums > 0, sums, 1.0), 0.0), miss


@triton.jit
def scaled(x, scale, counted_ptr):
    x = x * scale
    if counted_ptr is not None:
        x = x * tl.load(counted_ptr)
    return x


@triton.jit
def block_of_rows(pid, N, first, BLOCK_N: tl.constexpr):
    """(row of the first, rows in the view, whether they are, own column, column of the other view); no block is of two views."""
    blocks = tl.cdiv(N, BLOCK_N)
    view = pid // blocks
    n = (pid - view * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    return view * N + n, n < N, first + view * N + n, first + (1 - view) * N + n


@triton.jit
def _inverse_norms(x_ptr, inverse_ptr, N, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(inverse_ptr + n, inverse_of(load_rows(x_ptr, n, n < N, D, BLOCK_D).to(tl.float32), True), mask=n < N)


@triton.jit
def _total(losses_ptr, scale, counted_ptr, loss_ptr, N, BLOCK_N: tl.constexpr):
    """loss = scale * sum of the losses, in a fixed order."""
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        total += tl.load(losses_ptr + n, mask=n < N, other=0.0)
    tl.store(loss_ptr, scaled(tl.sum(total, 0), scale, counted_ptr))


@triton.jit
def products(
    x_ptr, r, valid, y_ptr, m, there, PRECISION: tl.constexpr, SQUARES: tl.constexpr, D: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """(<x_r, y_m> [r, m], <y_m, y_m> [m] with SQUARES), BLOCK_K of D at a time."""
    z = tl.zeros([r.shape[0], m.shape[0]], tl.float32)
    squares = tl.zeros([m.shape[0]], tl.float32)
    x_rows, y_rows = x_ptr + r.to(tl.int64)[:, None] * D, y_ptr + m.to(tl.int64)[:, None] * D
    for start in range(0, D, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)[None, :]
        if D % BLOCK_K == 0:
            x, y = tl.load(x_rows + d, mask=valid[:, None], other=0.0), tl.load(y_rows + d, mask=there[:, None], other=0.0)
        else:
            x = tl.load(x_rows + d, mask=valid[:, None] & (d < D), other=0.0)
            y = tl.load(y_rows + d, mask=there[:, None] & (d < D), other=0.0)
        if SQUARES:
            squares += tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
        z = tl.dot(operand(x, x_ptr), tl.trans(operand(y, y_ptr)), z, input_precision=PRECISION)
    return z, squares


@triton.jit
def _sweep(
    x_ptr, y_ptr, x_inverse_ptr, y_inverse_ptr, index_ptr, N, M, first, high, low, shift, span, tops_ptr, sums_ptr, o_ptr,
    VIEWS: tl.constexpr, NORMALIZE: tl.constexpr, FIXED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maxima, sums and, where there is memory for them, weighted sums of columns for a block of rows over one span of columns."""
    split = tl.program_id(1)
    r, valid, own, other = block_of_rows(tl.program_id(0), N, first, BLOCK_N)
    factor = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORMALIZE:
        factor = tl.load(x_inverse_ptr + r, mask=valid, other=0.0)
    factor = _tl.divided(factor, high, low)
    if BLOCK_K == BLOCK_D:
        x = operand(load_rows(x_ptr, r, valid, D, BLOCK_D), x_ptr)
    if index_ptr is not None:
        own = tl.load(index_ptr + r, mask=valid, other=-1).to(tl.int32)
    top = tl.full([BLOCK_N], shift if FIXED else _tl.LOWEST, tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    o = tl.zeros([BLOCK_N if o_ptr is not None else 1, BLOCK_D], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        there = m < M
        if BLOCK_K == BLOCK_D:
            y = load_rows(y_ptr, m, there, D, BLOCK_D)
            squares = tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
            y = operand(y, y_ptr)
            z = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            z, squares = products(x_ptr, r, valid, y_ptr, m, there, PRECISION, NORMALIZE and y_inverse_ptr is None, D, BLOCK_K)
        inverse = inverse_root(squares, NORMALIZE) if y_inverse_ptr is None else tl.load(y_inverse_ptr + m, mask=there, other=0.0)
        z = z * inverse[None, :] * factor[:, None]
        compared = (m < M)[None, :]
        if VIEWS == 2:
            compared = compared & (m[None, :] != own[:, None]) & (m[None, :] != other[:, None])
        elif index_ptr is not None:
            compared = compared & (m[None, :] != own[:, None])
        z = tl.where(compared, z, float("-inf"))
        if not FIXED:
            higher = tl.maximum(top, tl.max(z, 1))
            sums = sums * tl.exp2(top - higher)
            if o_ptr is not None:
                o = o * tl.exp2(top - higher)[:, None]
            top = higher
        e = tl.exp2(z - top[:, None])
        sums += tl.sum(e, 1)
        if o_ptr is not None:
            if BLOCK_K < BLOCK_D:
                y = operand(load_rows(y_ptr, m, there, D, BLOCK_D), y_ptr)
            o = tl.dot(operand(e * inverse[None, :], y_ptr), y, o, input_precision=PRECISION)
    here = split * (VIEWS * N) + r
    if not FIXED:
        tl.store(tops_ptr + here, top, mask=valid)
    tl.store(sums_ptr + here, sums, mask=valid)
    if o_ptr is not None:
        store_rows(o_ptr, here, valid, o, D, BLOCK_D)
