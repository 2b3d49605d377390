"""Does interpreted swapped_prediction move the bytes and make the launches that it promises, wherever its crops lie?

Not collected by name: test_interpreted.py runs this file in a process of its own, with TRITON_INTERPRET=1 and the plugin interpreter.
"""

import itertools

import pytest
import torch
from grid import inside, misaligned
from interpreted import FAR, FIRST, RESIDENT, STREAMED, far, measured, nbytes, right, uniform, written_once

from fuseer.kernels import _potentials, _tl
from fuseer.kernels.swapped_prediction import _triton as swapped_prediction
from fuseer.kernels.swapped_prediction.op import RAW, RAW_BACKWARD


def together(x):
    """One tensor [V, B, K]."""
    return [x]


def apart(x):
    """The crops each in memory of its own: dense, off any alignment, inside a wider matrix, and so on round."""
    layouts = (torch.clone, misaligned, inside)
    return [layouts[number % 3](crop) for number, crop in enumerate(x)]


def strided(x):
    """The crops each in memory of its own, with strangers between the numbers of a row and a different stride for each crop."""
    return [torch.full((*crop.shape, 2 + number), torch.nan).to(x.dtype)[..., 1].copy_(crop) for number, crop in enumerate(x)]


MEMORY = pytest.mark.parametrize(
    ("dtype", "lay"),
    [(torch.float32, together), (torch.bfloat16, together), (torch.float16, together), (torch.float32, apart), (torch.bfloat16, strided)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)


@MEMORY
@pytest.mark.parametrize(
    ("v", "b", "k", "q", "assign", "iterations"), [(5, 4, 21, 5, [3, 0], 3), (2, 3, 48, None, [1], 1), (3, 4, 21, 0, [2, 0, 1], 2)]
)
def test_swapped_prediction_reads_what_it_promises(path, dtype, lay, v, b, k, q, assign, iterations):
    scores, A = lay(uniform(v, b, k, dtype=dtype)), len(assign)
    queue = [] if q is None else lay(uniform(A, q, k, dtype=dtype, seed=1))
    args = (scores, queue, assign, 0.05, iterations, 0.1, "")
    found, count = measured(swapped_prediction.forward, *args)
    right(found, RAW["reference"], *args)
    iterating = iterations if path == "resident" else 2 * iterations - 1
    promised = iterations * A + A + v + (0 if path == "resident" else iterations * A)
    crops = _potentials.matrices(scores)
    rows, read = nbytes(crops[0]), [count.of(crop).read for crop in crops]
    assert sum(read) == (iterating * A + A + v) * rows <= promised * rows
    assert read == [(1 + (iterating + 1) * (crop in assign)) * rows for crop in range(v)]
    for stored in _potentials.matrices(queue):
        assert (count.of(stored).read, count.of(stored).read_once) == (iterating * nbytes(stored), nbytes(stored))
    loss, _, statistics, _ = found
    assert count.of(statistics).written == nbytes(statistics)
    written_once(count, loss)
    assert count.kernels == FIRST + (iterations - 1) * (RESIDENT if path == "resident" else STREAMED) + ["_sweep", "_total"]


@MEMORY
@pytest.mark.parametrize(("v", "assign"), [(5, [3, 0]), (2, [1]), (3, [2, 0, 1])])
def test_swapped_prediction_gradient_reads_rows_once(split, dtype, lay, v, assign):
    scores, A = lay(uniform(v, 2, 70, dtype=dtype)), len(assign)
    args = (scores, [], assign, 0.05, 2, 0.1, "")
    found, count = measured(swapped_prediction.forward, *args)
    right(found, RAW["reference"], *args)
    assert count.kernels[-3:] == (["_sweep", "_merge_splits", "_total"] if split else [*RESIDENT, "_sweep", "_total"][-3:])
    _, potentials, statistics, scale = found
    backward = (torch.tensor(1.7), scores, potentials, statistics, scale, assign, 0.05, 0.1)
    gradient, count = measured(swapped_prediction.backward, *backward)
    crops = _potentials.matrices(scores)
    traffic, rows = [count.of(crop) for crop in crops], nbytes(crops[0])
    assert (sum(crop.read for crop in traffic), sum(crop.read_once for crop in traffic)) == ((A + v) * rows, v * rows)
    written_once(count, gradient)
    assert count.kernels == ["_gradient"]
    right(gradient, RAW_BACKWARD["reference"], *backward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_crops_that_lie_apart_give_the_bits_of_one_tensor(split, dtype):
    one = uniform(5, 3, 70, dtype=dtype)
    queue, assign = uniform(2, 4, 70, dtype=dtype, seed=1), [3, 0]
    expected = swapped_prediction.forward(together(one), together(queue), assign, 0.05, 3, 0.1, "")
    backward = (*expected[1:], assign, 0.05, 0.1)
    for lay in (apart, strided):
        found = swapped_prediction.forward(lay(one), lay(queue), assign, 0.05, 3, 0.1, "")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        gradients = [swapped_prediction.backward(torch.ones(()), crops, *backward) for crops in (lay(one), together(one))]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_kernels_are_told_divides_every_row(dtype):
    """On a GPU a promise that is not kept is a fault; the interpreter does not look."""

    def matrix(k, row, offset):
        return torch.empty(offset + 4 * row, dtype=dtype)[offset:].as_strided((4, k), (row, 1))

    size, told = dtype.itemsize, set()
    sizes = itertools.product((3000, 100, 22, 21), (0, 4, 8, 1), (0, 2, 4), ((0, 0), (0, 8), (4, 0), (16, 3)))
    for k, wider, more, offsets in sizes:
        crops = [matrix(k, row, offset) for row, offset in zip((k + wider, k + wider + more), offsets, strict=True)]
        for listed in (_tl.Listed.of(crops), _tl.Listed.of(crops[:1], *crops[1:])):
            assert not any(number % listed.unit for number in (k, *(crop.stride(0) for crop in crops)))
            assert listed.rows[0] * listed.unit == k + wider
            assert not any(row.data_ptr() % listed.align for crop in crops for row in crop)
            told.add(listed.align)
    assert told >= {size, 2 * size, 4 * size, 16}
    # rows that begin at multiples of 16 bytes are said to
    assert _tl.Listed.of([matrix(3000, 3000, 0), matrix(3000, 3016, 16)]).align == 16
    assert not _tl.Listed.of([matrix(4, 4, 0), torch.empty(4, 8, dtype=dtype)[:, ::2]]).contiguous


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(path, axis):
    near = uniform(3, 3, 3, dtype=torch.float16)
    crops, distant = together(near), together(far(near, FAR, axis))
    for assign, where in (([0, 2], distant), ([2], distant), ([2, 0], list(distant[0]))):
        forward = (crops, [], assign, 0.05, 2, 0.1, "")
        expected = swapped_prediction.forward(*forward)
        found, _ = measured(swapped_prediction.forward, where, *forward[1:])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        backward = (*expected[1:], assign, 0.05, 0.1)
        gradient, _ = measured(swapped_prediction.backward, torch.ones(()), where, *backward)
        assert torch.equal(gradient, swapped_prediction.backward(torch.ones(()), crops, *backward))
    queued = (crops, distant, [0, 2, 1], 0.05, 2, 0.1, "")
    found, _ = measured(swapped_prediction.forward, *queued)
    assert torch.equal(found[0], swapped_prediction.forward(crops, crops, *queued[2:])[0])
