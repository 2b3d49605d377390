"""When and how does ema_update_ run on Triton? One launch, whatever the tensors are."""

import torch

from fuseer.kernels import _chunks, _tl
from fuseer.kernels._tl import tl, triton

BLOCK = 2048


def unsupported(teacher, student, momentum, momentum_scalar, shadow):
    return _tl.refusal_of_lists(teacher=teacher, student=student, shadow=shadow)


def forward(teacher, student, momentum, momentum_scalar, shadow):
    """The update in one launch. Every number is read once and written once, 128 bits at once in full blocks of what is aligned.

    Each combination of dtypes and alignment among the tensors is a branch of the kernel, which a program takes or not as a whole.
    Tensors of one place with other strides than each other's, or with gaps, go through contiguous copies made by torch.
    A CUDA graph can be captured after one call on the same tensors, which brings the table of their addresses to the device.
    """
    with torch.cuda.device_of(teacher[0]), _chunks.flat(teacher, student, shadow, written=(0, 2)) as lists:
        table = _chunks.table(lists, block=BLOCK)
        arguments = (table.rows, table.owners, momentum, 1 - momentum, momentum_scalar)
        _tl.launch(_update, (table.programs,), *arguments, KINDS=table.kinds, BLOCK=BLOCK, num_warps=8)


@triton.jit
def _update(rows_ptr, owners_ptr, m, rest, momentum_ptr, KINDS: tl.constexpr, BLOCK: tl.constexpr):
    """teacher = m teacher + rest student, one block; m and rest = 1 - m are those of momentum_ptr where there is one."""
    row = _chunks.own_row(rows_ptr, owners_ptr)
    kind = tl.load(row + _chunks.KIND)
    if momentum_ptr is not None:
        momentum = tl.load(momentum_ptr)
        m = momentum.to(tl.float32)
        rest = (1 - momentum).to(tl.float32)
    for i in tl.static_range(len(KINDS)):
        if kind == KINDS[i]:
            _update_block(row, m, rest, KINDS[i], BLOCK)


@triton.jit
def _update_block(row, m, rest, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    begin = (tl.load(row + _chunks.ORIGIN) + tl.program_id(0)) * BLOCK
    start, stop = tl.load(row + _chunks.START), tl.load(row + _chunks.STOP)
    k = tl.arange(0, BLOCK)
    if (begin >= start) & (begin + BLOCK <= stop):
        _update_numbers(row, begin, k, m, rest, None, LAYOUT)
    else:
        _update_numbers(row, begin, k, m, rest, (begin + k >= start) & (begin + k < stop), LAYOUT)


@triton.jit
def _update_numbers(row, begin, k, m, rest, mask, LAYOUT: tl.constexpr):
    t_ptr = _chunks.numbers(row, 0, LAYOUT) + begin + k
    t = tl.load(t_ptr, mask=mask).to(tl.float32)
    s = tl.load(_chunks.numbers(row, 1, LAYOUT) + begin + k, mask=mask).to(tl.float32)
    # two-sided: m = 0 gives the student and m = 1 the teacher, to the bit
    t = tl.fma(t, m, rest * s)
    tl.store(t_ptr, t.to(t_ptr.dtype.element_ty), mask=mask)
    shadow_ptr = _chunks.numbers(row, 2, LAYOUT)
    if shadow_ptr is not None:
        tl.store(shadow_ptr + begin + k, t.to(shadow_ptr.dtype.element_ty), mask=mask)
