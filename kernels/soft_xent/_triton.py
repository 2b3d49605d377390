"""When and how does soft_xent run on Triton? Any strides and dtypes are read in place."""

import torch

from fuseer.kernels import _tl
from fuseer.kernels._tl import tl, triton

TILE = 4096


def unsupported(logits, target, temperature, weights, target_center, target_temperature):
    return _tl.refusal(logits=logits, target=target, weights=weights, target_center=target_center)


def forward(logits, target, temperature, weights, target_center, target_temperature):
    """loss [N] and statistics [N, 4], as reference.py says; logits and target are read once."""
    N, K = logits.shape
    loss = torch.empty((N,), dtype=torch.float32, device=logits.device)
    statistics = loss.new_empty((N, 4))
    with torch.cuda.device_of(logits):
        memory, options = _memory(logits, target, weights, target_center, target_temperature)
        blocks = triton.cdiv(K, options["BLOCK_K"])
        splits = _tl.splits(N, blocks, _tl.target(logits.device))
        span = triton.cdiv(blocks, splits) * options["BLOCK_K"]
        inverses = (*_tl.inverse(temperature), *_tl.inverse(target_temperature or 1.0))
        state = loss.new_empty((N, splits, 5) if splits > 1 else (0,))
        arguments = (*memory, *inverses, state, statistics, loss, span)
        _tl.launch(_sweep, (N, splits), *arguments, **options, SPLITS=splits)
        if splits > 1:
            constants = {name: options[name] for name in ("WEIGHTED", "TEMPERED")}
            arguments = (state, statistics, loss, *_or(logits, weights), *inverses)
            _tl.launch(_merge_splits, (N,), *arguments, **constants, SPLITS=splits, num_warps=1)
    return loss, statistics


def backward(dloss, logits, target, statistics, temperature, weights, target_center, target_temperature):
    """dlogits. One read of logits and target, one write."""
    N, K = logits.shape
    dlogits = logits.new_empty(logits.shape)
    with torch.cuda.device_of(logits):
        memory, options = _memory(logits, target, weights, target_center, target_temperature)
        inverses = (*_tl.inverse(temperature), *_tl.inverse(target_temperature or 1.0))
        arguments = (*memory, *inverses, statistics, dloss, dloss.stride(0), dlogits)
        _tl.launch(_gradient, (N, triton.cdiv(K, options["BLOCK_K"])), *arguments, **options)
    return dlogits


def _memory(logits, target, weights, center, target_temperature):
    """The kernels' arguments about memory, row strides and K in UNITs, and their constants."""
    K = logits.shape[1]
    contiguous = all(x is None or x.stride(-1) == 1 for x in (logits, target, center))
    unit = _tl.unit(K, logits.stride(0), target.stride(0)) if contiguous else 1
    rows = tuple(value for x in (logits, target) for value in (x, x.stride(0) // unit, x.stride(1)))
    extras = (*_or(logits, weights), *_or(logits, center))
    constants = {"CONTIGUOUS": contiguous, "UNIT": unit, "WEIGHTED": weights is not None, "CENTRED": center is not None}
    constants |= {"TEMPERED": target_temperature is not None, "BLOCK_K": min(_tl.power_of_two(K), TILE)}
    return (*rows, K // unit, *extras), {**constants, "num_warps": 4}


def _or(stand_in, vector):
    """Pointer and stride of a vector; an absent one is never read, and any pointer stands for it."""
    return (stand_in, 0) if vector is None else (vector, vector.stride(0))


@triton.jit
def _load(x_ptr, x_row, x_column, n, k, K, other, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr):
    """Columns k of row n in float32; `other` beyond K."""
    k_offset = k if CONTIGUOUS else k.to(tl.int64) * x_column
    return tl.load(x_ptr + n.to(tl.int64) * x_row * UNIT + k_offset, mask=k < K, other=other).to(tl.float32)


@triton.jit
def _load_target(
    t_ptr, t_row, t_column, c_ptr, c_column, n, k, K,
    CENTRED: tl.constexpr, TEMPERED: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Columns k of target n, centred where it is CENTRED, in float32; beyond K -inf where it is a logit (TEMPERED), else 0."""
    target = _load(t_ptr, t_row, t_column, n, k, K, float("-inf") if TEMPERED else 0.0, CONTIGUOUS, UNIT)
    if CENTRED:
        k_offset = k if CONTIGUOUS else k.to(tl.int64) * c_column
        target = target - tl.load(c_ptr + k_offset, mask=k < K, other=0.0).to(tl.float32)
    return target


@triton.jit
def _nothing(TEMPERED: tl.constexpr):
    """The state of `_tl.merged` without a single column; a target that is no logit has the maximum 0."""
    lowest = tl.full((), _tl.LOWEST, tl.float32)
    zero = tl.zeros((), tl.float32)
    q = lowest if TEMPERED else zero
    return lowest, zero, (q,), (zero,), (zero,)


@triton.jit
def _write_row(
    state, statistics_ptr, loss_ptr, w_ptr, w_row, z_high, z_low, q_high, q_low, n, TEMPERED: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """The row's statistics, and its loss w (sum_q log sum_z - dot), over sum_q where the target is TEMPERED."""
    log_sum = tl.log(state[1])
    here = statistics_ptr + n.to(tl.int64) * 4
    tl.store(here, _tl.divided(state[0], z_high, z_low))
    tl.store(here + 1, log_sum)
    if TEMPERED:
        tl.store(here + 2, _tl.divided(state[2][0], q_high, q_low))
        tl.store(here + 3, tl.log(state[3][0]))
        loss = log_sum - state[4][0] / state[3][0]
    else:
        tl.store(here + 2, 0.0)
        tl.store(here + 3, state[3][0])
        loss = state[3][0] * log_sum - state[4][0]
    if WEIGHTED:
        loss = loss * tl.load(w_ptr + n.to(tl.int64) * w_row).to(tl.float32)
    tl.store(loss_ptr + n, loss)


@triton.jit
def _sweep(
    z_ptr, z_row, z_column, t_ptr, t_row, t_column, k_units, w_ptr, w_row, c_ptr, c_column, z_high, z_low, q_high, q_low,
    state_ptr, statistics_ptr, loss_ptr, span,
    CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, WEIGHTED: tl.constexpr, CENTRED: tl.constexpr, TEMPERED: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Statistics and loss of one row, read once; one span of its columns with SPLITS > 1."""
    n, split, K = tl.program_id(0), tl.program_id(1), k_units * UNIT
    state = _nothing(TEMPERED)
    for start in range(split * span, tl.minimum((split + 1) * span, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        z = _load(z_ptr, z_row, z_column, n, k, K, float("-inf"), CONTIGUOUS, UNIT)
        e = _load_target(t_ptr, t_row, t_column, c_ptr, c_column, n, k, K, CENTRED, TEMPERED, CONTIGUOUS, UNIT)
        top = tl.maximum(tl.max(z, 0), _tl.LOWEST)
        z = _tl.divided(z - top, z_high, z_low)
        total = tl.sum(tl.exp(z), 0)
        highest = tl.zeros((), tl.float32)
        if TEMPERED:
            highest = tl.maximum(tl.max(e, 0), _tl.LOWEST)
            e = tl.exp(_tl.divided(e - highest, q_high, q_low))
        dot = tl.sum(e * tl.where(k < K, z, 0.0), 0)
        state = _tl.merged(state, (top, total, (highest,), (tl.sum(e, 0),), (dot,)), z_high, z_low, q_high, q_low)
    if SPLITS == 1:
        _write_row(state, statistics_ptr, loss_ptr, w_ptr, w_row, z_high, z_low, q_high, q_low, n, TEMPERED, WEIGHTED)
    else:
        here = state_ptr + (n.to(tl.int64) * SPLITS + split) * 5
        tl.store(here, state[0])
        tl.store(here + 1, state[1])
        tl.store(here + 2, state[2][0])
        tl.store(here + 3, state[3][0])
        tl.store(here + 4, state[4][0])


@triton.jit
def _merge_splits(
    state_ptr, statistics_ptr, loss_ptr, w_ptr, w_row, z_high, z_low, q_high, q_low,
    TEMPERED: tl.constexpr, WEIGHTED: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Statistics and loss of one row from the states of its spans, in their order."""
    n = tl.program_id(0)
    state = _nothing(TEMPERED)
    for split in range(0, SPLITS):
        here = state_ptr + (n.to(tl.int64) * SPLITS + split) * 5
        span = (tl.load(here), tl.load(here + 1), (tl.load(here + 2),), (tl.load(here + 3),), (tl.load(here + 4),))
        state = _tl.merged(state, span, z_high, z_low, q_high, q_low)
    _write_row(state, statistics_ptr, loss_ptr, w_ptr, w_row, z_high, z_low, q_high, q_low, n, TEMPERED, WEIGHTED)


@triton.jit
def _gradient(
    z_ptr, z_row, z_column, t_ptr, t_row, t_column, k_units, w_ptr, w_row, c_ptr, c_column, z_high, z_low, q_high, q_low,
    statistics_ptr, dloss_ptr, dloss_row, dz_ptr,
    CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr, WEIGHTED: tl.constexpr, CENTRED: tl.constexpr, TEMPERED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dlogits = dloss w/temperature (sum_q softmax(logits/temperature) - q), one run of columns of one row."""
    n, K = tl.program_id(0), k_units * UNIT
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    z = _load(z_ptr, z_row, z_column, n, k, K, float("-inf"), CONTIGUOUS, UNIT)
    q = _load_target(t_ptr, t_row, t_column, c_ptr, c_column, n, k, K, CENTRED, TEMPERED, CONTIGUOUS, UNIT)
    here = statistics_ptr + n.to(tl.int64) * 4
    share = tl.exp(-tl.load(here + 1))
    if TEMPERED:
        q = tl.exp(_tl.divided(q, q_high, q_low) - tl.load(here + 2)) * tl.exp(-tl.load(here + 3))
    else:
        share = share * tl.load(here + 3)
    dloss = tl.load(dloss_ptr + n.to(tl.int64) * dloss_row).to(tl.float32)
    if WEIGHTED:
        dloss = dloss * tl.load(w_ptr + n.to(tl.int64) * w_row).to(tl.float32)
    dz = (tl.exp(_tl.divided(z, z_high, z_low) - tl.load(here)) * share - q) * _tl.divided(dloss, z_high, z_low)
    tl.store(dz_ptr + n.to(tl.int64) * K + k, dz.to(dz_ptr.dtype.element_ty), mask=k < K)
