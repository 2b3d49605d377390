"""When and how does swapped_prediction run on Triton? Any strides are read in place; the codes are never in memory."""

import torch

from fuseer.kernels import _potentials, _tl
from fuseer.kernels._tl import tl, triton

# every assign crop is a branch of the kernels, in registers
ASSIGN_LIMIT = 8
TILE = 4096
BLOCK_B = 1024


def unsupported(scores, queue_scores, assign, epsilon, iterations, temperature, group_name):
    if len(assign) > ASSIGN_LIMIT:
        return f"it takes at most {ASSIGN_LIMIT} assign crops and assign has {len(assign)}"
    return _tl.refusal(scores=scores[0], queue_scores=queue_scores[0] if queue_scores else None)


def forward(scores, queue_scores, assign, epsilon, iterations, temperature, group_name):
    """loss, potentials [A, K], statistics [V + A, B, 2], scale, as reference.py says.

    Reads of the scores: len(assign) rows a sample for each of `iterations` (twice that, less one, where rows are too wide for a
    program), then the V student and len(assign) target rows once. The queue is read for the potentials alone.
    """
    crops, queue = _potentials.matrices(scores), _potentials.matrices(queue_scores)
    V, (B, K), A, assign = len(crops), crops[0].shape, len(assign), tuple(assign)
    with torch.cuda.device_of(scores[0]):
        rows = _potentials.Rows([crops[i] for i in assign], queue)
        v, (count, ranks) = _potentials.potentials(rows, epsilon, iterations, group_name, (B, 1))
        scale = v.new_full((), ranks / max(1, count)) if not group_name else ranks / count.clamp(min=1)
        statistics, losses = v.new_empty((V + A, B, 2)), v.new_empty((B,))
        (memory, layout), options = _memory(scores), _blocks(V, K)
        blocks = triton.cdiv(K, options["BLOCK_K"])
        splits = _tl.splits(B, blocks, _tl.target(scores[0].device))
        span = triton.cdiv(blocks, splits) * options["BLOCK_K"]
        inverses = (*_tl.inverse(temperature), *_tl.inverse(epsilon))
        state = v.new_empty((B, splits, A * (options["BLOCK_V"] + 2) + 2 * options["BLOCK_V"]) if splits > 1 else (0,))
        arguments = (*memory, v, *inverses, state, statistics, losses, span)
        _tl.launch(_sweep, (B, splits), *arguments, **layout, **options, ASSIGN=assign, V=V, SPLITS=splits)
        if splits > 1:
            arguments = (state, statistics, losses, B, *inverses[:2])
            _tl.launch(_merge_splits, (B,), *arguments, ASSIGN=assign, V=V, SPLITS=splits, BLOCK_V=options["BLOCK_V"], num_warps=1)
        loss = v.new_empty(())
        _tl.launch(_total, (1,), losses, scale, loss, B, TERMS=A * (V - 1), BLOCK_B=BLOCK_B, num_warps=4)
    return loss, v, statistics, scale


def backward(dloss, scores, potentials, statistics, scale, assign, epsilon, temperature):
    """dscores [V, B, K]. One read of every student and target row, one write; dloss stays on the device."""
    V, B, K = scores[0].shape if len(scores) == 1 else (len(scores), *scores[0].shape)
    dscores = scores[0].new_empty((V, B, K))
    (memory, layout), options = _memory(scores), _blocks(V, K)
    with torch.cuda.device_of(scores[0]):
        grid = (B, triton.cdiv(K, options["BLOCK_K"]))
        inverses = (*_tl.inverse(temperature), *_tl.inverse(epsilon))
        arguments = (*memory, potentials, *inverses, statistics, scale, dloss, dscores)
        _tl.launch(_gradient, grid, *arguments, **layout, **options, ASSIGN=tuple(assign), V=V)
    return dscores


def _memory(scores):
    """The kernels' arguments and constants about memory: one tensor [V, B, K], or a pointer and strides for each crop."""
    B, K = scores[0].shape[-2:]
    if len(scores) > 1:
        listed = _tl.Listed.of(scores)
        places, unit = (listed.pointers, 0, listed.rows, listed.columns), listed.unit
        layout = {"ALIGN": listed.align, "CONTIGUOUS": listed.contiguous, "UNIT": unit}
    else:
        crop, row, column = scores[0].stride()
        unit = _tl.unit(K, crop, row) if column == 1 else 1
        places = scores[0], crop // unit, row // unit, column
        layout = {"ALIGN": None, "CONTIGUOUS": column == 1, "UNIT": unit}
    return (*places, B, K // unit), layout


def _blocks(crops, k):
    """All crops of a sample at a run of columns: 32 values a thread."""
    block_v = _tl.power_of_two(crops)
    return {"BLOCK_V": block_v, "BLOCK_K": min(_tl.power_of_two(k), max(16, TILE // block_v)), "num_warps": 4}


@triton.jit
def _load_students(
    x_ptr, x_crop, x_row, x_column, b, k, K,
    V: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Every crop's row of sample b at columns k, [BLOCK_V, BLOCK_K] in float32; -inf beyond V and K."""
    crop = tl.arange(0, BLOCK_V)
    if ALIGN is None:
        rows = (x_ptr + b.to(tl.int64) * x_row * UNIT + crop.to(tl.int64) * x_crop * UNIT)[:, None]
    else:
        rows = tl.multiple_of(_tl.chosen(x_ptr, crop) + b.to(tl.int64) * _tl.chosen(x_row, crop) * UNIT, ALIGN)[:, None]
    if CONTIGUOUS:
        pointers = rows + k[None, :]
    elif ALIGN is None:
        pointers = rows + (k.to(tl.int64) * x_column)[None, :]
    else:
        pointers = rows + k.to(tl.int64)[None, :] * _tl.chosen(x_column, crop)[:, None]
    return tl.load(pointers, mask=(crop < V)[:, None] & (k < K)[None, :], other=float("-inf")).to(tl.float32)


@triton.jit
def _load_target(
    x_ptr, x_crop, x_row, x_column, v_ptr, high, low, b, k, K, a,
    crop: tl.constexpr, ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """scores/epsilon + potentials of sample b's row in the a-th assign crop at columns k, in float32; -inf beyond K."""
    v = tl.load(v_ptr + tl.full((), a, tl.int64) * K + k, mask=k < K, other=0.0)
    if ALIGN is None:
        row = x_ptr + b.to(tl.int64) * x_row * UNIT + tl.full((), crop, tl.int64) * x_crop * UNIT
        column = x_column
    else:
        row = tl.multiple_of(x_ptr[crop] + b.to(tl.int64) * x_row[crop] * UNIT, ALIGN)
        column = x_column[crop]
    k_offset = k if CONTIGUOUS else k.to(tl.int64) * column
    x = tl.load(row + k_offset, mask=k < K, other=float("-inf")).to(tl.float32)
    return _tl.logits(x, v, high, low)


@triton.jit
def _nothing(ASSIGN: tl.constexpr, BLOCK_V: tl.constexpr):
    """The state of `_tl.merged` without a single column."""
    lowest = tl.full((), _tl.LOWEST, tl.float32)
    zero = tl.zeros([BLOCK_V], tl.float32)
    tops, sums, dots = (), (), ()
    for _ in tl.static_range(len(ASSIGN)):
        tops = tops + (lowest,)
        sums = sums + (tl.zeros((), tl.float32),)
        dots = dots + (zero,)
    return zero + _tl.LOWEST, zero, tops, sums, dots


@triton.jit
def _write_sample(
    state, statistics_ptr, loss_ptr, b, B, z_high, z_low, ASSIGN: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """The sample's statistics, and its loss: for each target and each other crop, log sum_z - dot/sum_q."""
    crop = tl.arange(0, BLOCK_V)
    log_sum = tl.log(state[1])
    here = statistics_ptr + (crop.to(tl.int64) * B + b) * 2
    tl.store(here, _tl.divided(state[0], z_high, z_low), mask=crop < V)
    tl.store(here + 1, log_sum, mask=crop < V)
    loss = tl.zeros([BLOCK_V], tl.float32)
    for a in tl.static_range(len(ASSIGN)):
        here = statistics_ptr + (tl.full((), V + a, tl.int64) * B + b) * 2
        tl.store(here, state[2][a])
        tl.store(here + 1, tl.log(state[3][a]))
        loss += tl.where((crop < V) & (crop != ASSIGN[a]), log_sum - state[4][a] / state[3][a], 0.0)
    tl.store(loss_ptr + b, tl.sum(loss, 0))


@triton.jit
def _sweep(
    x_ptr, x_crop, x_row, x_column, B, k_units, v_ptr, z_high, z_low, q_high, q_low, state_ptr, statistics_ptr, loss_ptr, span,
    ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    ASSIGN: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Statistics and loss of one sample, every student and target row read once; one span of columns of them with SPLITS > 1."""
    b, split, K = tl.program_id(0), tl.program_id(1), k_units * UNIT
    state = _nothing(ASSIGN, BLOCK_V)
    for start in range(split * span, tl.minimum((split + 1) * span, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        z = _load_students(x_ptr, x_crop, x_row, x_column, b, k, K, V, ALIGN, CONTIGUOUS, UNIT, BLOCK_V)
        top = tl.maximum(tl.max(z, 1), _tl.LOWEST)
        z = _tl.divided(z - top[:, None], z_high, z_low)
        total = tl.sum(tl.exp(z), 1)
        z = tl.where((k < K)[None, :], z, 0.0)
        tops, sums, dots = (), (), ()
        for a in tl.static_range(len(ASSIGN)):
            x = _load_target(x_ptr, x_crop, x_row, x_column, v_ptr, q_high, q_low, b, k, K, a, ASSIGN[a], ALIGN, CONTIGUOUS, UNIT)
            highest = tl.maximum(tl.max(x, 0), _tl.LOWEST)
            e = tl.exp(x - highest)
            tops = tops + (highest,)
            sums = sums + (tl.sum(e, 0),)
            dots = dots + (tl.sum(e[None, :] * z, 1),)
        state = _tl.merged(state, (top, total, tops, sums, dots), z_high, z_low, 1.0, 0.0)
    if SPLITS == 1:
        _write_sample(state, statistics_ptr, loss_ptr, b, B, z_high, z_low, ASSIGN, V, BLOCK_V)
    else:
        WIDTH: tl.constexpr = 2 * BLOCK_V + len(ASSIGN) * (BLOCK_V + 2)
        here = state_ptr + (b.to(tl.int64) * SPLITS + split) * WIDTH
        crop = tl.arange(0, BLOCK_V)
        tl.store(here + crop, state[0])
        tl.store(here + BLOCK_V + crop, state[1])
        for a in tl.static_range(len(ASSIGN)):
            target = here + 2 * BLOCK_V + a * (BLOCK_V + 2)
            tl.store(target + crop, state[4][a])
            tl.store(target + BLOCK_V, state[2][a])
            tl.store(target + BLOCK_V + 1, state[3][a])


@triton.jit
def _merge_splits(
    state_ptr, statistics_ptr, loss_ptr, B, z_high, z_low,
    ASSIGN: tl.constexpr, V: tl.constexpr, SPLITS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Statistics and loss of one sample from the states of its spans, in their order."""
    b, crop = tl.program_id(0), tl.arange(0, BLOCK_V)
    WIDTH: tl.constexpr = 2 * BLOCK_V + len(ASSIGN) * (BLOCK_V + 2)
    state = _nothing(ASSIGN, BLOCK_V)
    for split in range(0, SPLITS):
        here = state_ptr + (b.to(tl.int64) * SPLITS + split) * WIDTH
        tops, sums, dots = (), (), ()
        for a in tl.static_range(len(ASSIGN)):
            target = here + 2 * BLOCK_V + a * (BLOCK_V + 2)
            tops = tops + (tl.load(target + BLOCK_V),)
            sums = sums + (tl.load(target + BLOCK_V + 1),)
            dots = dots + (tl.load(target + crop),)
        state = _tl.merged(state, (tl.load(here + crop), tl.load(here + BLOCK_V + crop), tops, sums, dots), z_high, z_low, 1.0, 0.0)
    _write_sample(state, statistics_ptr, loss_ptr, b, B, z_high, z_low, ASSIGN, V, BLOCK_V)


@triton.jit
def _total(losses_ptr, scale_ptr, loss_ptr, B, TERMS: tl.constexpr, BLOCK_B: tl.constexpr):
    """loss = scale * sum of the samples' losses / TERMS, in a fixed order."""
    total = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        total += tl.load(losses_ptr + b, mask=b < B, other=0.0)
    tl.store(loss_ptr, tl.load(scale_ptr) * tl.sum(total, 0) / TERMS)


@triton.jit
def _gradient(
    x_ptr, x_crop, x_row, x_column, B, k_units, v_ptr, z_high, z_low, q_high, q_low, statistics_ptr, scale_ptr, dloss_ptr, dx_ptr,
    ALIGN: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    ASSIGN: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """dscores = dloss scale/(A (V-1) temperature) (targets * softmax(scores/temperature) - sum of the targets), one run of columns."""
    b, K = tl.program_id(0), k_units * UNIT
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    crop = tl.arange(0, BLOCK_V)
    here = statistics_ptr + (crop.to(tl.int64) * B + b) * 2
    top = tl.load(here, mask=crop < V, other=0.0)
    log_sum = tl.load(here + 1, mask=crop < V, other=0.0)
    z = _load_students(x_ptr, x_crop, x_row, x_column, b, k, K, V, ALIGN, CONTIGUOUS, UNIT, BLOCK_V)
    z = tl.exp(_tl.divided(z, z_high, z_low) - top[:, None])
    share = tl.exp(-log_sum) * len(ASSIGN)
    for a in tl.static_range(len(ASSIGN)):
        share = share - tl.where(crop == ASSIGN[a], tl.exp(-log_sum), 0.0)
    dx = z * share[:, None]
    for a in tl.static_range(len(ASSIGN)):
        here = statistics_ptr + (tl.full((), V + a, tl.int64) * B + b) * 2
        x = _load_target(x_ptr, x_crop, x_row, x_column, v_ptr, q_high, q_low, b, k, K, a, ASSIGN[a], ALIGN, CONTIGUOUS, UNIT)
        q = tl.exp(x - tl.load(here)) * tl.exp(-tl.load(here + 1))
        dx = dx - tl.where((crop != ASSIGN[a])[:, None], q[None, :], 0.0)
    TERMS: tl.constexpr = len(ASSIGN) * (V - 1)
    dx = dx * (_tl.divided(tl.load(dloss_ptr).to(tl.float32) * tl.load(scale_ptr), z_high, z_low) / TERMS)
    pointers = dx_ptr + ((crop.to(tl.int64) * B + b) * K)[:, None] + k[None, :]
    tl.store(pointers, dx.to(dx_ptr.dtype.element_ty), mask=(crop < V)[:, None] & (k < K)[None, :])
