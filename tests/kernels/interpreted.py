"""Do the Triton kernels, interpreted, move the bytes and make the launches that they promise, on every path?

Not collected by name: test_interpreted.py runs this file in a process of its own, with TRITON_INTERPRET=1 and the plugin interpreter.
"""

import pytest
import torch
import triton
import triton.language as tl
from grid import poisoned_memory
from interpreter import counted
from torch.utils._pytree import tree_map

from fuseer.kernels import _potentials, _tl, dispatch
from fuseer.kernels.sinkhorn import _triton as sinkhorn
from fuseer.kernels.sinkhorn import reference as sinkhorn_reference
from fuseer.kernels.soft_xent import _triton as soft_xent
from fuseer.kernels.soft_xent import reference as soft_xent_reference
from fuseer.kernels.swapped_prediction import _triton as swapped_prediction
from fuseer.kernels.testing import error_vs_eager

FIRST, RESIDENT = ["_first_partials", "_merge_first"], ["_resident_partials", "_merge_sums"]
STREAMED = ["_row_statistics", "_streamed_partials", "_merge_sums"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# two steps of it reach offsets that 32 bits do not hold, though they hold the step; memory that nothing touches costs nothing
FAR = 2**30 + 16


def small_blocks(monkeypatch, multiprocessors=2):
    monkeypatch.setattr(_potentials, "TILE", 64)
    monkeypatch.setattr(_potentials, "SEGMENT", 32)
    monkeypatch.setattr(_potentials, "MERGE", {"BLOCK_P": 4, "BLOCK_K": 16, "num_warps": 1})
    for op in (swapped_prediction, soft_xent):
        monkeypatch.setattr(op, "TILE", 16)
    monkeypatch.setattr(swapped_prediction, "BLOCK_B", 2)
    monkeypatch.setattr(_tl, "BLOCKS_A_SPLIT", 2)
    monkeypatch.setattr(_tl, "target", lambda device: _tl.Target((0, 0), multiprocessors))


def uniform(*shape, dtype=torch.float32, seed=0):
    return (2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1).to(dtype)


def nbytes(x):
    return x.numel() * x.element_size()


def measured(body, *args):
    """(what the body returns, the count of its launches), on memory in which everything that nobody wrote is NaN."""
    with poisoned_memory(), counted() as count:
        return body(*args), count


def right(found, reference, *args):
    """The verdict on each output of a raw body against its reference."""

    def run(dtype):
        return reference(*tree_map(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, args))

    every = (x if isinstance(x, tuple) else (x,) for x in (found, run(torch.float32), run(torch.float64)))
    for mine, eager, truth in zip(*every, strict=True):
        verdict = error_vs_eager(mine, eager, truth)
        assert verdict, verdict


def written_once(count, *outputs):
    """Every element of each output is written, once, and read by no kernel."""
    for x in outputs:
        traffic = count.of(x)
        assert (traffic.written, traffic.written_once, traffic.read) == (nbytes(x), nbytes(x), 0)


@DTYPES
@pytest.mark.parametrize(("heads", "n", "k", "iterations"), [(1, 66, 21, 2), (2, 9, 16, 1), (3, 5, 1, 4)])
def test_sinkhorn_reads_what_it_promises(path, dtype, heads, n, k, iterations):
    scores = uniform(heads, n, k, dtype=dtype)
    codes, count = measured(sinkhorn.forward, scores, 0.05, iterations, "")
    right(codes, sinkhorn_reference.sinkhorn, scores, 0.05, iterations, "")
    reads = iterations + 1 if path == "resident" else 2 * iterations + 1
    assert (count.of(scores).read, count.of(scores).read_once) == (reads * nbytes(scores), nbytes(scores))
    written_once(count, codes)
    steps = RESIDENT if path == "resident" else STREAMED
    last = ["_resident_codes"] if path == "resident" else ["_row_statistics", "_streamed_codes"]
    assert count.kernels == FIRST + (iterations - 1) * steps + last


def test_statistics_of_few_long_rows_are_merged(monkeypatch):
    small_blocks(monkeypatch, multiprocessors=100)
    monkeypatch.setattr(_potentials, "RESIDENT_K", 0)
    scores = uniform(2, 3, 90)
    codes, count = measured(sinkhorn.forward, scores, 0.05, 2, "")
    right(codes, sinkhorn_reference.sinkhorn, scores, 0.05, 2, "")
    assert (count.of(scores).read, count.of(scores).read_once) == (5 * nbytes(scores), nbytes(scores))
    rows = ["_row_statistics", "_merge_statistics"]
    assert count.kernels == [*FIRST, *rows, "_streamed_partials", "_merge_sums", *rows, "_streamed_codes"]
    assert dict(count.launches)["_row_statistics"] == (1, 4, 2)


def test_infinite_and_absent_numbers(path):
    scores = uniform(1, 9, 21)
    scores[..., 3], scores[:, 2, 5:15] = -torch.inf, -torch.inf
    codes, _ = measured(sinkhorn.forward, scores, 0.05, 3, "")
    right(codes, sinkhorn_reference.sinkhorn, scores, 0.05, 3, "")
    assert (codes[scores == -torch.inf] == 0).all()
    scores[0, 0, 0] = torch.nan
    assert measured(sinkhorn.forward, scores, 0.05, 3, "")[0].isnan().all()


def test_sinkhorn_of_nothing_launches_what_needs_no_rows(path):
    for shape in ((0, 4), (0, 3, 4), (2, 0, 5)):
        codes, count = measured(sinkhorn.forward, torch.empty(shape), 0.05, 3, "")
        assert codes.shape == shape
        assert set(count.kernels) <= {"_merge_first", "_merge_sums"}


@DTYPES
@pytest.mark.parametrize("target", ["plain", "weighted", "tempered", "centred"])
def test_soft_xent_reads_rows_once(split, dtype, target):
    n, k = 3, 70
    logits, rows = 3 * uniform(n, k, dtype=dtype), uniform(n, k, seed=1).abs() / k
    weights = uniform(n, seed=2) if target == "weighted" else None
    center = uniform(k, dtype=dtype, seed=3) if target == "centred" else None
    options = (0.1, weights, center, 0.04 if target in ("tempered", "centred") else None)
    found, count = measured(soft_xent.forward, logits, rows, *options)
    right(found, soft_xent_reference.forward, logits, rows, *options)
    for x in (logits, rows):
        assert (count.of(x).read, count.of(x).read_once) == (nbytes(x), nbytes(x))
    written_once(count, *found)
    assert count.kernels == (["_sweep", "_merge_splits"] if split else ["_sweep"])
    dloss = uniform(n, seed=4)
    gradient, count = measured(soft_xent.backward, dloss, logits, rows, found[1], *options)
    for x in (logits, rows):
        assert (count.of(x).read, count.of(x).read_once) == (nbytes(x), nbytes(x))
    written_once(count, gradient)
    assert count.kernels == ["_gradient"]
    right(gradient, dispatch.differentiated(soft_xent_reference.soft_xent), dloss, logits, rows, *options)


def far(x, stride, axis):
    """x with its values `stride` elements apart along `axis`, in memory that is touched there alone."""
    strides = [1 if n == axis else size for n, size in enumerate(x.stride())]
    strides[axis] = stride
    wide = torch.empty(sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True)) + 1, dtype=x.dtype)
    return wide.as_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(path, axis):
    near = uniform(3, 3, 3, dtype=torch.float16)
    distant = far(near, FAR, axis)
    codes, _ = measured(sinkhorn.forward, distant, 0.05, 2, "")
    assert torch.equal(codes, sinkhorn.forward(near, 0.05, 2, ""))


@pytest.mark.parametrize("axis", [0, 1])
def test_soft_xent_offsets_beyond_32_bits(axis):
    near, target = uniform(3, 3, dtype=torch.float16), uniform(3, 3, dtype=torch.float16, seed=1)
    apart = far(near, FAR, axis)
    for logits, other, swap in ((near, target, False), (target, near, True)):
        options = (0.1, None, None, 0.5)
        expected = soft_xent.forward(logits, other, *options)
        moved = (logits, apart) if swap else (apart, other)
        found, _ = measured(soft_xent.forward, *moved, *options)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        gradient, _ = measured(soft_xent.backward, torch.ones(3), *moved, found[1], *options)
        assert torch.equal(gradient, soft_xent.backward(torch.ones(3), logits, other, expected[1], *options))


def test_an_inverse_in_two_floats():
    for x in (0.05, 0.03, 0.07, 0.1, 1.0, 3.0, 1e-6, 1e6, *torch.rand(200, dtype=torch.float64).add(1e-3).tolist()):
        high, low = _tl.inverse(x)
        assert high == torch.tensor(high).item() <= 1 / x
        assert low == max(1e-37, 1 / x - high)
        assert abs(high + torch.tensor(low).item() - 1 / x) < 1e-14 / x


def test_refusals_in_words():
    scores = uniform(2, 3, 4)
    assert sinkhorn.unsupported(scores, 0.05, 3, "") is None
    assert sinkhorn.unsupported(scores.double(), 0.05, 3, "") == "its arithmetic is float32 and scores is float64"
    assert sinkhorn.unsupported(scores.to("meta"), 0.05, 3, "") == "scores is on meta, not on a CUDA device"
    many = torch.empty(1, 1).expand(_tl.GRID_LIMIT + 1, 1, 1)
    assert "a grid holds 65535 problems" in sinkhorn.unsupported(many, 0.05, 3, "")
    assert "at most 8 assign crops and assign has 9" in swapped_prediction.unsupported([scores], [], list(range(9)), 0.05, 3, 0.1, "")
    assert "weights is float64" in soft_xent.unsupported(scores[0], scores[0], 0.1, scores[0, :, 0].double(), None, None)


@triton.jit
def _toy(x_ptr, y_ptr, N, BLOCK: tl.constexpr, FAULT: tl.constexpr):
    """y = x, with one fault."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n, mask=n < N + (FAULT == "reads beyond"), other=0.0)
    if FAULT == "reads twice":
        x += 0 * tl.load(x_ptr + n, mask=n < N, other=0.0)
    if FAULT == "reads another's":
        x += 0 * tl.load(y_ptr + (n + BLOCK) % N)
    if FAULT == "needs masked lanes":
        x = x + 0 * tl.sum(tl.load(x_ptr + n, mask=n < N), 0)
    mask = n < N
    if FAULT == "writes less":
        mask = n < N - 1
    if FAULT == "writes beyond":
        mask = n < N + 1
    tl.store(y_ptr + (n // 2 if FAULT == "writes twice" else n), x, mask=mask)
    if FAULT == "adds atomically":
        tl.atomic_add(y_ptr + n, x, mask=mask)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("reads beyond", "reads outside its tensors, 1 addresses"),
        ("writes beyond", "writes outside its tensors, 1 addresses"),
        ("reads another's", "_toy: a program reads what another writes"),
        ("writes twice", "_toy writes an element twice"),
        ("adds atomically", "an atomic operation"),
    ],
)
def test_a_fault_is_caught(fault, words):
    # views of longer tensors: what lies beyond them is still ours
    x, y = uniform(16)[:10], uniform(16)[:10]
    with pytest.raises((AssertionError, triton.runtime.errors.InterpreterError), match=words), counted():
        _toy[(3,)](x, y, 10, BLOCK=4, FAULT=fault)


def test_the_count_tells_twice_from_once_and_less_from_all():
    x = uniform(10)
    for fault, read, written in (("none", 40, 40), ("reads twice", 80, 40), ("writes less", 40, 36)):
        y = torch.full((10,), torch.nan)
        with counted() as count:
            _toy[(3,)](x, y, 10, BLOCK=4, FAULT=fault)
        assert (count.of(x).read, count.of(x).read_once, count.of(y).written_once) == (read, 40, written)
        assert count.of(x[::2]).read == read // 2
        assert count.launches == [("_toy", (3,))]
        assert y.isnan().any() == (fault == "writes less")


def test_a_masked_lane_is_no_number():
    y = torch.zeros(10)
    _toy[(3,)](uniform(10), y, 10, BLOCK=4, FAULT="needs masked lanes")
    assert y[:8].isfinite().all()
    assert y[8:].isnan().all()


@triton.jit
def _rounds(x_ptr, y_ptr, z_ptr, half_ptr, sum_ptr, BLOCK: tl.constexpr):
    """half = x in bfloat16; sum = fma(x, y, z)."""
    n = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n)
    tl.store(half_ptr + n, x.to(tl.bfloat16))
    tl.store(sum_ptr + n, tl.fma(x, tl.load(y_ptr + n), tl.load(z_ptr + n)))


def test_the_interpreter_is_mended():
    x, y = uniform(4096), uniform(4096, seed=1)
    x[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1.998, 3.995])
    z = -(x * y)
    half, total = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096)
    _rounds[(1,)](x, y, z, half, total, BLOCK=4096)
    torch.testing.assert_close(half, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(total, (x.double() * y.double() + z.double()).float(), rtol=0, atol=0, equal_nan=True)
