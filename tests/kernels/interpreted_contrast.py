"""Do the Triton kernels of nt_xent and info_nce, interpreted, move the bytes and make the launches that they promise, on every path?

Not collected by name: test_interpreted.py runs this file in a process of its own, with TRITON_INTERPRET=1 and the plugin interpreter.
"""

import math

import pytest
import torch
from interpreted import DTYPES, measured, nbytes, right, uniform, written_once

from fuseer.kernels import _contrast, _strips, _tl
from fuseer.kernels.info_nce import _triton as info_nce
from fuseer.kernels.info_nce import reference as info_nce_reference
from fuseer.kernels.nt_xent import _triton as nt_xent
from fuseer.kernels.nt_xent import reference as nt_xent_reference

BLOCK = 16
COLD = 0.02


@pytest.fixture(params=["whole rows", "rows in parts"])
def whole(request, monkeypatch):
    """Whether a program holds its rows whole, on blocks so small that tiny shapes fill several, and one that no shape fills."""
    small_blocks(monkeypatch, whole=request.param == "whole rows")
    return request.param == "whole rows"


def small_blocks(monkeypatch, whole=True, multiprocessors=1):
    def tile(contrast, target):
        block_k = contrast.constants["BLOCK_D"] if whole else BLOCK
        return {"BLOCK_N": BLOCK, "BLOCK_M": 2 * BLOCK, "BLOCK_K": block_k, "num_warps": 1, "num_stages": 1}

    monkeypatch.setattr(_contrast, "tile", tile)
    monkeypatch.setattr(_contrast, "row_tile", lambda width: {"BLOCK_N": 2, "num_warps": 1})
    monkeypatch.setattr(_contrast, "BLOCK_S", 2)
    square = {"BLOCK_N": BLOCK, "BLOCK_K": BLOCK, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(nt_xent, "_triangle_tile", lambda contrast, target: square)
    monkeypatch.setattr(_tl, "BLOCKS_A_SPLIT", 1 if multiprocessors > 1 else 100)
    monkeypatch.setattr(_tl, "target", lambda device: _tl.Target((9, 0), multiprocessors))


def narrow_strips(monkeypatch, columns):
    """Every row is too wide for a program; strips of three rows, runs of eight columns."""
    monkeypatch.setattr(_contrast, "FUSED_D", 0)
    monkeypatch.setattr(_strips, "STRIP_BYTES", 3 * 4 * columns)
    monkeypatch.setattr(_strips, "STRIP_BLOCK", BLOCK)


def as_returned(found, dtype):
    """(loss, gradients) of a raw op with the gradients in the dtype in which the op returns them."""
    return found[0], *(x.to(dtype) for x in found[1:])


def given(count, shape, dtype=torch.float32):
    """The tensors of that shape and dtype that kernels were given, each once."""
    return list({x.data_ptr(): x for x in count.given if tuple(x.shape) == shape and x.dtype == dtype}.values())


def views(n, d, dtype):
    first = uniform(n, d, dtype=dtype)
    return first, first + uniform(n, d, dtype=dtype, seed=1)


@DTYPES
@pytest.mark.parametrize(("n", "d", "temperature"), [(20, 21, 0.1), (9, 32, -0.5), (8, 33, 0.1), (1, 17, 1.0)])
def test_nt_xent_makes_half_of_all_products_for_the_loss(whole, dtype, n, d, temperature):
    args = (*views(n, d, dtype), temperature, True, False, True, "")
    found, count = measured(nt_xent.forward, *args)
    right(as_returned(found, dtype), nt_xent_reference.forward, *args)
    written_once(count, *found)
    assert count.kernels == ["_inverse_norms", "_triangle", "_outcomes", "_total", "_row_gradient", "_merge_gradient"]
    (rows,) = given(count, (2 * n, d), dtype)[:1]
    squares, blocks, tiles = math.ceil(2 * n / BLOCK), math.ceil(n / BLOCK), math.ceil(n / BLOCK)
    # norms; both sides of every square of the triangle; each row and its other view; the gradient's rows; the last projection
    once = 1 + (squares + 1) + 2 + (1 if whole else tiles) + 1
    assert count.of(rows).read == (once + (1 if whole else 2) * 2 * blocks) * nbytes(rows)
    assert not [x for x in count.given if x.numel() >= max(100, 4 * n * n) and x.shape[-1] != d]


@pytest.mark.parametrize("options", [(COLD, True), (0.5, False)], ids=["cold", "dot products"])
@DTYPES
def test_nt_xent_without_a_shift_sweeps_whole_rows(whole, dtype, options):
    n, d = 20, 21
    args = (*views(n, d, dtype), *options, False, True, "")
    found, count = measured(nt_xent.forward, *args)
    right(as_returned(found, dtype), nt_xent_reference.forward, *args)
    written_once(count, *found)
    norms = ["_inverse_norms"] if options[1] else []
    assert count.kernels == [*norms, "_sweep", "_outcomes", "_total", "_row_gradient", "_merge_gradient"]
    rows = given(count, (2 * n, d), dtype)[0]
    tiles, blocks = math.ceil(n / BLOCK), math.ceil(n / BLOCK)
    sweeps = 2 * (1 if whole else tiles) + 2 * blocks + (1 if whole else 2) * 2 * blocks
    assert count.of(rows).read == (len(norms) + 2 + 1 + sweeps) * nbytes(rows)


def test_nt_xent_with_one_shift_sweeps_rows_where_the_triangle_leaves_too_much(whole, monkeypatch):
    args = (*views(20, 21, torch.float32), 0.1, True, False, True, "")
    expected = nt_xent.forward(*args)
    monkeypatch.setattr(nt_xent, "TRIANGLE_BYTES", 0)
    found, count = measured(nt_xent.forward, *args)
    right(found, nt_xent_reference.forward, *args)
    assert "_sweep" in count.kernels and "_triangle" not in count.kernels
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@DTYPES
@pytest.mark.parametrize("temperature", [0.1, COLD])
def test_columns_are_split_where_rows_are_few(monkeypatch, dtype, temperature):
    small_blocks(monkeypatch, multiprocessors=100)
    args = (*views(40, 5, dtype), temperature, True, False, True, "")
    found, count = measured(nt_xent.forward, *args)
    right(as_returned(found, dtype), nt_xent_reference.forward, *args)
    assert dict(count.launches)["_row_gradient"] == (6, 2)
    query, keys = uniform(3, 5, dtype=dtype), uniform(150, 5, dtype=dtype, seed=1)
    args = (query, keys, None, torch.tensor([149, 0, 70]), temperature, True, True, "")
    found, count = measured(info_nce.forward, *args)
    right(as_returned(found, dtype), info_nce_reference.forward, *args)
    assert dict(count.launches)["_sweep"] == (1, 4)


@DTYPES
@pytest.mark.parametrize(("temperature", "normalize"), [(0.1, True), (COLD, True), (0.5, False)])
def test_nt_xent_of_wide_rows_makes_strips(monkeypatch, dtype, temperature, normalize):
    n, d = 5, 21
    small_blocks(monkeypatch)
    narrow_strips(monkeypatch, 2 * n)
    args = (*views(n, d, dtype), temperature, normalize, False, True, "")
    found, count = measured(nt_xent.forward, *args)
    right(as_returned(found, dtype), nt_xent_reference.forward, *args)
    written_once(count, *found)
    norms = ["_inverse_norms"] if normalize else []
    strips = 4
    assert count.kernels == [*norms, *strips * ["_strip_sums"], "_outcomes", "_total", *strips * ["_strip_weights"], "_merge_gradient"]
    assert max(x.numel() for x in count.given if x.shape[-1:] == (2 * n,)) == 3 * 2 * n
    for products in (x for x in count.given if x.shape == (3, 2 * n) and x.dtype == torch.float32):
        assert count.of(products).read in ((1 if temperature == 0.1 else 2) * nbytes(products), nbytes(products))


@DTYPES
@pytest.mark.parametrize("indexed", [False, True], ids=["positive", "indexed"])
@pytest.mark.parametrize(("n", "q", "d", "temperature"), [(9, 40, 21, 0.2), (16, 32, 32, COLD), (1, 1, 17, -0.3)])
def test_info_nce_reads_keys_once(whole, dtype, indexed, n, q, d, temperature):
    query, keys = uniform(n, d, dtype=dtype), uniform(q, d, dtype=dtype, seed=1)
    positive = None if indexed else uniform(n, d, dtype=dtype, seed=2)
    index = torch.arange(n).flip(0) % q if indexed else None
    args = (query, keys, positive, index, temperature, True, True, "")
    found, count = measured(info_nce.forward, *args)
    right(as_returned(found, dtype), info_nce_reference.forward, *args)
    written_once(count, *found)
    assert count.kernels == ["_inverse_norms", "_sweep", "_finish", "_total"]
    # rows in parts are loaded for the products and once more, from the cache, for their sum
    once = nbytes(keys) + (n * d * keys.element_size() if indexed else 0)
    assert (count.of(keys).read, count.of(keys).read_once) == (once + (0 if whole else nbytes(keys)), nbytes(keys))
    assert count.of(query).read == (2 + (1 if whole else math.ceil(q / (2 * BLOCK)))) * nbytes(query)
    if not indexed:
        assert (count.of(positive).read, count.of(positive).read_once) == (nbytes(positive), nbytes(positive))
    loss, count = measured(info_nce.forward, *args[:6], False, "")
    assert torch.equal(loss[0], found[0]) and loss[1].shape == (0,)
    assert count.of(keys).read == once


@DTYPES
@pytest.mark.parametrize(("temperature", "normalize"), [(0.2, True), (COLD, True), (0.5, False)])
def test_info_nce_of_wide_rows_makes_strips(monkeypatch, dtype, temperature, normalize):
    n, q, d = 7, 20, 21
    small_blocks(monkeypatch)
    narrow_strips(monkeypatch, q)
    query, keys, positive = (uniform(size, d, dtype=dtype, seed=seed) for seed, size in enumerate((n, q, n)))
    args = (query, keys, positive, None, temperature, normalize, True, "")
    found, count = measured(info_nce.forward, *args)
    right(as_returned(found, dtype), info_nce_reference.forward, *args)
    written_once(count, *found)
    norms = 2 * ["_inverse_norms"] if normalize else []
    assert count.kernels == [*norms, *3 * ["_strip_sums"], "_finish", "_total"]
    assert max(x.numel() for x in count.given if x.shape[-1:] == (q,)) == 3 * q


def test_rows_of_nothing_and_norms_below_the_clamp(whole):
    for temperature in (0.1, COLD):
        z1, z2 = views(5, 7, torch.float32)
        z1[2], z2[3], z1[4] = 0, 1e-20, 1e-13
        args = (z1, z2, temperature, True, False, True, "")
        right(measured(nt_xent.forward, *args)[0], nt_xent_reference.forward, *args)
        args = (z1, z2, z2.flip(0), None, temperature, True, True, "")
        right(measured(info_nce.forward, *args)[0], info_nce_reference.forward, *args)


def test_a_loss_near_zero_keeps_its_digits():
    """Views that agree and rows that do not: 1e-7 of the loss, where a sum that has the positive in it would leave nothing."""
    z = torch.eye(4)
    loss, dz1, _ = nt_xent.forward(z, z, 0.05, True, False, True, "")
    expected = math.log1p(6 * math.exp(-20))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert dz1.isfinite().all()
    loss, dquery = info_nce.forward(z, -z, z, None, 0.1, True, True, "")
    assert loss.item() == pytest.approx(math.log1p(3 * math.exp(-10) + math.exp(-20)), rel=1e-5)
    assert dquery.isfinite().all()


def test_statistics_are_those_that_ranks_exchange():
    for temperature in (0.1, COLD, -0.5):
        z1, z2 = views(6, 5, torch.float32)
        rows = torch.cat([z1, z2])
        contrast = _contrast.Contrast(rows, rows, temperature, True, views=2)
        inverse = _contrast.inverse_norms(rows, True)
        statistics, misses, _ = nt_xent._statistics(contrast, *nt_xent._sums(contrast, inverse, ""))
        unit = torch.nn.functional.normalize(rows.double())
        top, total = statistics.double()[:, None].unbind(-1)
        logits = (unit @ unit.T).fill_diagonal_(-torch.inf if temperature > 0 else torch.inf)
        found = ((logits - top) / temperature).exp() / total
        truth = (logits / temperature).softmax(-1)
        torch.testing.assert_close(found, truth, rtol=2e-5, atol=1e-7)
        positive = truth.gather(1, torch.arange(12).roll(6)[:, None])[:, 0]
        torch.testing.assert_close(misses.double(), 1 - positive, rtol=2e-5, atol=1e-9)


def test_refusals_in_words():
    z = uniform(2, 3)
    assert nt_xent.unsupported(z, z, 0.1, True, False, True, "") is None
    assert nt_xent.unsupported(z, z.double(), 0.1, True, False, True, "") == "its arithmetic is float32 and z2 is float64"
    wide = torch.empty(1, 1).expand(1, 16385)
    assert "rows of up to 16384 values and keys are [1, 16385]" in info_nce.unsupported(z, wide, None, None, 0.1, True, True, "")
    with pytest.raises(ValueError, match="positive_index must be in 0..1; got 0..2"):
        info_nce.forward(z, z, None, torch.tensor([0, 2]), 0.1, True, True, "")
