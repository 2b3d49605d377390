"""When and how does lars_update_ run on Triton? Two launches, and with a group one more and an all-reduce between them."""

import torch

from fuseer.kernels import _chunks, _tl
from fuseer.kernels._tl import tl, triton
from fuseer.kernels.dispatch import all_reduce

BLOCK = 2048
# partial sums of a piece: each program of the update reads all of its layer, 24 bytes each beside 57 kB of numbers a block
RUNS = 512
BLOCK_P = 128


def unsupported(params, grads, momenta, *options):
    return _tl.refusal_of_lists(params=params, grads=grads, momenta=momenta)


def forward(params, grads, momenta, *options):
    """The step in two launches: sums of squares, a float64 triple for each run of blocks, then the update, which adds up its layer's.

    params and grads of layers that are adapted are read twice, of the others once, momenta once; what is written is written once. Full
    blocks of what is aligned move 128 bits at once; each combination of dtypes and alignment is a branch that a program takes or not as
    a whole. Segments may begin anywhere: blocks are those of the whole tensor. With a group a third launch makes the [layers, 3] that
    are all-reduced. Tensors of one place with other strides than each other's, or with gaps, go through contiguous copies made by torch.
    A CUDA graph can be captured after one call on the same tensors, which brings the table of their addresses to the device.
    """
    lr, momentum, weight_decay, trust_coefficient, eps, denominator, adapt, *switches, skip, segments, group_name = options
    with torch.cuda.device_of(params[0]), _chunks.flat(params, grads, momenta, written=(0, 2)) as lists:
        table = _chunks.table(lists, block=BLOCK, most=RUNS, segments=segments, adapt=adapt)
        constants = {"KINDS": table.kinds, "BLOCK": BLOCK, "num_warps": 8}
        memory, decay = (table.rows, table.owners), _tl.two_floats(weight_decay)
        partials = torch.empty((table.programs, 3), dtype=torch.float64, device=params[0].device)
        _tl.launch(_partial_sums, (table.programs,), *memory, partials, *decay, **constants)
        sums = None
        if group_name:
            sums = partials.new_empty((len(adapt), 3))
            _tl.launch(_merge_sums, (len(adapt),), partials, table.layers, sums, BLOCK_P=BLOCK_P, num_warps=4)
            sums = all_reduce(sums, "sum", group_name)
        constants |= dict(zip(("LR_IN_MOMENTUM", "NESTEROV", "CLIP"), switches, strict=True))
        constants |= {"NORM_OF_SUM": denominator == "norm_of_sum", "BLOCK_P": BLOCK_P}
        numbers = (lr, momentum, *decay, trust_coefficient, eps)
        _tl.launch(_update, (table.programs,), *memory, partials, table.layers, sums, skip, *numbers, **constants)


@triton.jit
def _square_sum(x):
    """Sum of x^2 in float64. A power of two is taken out first: no square of a float32 overflows or vanishes."""
    exponent = tl.max(tl.abs(x), 0).to(tl.int32, bitcast=True) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    x = x * ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    power = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
    return tl.sum(x * x, 0).to(tl.float64) * (power * power)


@triton.jit
def _squares(row, begin, k, mask, decay_high, decay_low, LAYOUT: tl.constexpr):
    """Sums of w^2, g^2 and (g + weight_decay w)^2 over one block."""
    w = tl.load(_chunks.numbers(row, 0, LAYOUT) + begin + k, mask=mask).to(tl.float32)
    g = tl.load(_chunks.numbers(row, 1, LAYOUT) + begin + k, mask=mask).to(tl.float32)
    if mask is not None:
        w = tl.where(mask, w, 0.0)
        g = tl.where(mask, g, 0.0)
    return _square_sum(w), _square_sum(g), _square_sum(_tl.logits(w, g, decay_high, decay_low))


@triton.jit
def _run_squares(row, decay_high, decay_low, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """The same over this program's run of blocks; zeros where the layer is not adapted, and nobody asks."""
    first, blocks, start, stop = _chunks.own_run(row, BLOCK)
    blocks = tl.where(tl.load(row + _chunks.ADAPTED) != 0, blocks, 0)
    k = tl.arange(0, BLOCK)
    w, g, both = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for block in range(0, blocks):
        begin = (first + block) * BLOCK
        if (begin >= start) & (begin + BLOCK <= stop):
            sums = _squares(row, begin, k, None, decay_high, decay_low, LAYOUT)
        else:
            sums = _squares(row, begin, k, (begin + k >= start) & (begin + k < stop), decay_high, decay_low, LAYOUT)
        w += sums[0]
        g += sums[1]
        both += sums[2]
    return w, g, both


@triton.jit
def _partial_sums(
    rows_ptr, owners_ptr, partial_ptr, decay_high, decay_low, KINDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums of w^2, g^2 and (g + weight_decay w)^2 of each program's run of blocks."""
    row = _chunks.own_row(rows_ptr, owners_ptr)
    kind = tl.load(row + _chunks.KIND)
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i]:
            w, g, both = _run_squares(row, decay_high, decay_low, KINDS[i], BLOCK)
            here = partial_ptr + tl.program_id(0).to(tl.int64) * 3
            tl.store(here, w)
            tl.store(here + 1, g)
            tl.store(here + 2, both)


@triton.jit
def _layer_sums(partial_ptr, layers_ptr, layer, BLOCK_P: tl.constexpr):
    """The three sums of a layer, in the order of its programs."""
    first, last = tl.load(layers_ptr + layer), tl.load(layers_ptr + layer + 1)
    p = tl.arange(0, BLOCK_P)
    w, g, both = tl.zeros([BLOCK_P], tl.float64), tl.zeros([BLOCK_P], tl.float64), tl.zeros([BLOCK_P], tl.float64)
    for start in range(first, last, BLOCK_P):
        here, mask = partial_ptr + (start + p) * 3, start + p < last
        w += tl.load(here, mask=mask, other=0.0)
        g += tl.load(here + 1, mask=mask, other=0.0)
        both += tl.load(here + 2, mask=mask, other=0.0)
    return tl.sum(w, 0), tl.sum(g, 0), tl.sum(both, 0)


@triton.jit
def _merge_sums(partial_ptr, layers_ptr, sums_ptr, BLOCK_P: tl.constexpr):
    """[layers, 3] from the partial sums of this process; 0 where it has nothing of a layer."""
    layer = tl.program_id(0)
    w, g, both = _layer_sums(partial_ptr, layers_ptr, layer, BLOCK_P)
    tl.store(sums_ptr + layer * 3, w)
    tl.store(sums_ptr + layer * 3 + 1, g)
    tl.store(sums_ptr + layer * 3 + 2, both)


@triton.jit
def _ratio_and_decay(
    w, g, both, lr, decay_high, decay_low, trust_coefficient, eps, NORM_OF_SUM: tl.constexpr, CLIP: tl.constexpr
):  # fmt: skip
    """What g + decay w of an adapted layer is multiplied by, and that decay in two floats, from sums of squares."""
    w, g = tl.sqrt(w), tl.sqrt(both if NORM_OF_SUM else g)
    below = g
    if not NORM_OF_SUM:
        below = g + (w * decay_high + w * decay_low)
    ratio = trust_coefficient * w / (below + eps)
    if CLIP:
        ratio = ratio / lr
        ratio = tl.where(ratio > 1, 1.0, ratio)
    adapted = (w > 0) & (g > 0)
    if not NORM_OF_SUM:
        decay_high, decay_low = tl.where(adapted, decay_high, 0.0), tl.where(adapted, decay_low, 0.0)
    return tl.where(adapted, ratio, 1.0).to(tl.float32), decay_high, decay_low


@triton.jit
def _update_numbers(
    row, begin, k, mask, ratio, lr, momentum, decay_high, decay_low,
    LAYOUT: tl.constexpr, LR_IN_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """w and its momentum m after the step, one block."""
    w_ptr = _chunks.numbers(row, 0, LAYOUT) + begin + k
    m_ptr = _chunks.numbers(row, 2, LAYOUT) + begin + k
    w = tl.load(w_ptr, mask=mask).to(tl.float32)
    g = tl.load(_chunks.numbers(row, 1, LAYOUT) + begin + k, mask=mask).to(tl.float32)
    m = tl.load(m_ptr, mask=mask).to(tl.float32)
    d = _tl.logits(w, g, decay_high, decay_low) * ratio
    if LR_IN_MOMENTUM:
        d = d * lr
    m = tl.fma(m, momentum, d)
    step = m
    if NESTEROV:
        step = tl.fma(m, momentum, d)
    w = w - step if LR_IN_MOMENTUM else tl.fma(step, -lr, w)
    tl.store(w_ptr, w.to(w_ptr.dtype.element_ty), mask=mask)
    tl.store(m_ptr, m.to(m_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _update_run(
    row, first, blocks, start, stop, numbers,
    LAYOUT: tl.constexpr, LR_IN_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same, block by block."""
    k = tl.arange(0, BLOCK)
    for block in range(0, blocks):
        begin = (first + block) * BLOCK
        if (begin >= start) & (begin + BLOCK <= stop):
            _update_numbers(row, begin, k, None, *numbers, LAYOUT, LR_IN_MOMENTUM, NESTEROV)
        else:
            mask = (begin + k >= start) & (begin + k < stop)
            _update_numbers(row, begin, k, mask, *numbers, LAYOUT, LR_IN_MOMENTUM, NESTEROV)


@triton.jit
def _update(
    rows_ptr, owners_ptr, partial_ptr, layers_ptr, sums_ptr, skip_ptr, lr, momentum, decay_high, decay_low, trust_coefficient, eps,
    KINDS: tl.constexpr, LR_IN_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, CLIP: tl.constexpr, NORM_OF_SUM: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The step over each program's run of blocks. sums_ptr: sums of whole layers, where others share them; None, and it makes them."""
    row = _chunks.own_row(rows_ptr, owners_ptr)
    kind, layer = tl.load(row + _chunks.KIND), tl.load(row + _chunks.LAYER)
    first, blocks, start, stop = _chunks.own_run(row, BLOCK)
    if skip_ptr is not None:
        blocks = tl.where(tl.load(skip_ptr) != 0, 0, blocks)
    ratio = tl.full((), 1.0, tl.float32)
    if tl.load(row + _chunks.ADAPTED) != 0:
        if sums_ptr is None:
            w, g, both = _layer_sums(partial_ptr, layers_ptr, layer, BLOCK_P)
        else:
            w, g, both = tl.load(sums_ptr + layer * 3), tl.load(sums_ptr + layer * 3 + 1), tl.load(sums_ptr + layer * 3 + 2)
        ratio, decay_high, decay_low = _ratio_and_decay(
            w, g, both, lr, decay_high, decay_low, trust_coefficient, eps, NORM_OF_SUM, CLIP
        )  # fmt: skip
    numbers = (ratio, lr, momentum, decay_high, decay_low)
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i]:
            _update_run(row, first, blocks, start, stop, numbers, KINDS[i], LR_IN_MOMENTUM, NESTEROV, BLOCK)
