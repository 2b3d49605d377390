"""How do Triton kernels find Sinkhorn's column potentials? For every op whose codes come from them."""

import math

import torch

from fuseer.kernels import _tl
from fuseer.kernels._tl import tl, triton
from fuseer.kernels.dispatch import all_reduce

# widest rows that one program keeps in registers (32 values a thread in 16 warps), and that a cluster of 8 does
RESIDENT_K = 16384
CLUSTER_K = 131072
# reductions over a cluster need this Triton and thread block clusters
CLUSTERS = _tl.REASON is None and tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)
# elements of a tile, 32 a thread in 4 warps; bytes of its row segments, 16 a thread
TILE = 4096
SEGMENT = 2048
MERGE = {"BLOCK_P": 16, "BLOCK_K": 128, "num_warps": 4}


def matrices(given):
    """The matrices [N, K] that are given: as a list of them, empty too, or of one tensor [H, N, K]."""
    return given[0].unbind() if len(given) == 1 and given[0].dim() == 3 else given


class Rows:
    """The rows whose columns are balanced, of each head on its own: scores [H, N, K], or a list of H matrices [N, K] that may lie
    anywhere; before them the rows of `queue`, none or a list of H matrices [Q, K].

    layout: the kernels' constants about memory. arguments: pointers and strides of both segments, Q, all rows, K. Row and head
    strides and K come in UNITs, which divide them.
    """

    def __init__(self, scores, queue=()):
        if isinstance(scores, torch.Tensor):
            first, contiguous, align = scores, scores.stride(2) == 1, None
            N, self.k = scores.shape[1:]
            unit = _tl.unit(self.k, *scores.stride()[:2]) if contiguous else 1
            own = scores, scores.stride(0) // unit, scores.stride(1) // unit, scores.stride(2)
            before = own[0], *own[2:]
        else:
            first, (N, self.k) = scores[0], scores[0].shape
            listed = _tl.Listed.of(scores, *queue)
            before = _tl.Listed.of(queue, *scores)[:3] if queue else listed[:3]
            own, contiguous, align, unit = (listed.pointers, 0, *listed[1:3]), listed.contiguous, listed.align, listed.unit
        stored = queue[0].shape[0] if queue else 0
        self.heads, self.segments, self.count = len(scores), (N, stored), N + stored
        self.item, self.device = first.element_size(), first.device
        self.layout = {"ALIGN": align, "QUEUE": bool(queue), "CONTIGUOUS": contiguous, "UNIT": unit}
        self.arguments = *own, *before, stored, self.count, self.k // unit

    def runs(self, each):
        """How many runs of `each` rows the two segments are cut into."""
        return sum(triton.cdiv(rows, each) for rows in self.segments)


def resident(rows, target):
    """How a program, or a cluster of them, holds a whole row in registers: block size and warps; None where rows are too wide.

    At most 32 values a thread in each of three arrays (row, potentials, sums): more would spill.
    """
    block_k = _tl.power_of_two(rows.k)
    cluster = CLUSTERS and target.capability >= (9, 0)
    if block_k > (CLUSTER_K if cluster else RESIDENT_K):
        return None
    programs = max(1, block_k // RESIDENT_K)
    options = {"BLOCK_K": block_k, "num_warps": min(16, max(1, block_k // programs // 1024))}
    return options if programs == 1 else {**options, "num_ctas": programs}


def at_once(rows, options, target):
    """How many programs of each head the device holds at the same time, 512 threads a multiprocessor; at least 1."""
    return max(1, target.multiprocessors * (16 // options["num_warps"]) // (options.get("num_ctas", 1) * max(1, rows.heads)))


def tile(rows):
    """A tile of rows that are read but not held."""
    block_k = min(_tl.power_of_two(rows.k), SEGMENT // rows.item)
    return {"BLOCK_N": max(1, min(_tl.power_of_two(rows.count), TILE // block_k)), "BLOCK_K": block_k, "num_warps": 4}


def runs(rows, options, target):
    """Into how many runs of how many rows the sums over rows are cut: two programs a multiprocessor, 32 rows each or more."""
    strips = triton.cdiv(rows.k, options["BLOCK_K"]) * max(1, rows.heads)
    wanted = max(1, min(triton.cdiv(2 * target.multiprocessors, strips), rows.count // 32))
    each = triton.cdiv(triton.cdiv(rows.count, wanted), options["BLOCK_N"]) * options["BLOCK_N"]
    return rows.runs(max(1, each)), each


def potentials(rows, epsilon, iterations, group_name, passengers=()):
    """The column potentials v [H, K] (natural logarithm) after `iterations` steps, and the `passengers` summed over the group.

    v <- v - log sum_i softmax(scores_i/epsilon + v)_j, the first step with v = 0 shifted by the column's maximum; a column
    without a finite score, or a problem without rows, keeps the potential 0. Reads of the scores: one in the first step; in
    each later one a single one where a program holds a row, else two. Collectives over the group: one MAX, then `iterations`
    SUMs of [H, K], the passengers riding in the first.
    """
    target, inverse = _tl.target(rows.device), _tl.inverse(epsilon)
    v, arrived = _first_step(rows, inverse, target, group_name, passengers)
    for _ in range(iterations - 1):
        options = resident(rows, target)
        partials = _streamed_sums(rows, v, inverse, target) if options is None else _resident_sums(rows, v, inverse, target, options)
        sums = v if not group_name else torch.empty_like(v)
        grid = (triton.cdiv(rows.k, MERGE["BLOCK_K"]), rows.heads)
        arguments = (partials, v, sums, partials.shape[0], rows.heads, rows.k // _tl.unit(rows.k))
        _tl.launch(_merge_sums, grid, *arguments, ALONE=not group_name, UNIT=_tl.unit(rows.k), **MERGE)
        if group_name:
            v = v - _log(all_reduce(sums, "sum", group_name))
    return v, arrived


def _first_step(rows, inverse, target, group_name, passengers):
    options = tile(rows)
    count, each = runs(rows, options, target)
    partials = torch.empty((2, count, rows.heads, rows.k), dtype=torch.float32, device=rows.device)
    grid = (triton.cdiv(rows.k, options["BLOCK_K"]), count, rows.heads)
    _tl.launch(_first_partials, grid, *rows.arguments, inverse[0], partials, each, **rows.layout, **options)
    v = torch.empty((rows.heads, rows.k), dtype=torch.float32, device=rows.device)
    top = torch.empty_like(v) if group_name else v
    grid = (triton.cdiv(rows.k, MERGE["BLOCK_K"]), rows.heads)
    arguments = (partials, v, top, *inverse, count, rows.heads, rows.k // _tl.unit(rows.k))
    _tl.launch(_merge_first, grid, *arguments, ALONE=not group_name, UNIT=_tl.unit(rows.k), **MERGE)
    if not group_name:
        return v, passengers
    # logits are reduced, as every backend does: ranks may differ in theirs; a rank without rows has the maximum -inf and sums of 0
    highest = all_reduce(top, "max", group_name)
    sums = torch.where(v == 0, v, v * (top - highest).exp())
    flat = all_reduce(torch.cat([sums.flatten(), *(v.new_full((1,), number) for number in passengers)]), "sum", group_name)
    return -(highest.masked_fill(highest == -torch.inf, 0) + _log(flat[: v.numel()].view_as(v))), flat[v.numel() :].unbind()


def _log(sums):
    return sums.masked_fill(sums == 0, 1).log()


def _resident_sums(rows, v, inverse, target, options):
    # at most one program for two rows: the partial sums are never larger than the scores; and at most sqrt(16 rows) of them, where
    # the loop over a program's rows is as long as the one that merges the partial sums, 16 at a time
    programs = min(at_once(rows, options, target), triton.cdiv(rows.count, 2), math.isqrt(16 * rows.count))
    partials = torch.empty((programs, *v.shape), dtype=torch.float32, device=v.device)
    _tl.launch(_resident_partials, (programs, rows.heads), *rows.arguments, *inverse, v, partials, **rows.layout, **options)
    return partials


def _streamed_sums(rows, v, inverse, target):
    options = tile(rows)
    statistics = row_statistics(rows, v, inverse, target)
    count, each = runs(rows, options, target)
    partials = torch.empty((count, *v.shape), dtype=torch.float32, device=v.device)
    grid = (triton.cdiv(rows.k, options["BLOCK_K"]), count, rows.heads)
    arguments = (*rows.arguments, *inverse, v, statistics, partials, each)
    _tl.launch(_streamed_partials, grid, *arguments, **rows.layout, **options)
    return partials


def row_statistics(rows, v, inverse, target):
    """(maximum, sum of exponentials) of every row of scores/epsilon + v, [H, rows, 2]."""
    options = tile(rows)
    blocks = rows.runs(options["BLOCK_N"])
    splits = _tl.splits(blocks * rows.heads, triton.cdiv(rows.k, options["BLOCK_K"]), target)
    span = triton.cdiv(triton.cdiv(rows.k, splits), options["BLOCK_K"]) * options["BLOCK_K"]
    partials = torch.empty((rows.heads, rows.count, splits, 2), dtype=torch.float32, device=v.device)
    grid = (blocks, splits, rows.heads)
    _tl.launch(_row_statistics, grid, *rows.arguments, *inverse, v, partials, span, **rows.layout, **options)
    if splits == 1:
        return partials
    statistics, count = partials.new_empty((rows.heads, rows.count, 2)), rows.heads * rows.count
    _tl.launch(_merge_statistics, (triton.cdiv(count, 64),), partials, statistics, count, SPLITS=splits, BLOCK_N=64, num_warps=4)
    return statistics


@triton.jit
def _merge_statistics(partial_ptr, statistics_ptr, N, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(maximum, sum) of rows from those of their spans."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    spans = partial_ptr + (n.to(tl.int64)[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]) * 2
    tops = tl.load(spans, mask=(n < N)[:, None], other=0.0)
    sums = tl.load(spans + 1, mask=(n < N)[:, None], other=0.0)
    top = tl.max(tops, 1)
    tl.store(statistics_ptr + n.to(tl.int64) * 2, top, mask=n < N)
    tl.store(statistics_ptr + n.to(tl.int64) * 2 + 1, tl.sum(sums * tl.exp(tops - top[:, None]), 1), mask=n < N)


@triton.jit
def load_statistics(statistics_ptr, head, R, start, stop, BLOCK_N: tl.constexpr):
    """Maximum and sum of rows start, start + 1, ... of one head, as columns; 0 and 1 from `stop` on."""
    r = start + tl.arange(0, BLOCK_N)
    here = statistics_ptr + (head.to(tl.int64) * R + r) * 2
    return tl.load(here, mask=r < stop, other=0.0)[:, None], tl.load(here + 1, mask=r < stop, other=1.0)[:, None]


@triton.jit
def _first_partials(
    x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, R, k_units, high, partial_ptr, each,
    ALIGN: tl.constexpr, QUEUE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Maximum of the scores, and sum of exp((scores - maximum)/epsilon), of each column over one run of rows."""
    run, head, K = tl.program_id(1), tl.program_id(2), k_units * UNIT
    runs, heads = tl.num_programs(1), tl.num_programs(2)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    top = tl.full([BLOCK_K], _tl.LOWEST, tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    first, stop = _tl.run_of_rows(run, each, Q, R)
    for start in range(first, stop, BLOCK_N):
        x = _tl.load_tile(
            x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, head, start, stop, k, K,
            ALIGN, QUEUE, CONTIGUOUS, UNIT, BLOCK_N,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp((top - higher) * high) + tl.sum(tl.exp((x - higher[None, :]) * high), 0)
        top = higher
    here = (run * heads + head).to(tl.int64) * K + k
    tl.store(partial_ptr + here, top, mask=k < K)
    tl.store(partial_ptr + (runs * heads).to(tl.int64) * K + here, total, mask=k < K)


@triton.jit
def _merge_first(
    partial_ptr, v_ptr, top_ptr, high, low, runs, heads, k_units,
    ALONE: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """v = -(maximum/epsilon + log sum) over all runs, in their order; not ALONE, v_ptr takes the sum, top_ptr maximum/epsilon."""
    head, K = tl.program_id(1), k_units * UNIT
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    top = tl.full([BLOCK_K], _tl.LOWEST, tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, runs, BLOCK_P):
        run = start + tl.arange(0, BLOCK_P)
        mask = (run < runs)[:, None] & (k < K)[None, :]
        here = (run * heads + head).to(tl.int64)[:, None] * K + k[None, :]
        tops = tl.load(partial_ptr + here, mask=mask, other=_tl.LOWEST)
        sums = tl.load(partial_ptr + tl.cast(runs * heads, tl.int64) * K + here, mask=mask, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        total = total * tl.exp((top - higher) * high) + tl.sum(sums * tl.exp((tops - higher[None, :]) * high), 0)
        top = higher
    here = head.to(tl.int64) * K + k
    top = _tl.divided(top, high, low)
    if ALONE:
        tl.store(v_ptr + here, tl.where(total == 0, 0.0, -(top + tl.log(total))), mask=k < K)
    else:
        tl.store(v_ptr + here, total, mask=k < K)
        tl.store(top_ptr + here, tl.where(total == 0, float("-inf"), top), mask=k < K)


@triton.jit
def _merge_sums(
    partial_ptr, v_ptr, out_ptr, runs, heads, k_units,
    ALONE: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = v - log(sum of the partial sums, in their order); the sum itself where not ALONE."""
    head, K = tl.program_id(1), k_units * UNIT
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, runs, BLOCK_P):
        run = start + tl.arange(0, BLOCK_P)
        here = (run * heads + head).to(tl.int64)[:, None] * K + k[None, :]
        total += tl.sum(tl.load(partial_ptr + here, mask=(run < runs)[:, None] & (k < K)[None, :], other=0.0), 0)
    here = head.to(tl.int64) * K + k
    if ALONE:
        total = tl.load(v_ptr + here, mask=k < K, other=0.0) - tl.log(tl.where(total == 0, 1.0, total))
    tl.store(out_ptr + here, total, mask=k < K)


@triton.jit
def _resident_partials(
    x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, R, k_units, high, low, v_ptr, partial_ptr,
    ALIGN: tl.constexpr, QUEUE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Column sums of softmax(scores/epsilon + v) over every P-th row, P programs a head; each row is read once."""
    head, heads, K = tl.program_id(1), tl.num_programs(1), k_units * UNIT
    k = tl.arange(0, BLOCK_K)
    v = tl.load(v_ptr + head.to(tl.int64) * K + k, mask=k < K, other=0.0)
    sums = tl.zeros([BLOCK_K], tl.float32)
    for r in range(tl.program_id(0), R, tl.num_programs(0)):
        x = _tl.load_row(
            x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, head, r, k, K,
            ALIGN, QUEUE, CONTIGUOUS, UNIT,
        )  # fmt: skip
        x = _tl.logits(x, v, high, low)
        e = tl.exp(x - tl.max(x, 0))
        sums += e * (1.0 / tl.sum(e, 0))
    here = (tl.program_id(0) * heads + head).to(tl.int64) * K + k
    tl.store(partial_ptr + here, sums, mask=k < K)


@triton.jit
def _row_statistics(
    x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, R, k_units, high, low, v_ptr, statistics_ptr, span,
    ALIGN: tl.constexpr, QUEUE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(maximum, sum of exponentials) of scores/epsilon + v for each row over one span of columns."""
    split, head, K = tl.program_id(1), tl.program_id(2), k_units * UNIT
    splits = tl.num_programs(1)
    first, stop = _tl.run_of_rows(tl.program_id(0), BLOCK_N, Q, R)
    top = tl.full([BLOCK_N], _tl.LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, K), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        v = tl.load(v_ptr + head.to(tl.int64) * K + k, mask=k < K, other=0.0)
        x = _tl.load_tile(
            x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, head, first, stop, k, K,
            ALIGN, QUEUE, CONTIGUOUS, UNIT, BLOCK_N,
        )  # fmt: skip
        x = _tl.logits(x, v[None, :], high, low)
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        top = higher
    r = first + tl.arange(0, BLOCK_N)
    here = statistics_ptr + ((head.to(tl.int64) * R + r) * splits + split) * 2
    tl.store(here, top, mask=r < stop)
    tl.store(here + 1, total, mask=r < stop)


@triton.jit
def _streamed_partials(
    x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, R, k_units, high, low, v_ptr, statistics_ptr,
    partial_ptr, each,
    ALIGN: tl.constexpr, QUEUE: tl.constexpr, CONTIGUOUS: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Column sums of softmax(scores/epsilon + v) over one run of rows, whose normalisers are in statistics_ptr."""
    run, head, K = tl.program_id(1), tl.program_id(2), k_units * UNIT
    heads = tl.num_programs(2)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    v = tl.load(v_ptr + head.to(tl.int64) * K + k, mask=k < K, other=0.0)
    sums = tl.zeros([BLOCK_K], tl.float32)
    first, stop = _tl.run_of_rows(run, each, Q, R)
    for start in range(first, stop, BLOCK_N):
        x = _tl.load_tile(
            x_ptr, x_head, x_row, x_column, queue_ptr, queue_row, queue_column, Q, head, start, stop, k, K,
            ALIGN, QUEUE, CONTIGUOUS, UNIT, BLOCK_N,
        )  # fmt: skip
        top, total = load_statistics(statistics_ptr, head, R, start, stop, BLOCK_N)
        sums += tl.sum(tl.exp(_tl.logits(x, v[None, :], high, low) - top) * (1.0 / total), 0)
    here = (run * heads + head).to(tl.int64) * K + k
    tl.store(partial_ptr + here, sums, mask=k < K)
