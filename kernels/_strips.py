"""How do Triton kernels compare rows too wide for a program with rows? Torch multiplies, a strip of rows at a time."""

import torch

from fuseer.kernels import _tl
from fuseer.kernels._tl import tl, triton

# what a strip of products may take, and how many of them a program weighs at once
STRIP_BYTES = 64 << 20
STRIP_BLOCK = 4096


def run_of_columns(products):
    """How many columns of a row a program takes at once, and its warps."""
    return {"BLOCK_M": min(STRIP_BLOCK, max(16, _tl.power_of_two(products.shape[1]))), "num_warps": 8}


def strips(contrast):
    """(first row, rows after the last, products of those rows with all columns in float32), a bounded strip of rows at a time."""
    rows, columns = contrast.x.shape[0], contrast.y.shape[0]
    each = max(1, STRIP_BYTES // (4 * max(1, columns)))
    for begin in range(0, rows, each):
        end = min(begin + each, rows)
        yield begin, end, product(contrast.x[begin:end], contrast.y.t())


def weights_like(products, y):
    """Memory for the weights of a strip: the products' own, which they replace, or half of it for bfloat16 rows y."""
    return torch.empty_like(products, dtype=torch.bfloat16) if y.dtype == torch.bfloat16 else products


def product(a, b):
    """a @ b in float32; torch.backends decide what a product of float32 may round."""
    if a.dtype == b.dtype != torch.float32 and a.device.type != "cpu" and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def sweep(contrast, x_inverse, y_inverse, gradient):
    """What `_contrast.sweep` returns, of rows of any width: one span, products by torch."""
    x = contrast.x
    sums = torch.empty((1, x.shape[0]), dtype=torch.float32, device=x.device)
    tops = None if contrast.fixed else torch.empty_like(sums)
    o = sums.new_empty((*sums.shape, contrast.width)) if gradient else None
    constants = {name: contrast.constants[name] for name in ("VIEWS", "NORMALIZE", "FIXED")}
    for begin, end, products in strips(contrast):
        weights = weights_like(products, contrast.y) if gradient else None
        arguments = (products, x_inverse, y_inverse, *contrast.sizes, begin, *contrast.scales, tops, sums, weights)
        options = run_of_columns(products)
        _tl.launch(_strip_sums, (end - begin,), *arguments, **constants, **options)
        if gradient:
            o[0, begin:end] = product(weights, contrast.y)
    return tops, sums, o


@triton.jit
def strip_logits(
    s_ptr, x_inverse_ptr, y_inverse_ptr, index_ptr, N, M, first, begin, high, low, m, VIEWS: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    """Logits of this program's row of a strip at columns m, -inf beyond M and where it is not compared; its column, that of its view."""
    row = begin + tl.program_id(0)
    z = tl.load(s_ptr + tl.program_id(0).to(tl.int64) * M + m, mask=m < M, other=float("-inf"))
    factor = tl.full((), 1.0, tl.float32)
    if NORMALIZE:
        z = z * tl.load(y_inverse_ptr + m, mask=m < M, other=1.0)
        factor = tl.load(x_inverse_ptr + row)
    z = z * _tl.divided(factor, high, low)
    own, other = first + row, first + (row + N) % (2 * N)
    if VIEWS == 2:
        z = tl.where((m == own) | (m == other), float("-inf"), z)
    elif index_ptr is not None:
        z = tl.where(m == tl.load(index_ptr + row), float("-inf"), z)
    return tl.where(m < M, z, float("-inf")), own, other


@triton.jit
def _strip_sums(
    s_ptr, x_inverse_ptr, y_inverse_ptr, index_ptr, N, M, first, begin, high, low, shift, tops_ptr, sums_ptr, w_ptr,
    VIEWS: tl.constexpr, NORMALIZE: tl.constexpr, FIXED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of one row of a strip of products and, where there is memory for them, its weights."""
    row = begin + tl.program_id(0)
    top = tl.full((), shift if FIXED else _tl.LOWEST, tl.float32)
    if not FIXED:
        tops = tl.full([BLOCK_M], _tl.LOWEST, tl.float32)
        for start in range(0, M, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            z, _, _ = strip_logits(s_ptr, x_inverse_ptr, y_inverse_ptr, index_ptr, N, M, first, begin, high, low, m, VIEWS, NORMALIZE)
            tops = tl.maximum(tops, z)
        top = tl.max(tops, 0)
        tl.store(tops_ptr + row, top)
    sums = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        z, _, _ = strip_logits(s_ptr, x_inverse_ptr, y_inverse_ptr, index_ptr, N, M, first, begin, high, low, m, VIEWS, NORMALIZE)
        e = tl.exp2(z - top)
        sums += e
        if w_ptr is not None:
            if NORMALIZE:
                e = e * tl.load(y_inverse_ptr + m, mask=m < M, other=1.0)
            tl.store(w_ptr + tl.program_id(0).to(tl.int64) * M + m, e.to(w_ptr.dtype.element_ty), mask=m < M)
    tl.store(sums_ptr + row, tl.sum(sums, 0))
