"""When and how does sinkhorn run on Triton? Every strided layout is read in place; leading axes that do not merge are copied."""

import math

import torch

from fuseer.kernels import _potentials, _tl
from fuseer.kernels._tl import tl, triton


def unsupported(scores, epsilon, iterations, group_name):
    if math.prod(scores.shape[:-2]) > _tl.GRID_LIMIT:
        return f"a grid holds {_tl.GRID_LIMIT} problems and scores are {list(scores.shape)}"
    return _tl.refusal(scores=scores)


def forward(scores, epsilon, iterations, group_name):
    """The codes. Reads of the scores: iterations + 1 where a program holds a row, else 2 * iterations + 1; one write."""
    codes = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
    rows = _potentials.Rows(scores.reshape(math.prod(scores.shape[:-2]), *scores.shape[-2:]))
    with torch.cuda.device_of(scores):
        v, _ = _potentials.potentials(rows, epsilon, iterations, group_name)
        target, inverse = _tl.target(scores.device), _tl.inverse(epsilon)
        options = _potentials.resident(rows, target)
        if options is None:
            options = _potentials.tile(rows)
            statistics = _potentials.row_statistics(rows, v, inverse, target)
            grid = (rows.runs(options["BLOCK_N"]), triton.cdiv(rows.k, options["BLOCK_K"]), rows.heads)
            arguments = (*rows.arguments, *inverse, v, statistics, codes)
            _tl.launch(_streamed_codes, grid, *arguments, **rows.layout, **options)
        else:
            grid = (min(rows.count, _potentials.at_once(rows, options, target)), rows.heads)
            _tl.launch(_resident_codes, grid, *rows.arguments, *inverse, v, codes, **rows.layout, **options)
    return codes


@triton.jit
def _resident_codes(
    x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, R, k_units, high, low, v_ptr, codes_ptr,
    ALIGN: tl.constexpr, QUEUE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """codes = softmax(scores/epsilon + v) of every P-th row, P programs a head."""
    head, K = tl.program_id(1), k_units * UNIT
    k = tl.arange(0, BLOCK_K)
    v = tl.load(v_ptr + head.to(tl.int64) * K + k, mask=k < K, other=0.0)
    for r in range(tl.program_id(0), R, tl.num_programs(0)):
        x = _tl.load_row(
            x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, head, r, k, K,
            ALIGN, QUEUE, CONTIGUOUS, UNIT,
        )  # fmt: skip
        x = _tl.logits(x, v, high, low)
        e = tl.exp(x - tl.max(x, 0))
        tl.store(codes_ptr + (head.to(tl.int64) * R + r) * K + k, e / tl.sum(e, 0), mask=k < K)


@triton.jit
def _streamed_codes(
    x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, R, k_units, high, low, v_ptr, statistics_ptr,
    codes_ptr,
    ALIGN: tl.constexpr, QUEUE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """codes = softmax(scores/epsilon + v) of one tile, the rows' normalisers in statistics_ptr."""
    head, K = tl.program_id(2), k_units * UNIT
    start, stop = _tl.run_of_rows(tl.program_id(0), BLOCK_N, Q, R)
    r = start + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    v = tl.load(v_ptr + head.to(tl.int64) * K + k, mask=k < K, other=0.0)
    x = _tl.load_tile(
        x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, head, start, stop, k, K,
        ALIGN, QUEUE, CONTIGUOUS, UNIT, BLOCK_N,
    )  # fmt: skip
    top, total = _potentials.load_statistics(statistics_ptr, head, R, start, stop, BLOCK_N)
    here = (head.to(tl.int64) * R + r)[:, None] * K + k[None, :]
    codes = tl.exp(_tl.logits(x, v[None, :], high, low) - top) / total
    tl.store(codes_ptr + here, codes, mask=(r < stop)[:, None] & (k < K)[None, :])
