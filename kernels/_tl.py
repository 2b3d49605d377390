"""What do all Triton backends share: the guard, the device, the launch, the loads?"""

import math
from typing import NamedTuple

import numpy as np
import torch


class _Absent:
    """Stands where triton cannot be imported: kernels can be defined all the same, and `refusal` keeps them from running."""

    @staticmethod
    def jit(function):
        return function

    @staticmethod
    def constexpr(value):
        return value


def _imported():
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        return _Absent, _Absent, f"triton cannot be imported ({error}); on Linux, pip install triton"
    return triton, tl, None


triton, tl, REASON = _imported()

# below every finite score, and finite: the difference of two of them is 0, where that of two infinities has no value
LOWEST = tl.constexpr(-3.4028234663852886e38)
GRID_LIMIT = 65535
# fewer blocks of columns than this are not worth a program of their own and the launch that merges its result
BLOCKS_A_SPLIT = 8
# columns of a token that a program takes at once
TOKEN_COLUMNS = 1024


class Target(NamedTuple):
    """What the host code may know of a device; capability (0, 0) is one without thread block clusters."""

    capability: tuple
    multiprocessors: int


def target(device):
    """The Target of `device`: the one place where the host code asks; the interpreter counts as two multiprocessors."""
    if INTERPRETED:
        return Target((0, 0), 2)
    properties = torch.cuda.get_device_properties(device)
    return Target((0, 0) if torch.version.hip else (properties.major, properties.minor), properties.multi_processor_count)


def refusal(**tensors):
    """Why Triton does not take these tensors (None stands for an absent one), in words; None where it does."""
    if REASON is not None:
        return REASON
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device.type != "cuda" and not (INTERPRETED and tensor.device.type == "cpu"):
            return f"{name} is on {tensor.device.type}, not on a CUDA device"
        if tensor.dtype == torch.float64:
            return f"its arithmetic is float32 and {name} is float64"
    return None


def refusal_of_lists(**lists):
    """Why Triton does not take these lists of tensors, all on one device, in words; None where it does."""
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if i == 0 or x.dtype == torch.float64:
                reason = refusal(**{f"{name}[{i}]": x})
                if reason is not None:
                    return reason
    return None


def launch(kernel, grid, *args, **options):
    """kernel[grid](*args, **options), or nothing where the grid is empty."""
    if all(grid):
        kernel[grid](*args, **options)


def splits(rows, blocks, target):
    """Over how many programs the `blocks` of columns of a row are split: a power of two, for two programs a multiprocessor."""
    return 1 << max(0, min(2 * target.multiprocessors // max(1, rows), blocks // BLOCKS_A_SPLIT, 64).bit_length() - 1)


def inverse(x):
    """1/x in two floats, high + low, low > 0: one alone is off by 3e-8, which scores of 100 turn into 1e-4 of a code.

    high is rounded towards 0 and low kept above it, so that an infinite score times either is that infinity, never NaN.
    """
    high = np.float32(1 / x)
    if float(high) > 1 / x:
        high = np.nextafter(high, np.float32(0))
    return float(high), max(1 / x - float(high), 1e-37)


def two_floats(x):
    """x as high + low, exactly as two floats can: low is 0 where one is enough."""
    high = float(np.float32(x))
    return high, x - high


def power_of_two(n):
    """The least power of two >= n, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def unit(*numbers):
    """The largest power of two up to 16 that divides all numbers: what is passed in units of it is known to be divisible."""
    return math.gcd(16, *numbers)


class Listed(NamedTuple):
    """Matrices [N, K] of one shape, wherever each lies, as kernels take them: a pointer and strides for each, beside the scalars.

    No table is made in memory: what is launched holds the pointers, in a CUDA graph too. Row strides come in units of `unit`, which
    divides them and K; `align` divides the address of every row, in bytes.
    """

    pointers: tuple
    rows: tuple
    columns: tuple
    unit: int
    contiguous: bool
    align: int

    @classmethod
    def of(cls, tensors, *others):
        """Of `tensors`, in a unit and an alignment that are those of `others` too."""
        every = (*tensors, *others)
        contiguous = all(x.stride(1) == 1 for x in every)
        step = unit(every[0].shape[1], *(x.stride(0) for x in every)) if contiguous else 1
        align = math.gcd(16, step * every[0].element_size(), *(x.data_ptr() for x in every))
        rows, columns = (tuple(x.stride(axis) for x in tensors) for axis in (0, 1))
        return cls(tuple(tensors), tuple(row // step for row in rows), columns, step, contiguous, align)


def tiles_of_tokens(x, tile):
    """Kernels' arguments about tokens [B, N, D], strides and D in UNITs, and their constants: blocks of `tile` numbers in all."""
    D, contiguous = x.shape[2], x.stride(2) == 1
    step = unit(D, x.stride(0), x.stride(1)) if contiguous else 1
    block_d = min(TOKEN_COLUMNS, power_of_two(D))
    constants = {"CONTIGUOUS": contiguous, "UNIT": step, "BLOCK_N": min(16, tile // block_d), "BLOCK_D": block_d, "num_warps": 4}
    return (x, x.stride(0) // step, x.stride(1) // step, x.stride(2), D // step), constants


@triton.jit
def token_offsets(x_image, x_row, x_column, b, n, d, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr):
    """Where columns d of tokens n of images b are, as `tiles_of_tokens` describes them; n, or b too, are many."""
    columns = d if CONTIGUOUS else d.to(tl.int64) * x_column
    rows = b.to(tl.int64) * x_image * UNIT + n.to(tl.int64) * x_row * UNIT
    return rows[:, None] + columns[None, :]


@triton.jit
def chosen(values, number):
    """values[number] of a tuple by choices, for a number or numbers known when it runs; values[0] beyond its end."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(number == i, values[i], found)
    return found


@triton.jit
def divided(x, high, low):
    """x * (high + low), rounded once."""
    return tl.fma(x, high, x * low)


@triton.jit
def logits(x, v, high, low):
    """x * (high + low) + v; the large terms, which may cancel, meet first and unrounded."""
    return tl.fma(x, low, tl.fma(x, high, v))


@triton.jit
def run_of_rows(run, each, Q, R):
    """First row of a run and the row after its last: each segment, queue and own rows, is cut into runs of `each` rows."""
    queue_runs = tl.cdiv(Q, each)
    start = tl.where(run < queue_runs, run * each, Q + (run - queue_runs) * each)
    return start, tl.minimum(start + each, tl.where(run < queue_runs, Q, R))


@triton.jit
def row_pointers(
    x_ptr, x_head, x_row, queue_ptr, queue_row, Q, head, r, stored,
    ALIGN: tl.constexpr, QUEUE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where row or rows r of one head begin: in its queue where they are `stored`, else among its own.

    Heads are x_head apart, or with ALIGN listed: tuples of a pointer and a stride for each, ALIGN dividing the address of every row.
    Strides come in UNITs, so that the compiler knows what divides them; `stored` is one for all r, because a choice row by row
    hides the alignment of the pointers from it. Offsets are 64 bits wide.
    """
    place = (r - tl.where(stored, 0, Q)).to(tl.int64)
    if ALIGN is None:
        rows = x_ptr + head.to(tl.int64) * x_head * UNIT + place * x_row * UNIT
    else:
        base, stride = chosen(x_ptr, head), chosen(x_row, head)
        if QUEUE:
            base = tl.where(stored, chosen(queue_ptr, head), base)
            stride = tl.where(stored, chosen(queue_row, head), stride)
        rows = tl.multiple_of(base + place * stride * UNIT, ALIGN)
    return rows


@triton.jit
def column_offsets(
    x_column, queue_column, head, stored, k, ALIGN: tl.constexpr, QUEUE: tl.constexpr, CONTIGUOUS: tl.constexpr
):  # fmt: skip
    """How far columns k are from the beginning of their row, in one head's queue or among its own rows."""
    offsets = k
    if not CONTIGUOUS:
        column = x_column
        if ALIGN is not None:
            column = chosen(x_column, head)
            if QUEUE:
                column = tl.where(stored, chosen(queue_column, head), column)
        offsets = k.to(tl.int64) * column
    return offsets


@triton.jit
def load_row(
    x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, head, r, k, K,
    ALIGN: tl.constexpr, QUEUE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Columns k [BLOCK_K] of row r in float32; -inf beyond K."""
    row = row_pointers(x_ptr, x_head, x_row, queue_ptr, queue_row, Q, head, r, r < Q, ALIGN, QUEUE, UNIT)
    k_offset = column_offsets(x_column, queue_column, head, r < Q, k, ALIGN, QUEUE, CONTIGUOUS)
    return tl.load(row + k_offset, mask=k < K, other=float("-inf")).to(tl.float32)


@triton.jit
def load_tile(
    x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, head, start, stop, k, K,
    ALIGN: tl.constexpr, QUEUE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns k [BLOCK_K] of rows start, start + 1, ... of one segment in float32, [BLOCK_N, BLOCK_K]; -inf from `stop` and K on."""
    r, stored = start + tl.arange(0, BLOCK_N), start < Q
    rows = row_pointers(x_ptr, x_head, x_row, queue_ptr, queue_row, Q, head, r, stored, ALIGN, QUEUE, UNIT)
    k_offset = column_offsets(x_column, queue_column, head, stored, k, ALIGN, QUEUE, CONTIGUOUS)
    mask = (r < stop)[:, None] & (k < K)[None, :]
    return tl.load(rows[:, None] + k_offset[None, :], mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def merged(one, other, z_high, z_low, q_high, q_low):
    """Two runs of columns in one state (z, sum_z, (q, ...), (sum_q, ...), (dot, ...)) of a cross-entropy between rows.

    z, the maximum of a row of logits; sum_z = sum exp((logit - z) * (z_high + z_low)); q and sum_q, the same of each target's
    logits with q_high + q_low; dot = sum of (logit - z) * (z_high + z_low) times the target's exponential. Every term of sum and
    dot has one sign, so that nothing cancels. z, sum_z and dot may be tensors over logit rows.
    """
    z = tl.maximum(one[0], other[0])
    # a run without columns has z = LOWEST and sums of 0, and 0 times an infinite shift has no value
    one_shift = tl.where(one[1] == 0, 0.0, divided(one[0] - z, z_high, z_low))
    other_shift = tl.where(other[1] == 0, 0.0, divided(other[0] - z, z_high, z_low))
    sum_z = one[1] * tl.exp(one_shift) + other[1] * tl.exp(other_shift)
    tops, sums, dots = (), (), ()
    for a in tl.static_range(len(one[2])):
        q = tl.maximum(one[2][a], other[2][a])
        one_weight = tl.exp(divided(one[2][a] - q, q_high, q_low))
        other_weight = tl.exp(divided(other[2][a] - q, q_high, q_low))
        dot = one_weight * (one[4][a] + one[3][a] * one_shift) + other_weight * (other[4][a] + other[3][a] * other_shift)
        tops = tops + (q,)
        sums = sums + (one[3][a] * one_weight + other[3][a] * other_weight,)
        dots = dots + (dot,)
    return z, sum_z, tops, sums, dots


# kernels decorated under TRITON_INTERPRET=1 run on the CPU, in Python
INTERPRETED = REASON is None and not isinstance(load_row, triton.runtime.JITFunction)
IN_PYTHON = tl.constexpr(INTERPRETED)
