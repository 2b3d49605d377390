"""Do the Triton kernels of the patch ops, interpreted, move the bytes and make the launches that they promise, at any block size?

Not collected by name: test_interpreted.py runs this file in a process of its own, with TRITON_INTERPRET=1 and the plugin interpreter.
"""

import pytest
import torch
from interpreted import DTYPES, FAR, far, measured, nbytes, right, uniform, written_once

from fuseer.kernels import _tl, dispatch
from fuseer.kernels.gather_patches import _triton as gather_patches
from fuseer.kernels.gather_patches import op as gather_patches_op
from fuseer.kernels.gather_patches import reference as gather_patches_reference
from fuseer.kernels.gather_tokens import _triton as gather_tokens
from fuseer.kernels.gather_tokens import reference as gather_tokens_reference
from fuseer.kernels.masked_patch_mse import _triton as masked_patch_mse
from fuseer.kernels.masked_patch_mse import op as masked_patch_mse_op
from fuseer.kernels.masked_patch_mse import reference as masked_patch_mse_reference
from fuseer.kernels.patch_embed_visible import _triton as patch_embed_visible
from fuseer.kernels.patch_embed_visible import op as patch_embed_visible_op
from fuseer.kernels.patch_embed_visible import reference as patch_embed_visible_reference
from fuseer.kernels.patch_mask import _triton as patch_mask
from fuseer.kernels.patch_mask import reference as patch_mask_reference
from fuseer.kernels.unshuffle_tokens import _triton as unshuffle_tokens
from fuseer.kernels.unshuffle_tokens import op as unshuffle_tokens_op
from fuseer.kernels.unshuffle_tokens import reference as unshuffle_tokens_reference


@pytest.fixture(params=["small blocks", "as they are"])
def blocks(request, monkeypatch):
    """Whether tiny shapes fill several blocks, and one that no shape fills; of 4 numbers, or of 2 tokens and 4 columns."""
    if request.param == "as they are":
        return False
    monkeypatch.setattr(_tl, "TOKEN_COLUMNS", 4)
    monkeypatch.setattr(patch_mask, "BLOCK_I", 4)
    monkeypatch.setattr(gather_tokens, "BLOCK_M", 2)
    monkeypatch.setattr(unshuffle_tokens, "BACKWARD_TILE", 8)
    monkeypatch.setattr(unshuffle_tokens, "MERGED", 16)
    monkeypatch.setattr(unshuffle_tokens, "PARTS", 4)
    for op, tile in ((patch_mask, 16), (gather_tokens, 8), (unshuffle_tokens, 8)):
        monkeypatch.setattr(op, "TILE", tile)
    return True


@pytest.fixture(params=["one split", "two splits", "as they are"])
def small_patches(request, monkeypatch):
    """Whether tiny patches and products fill several blocks, and one that none fills; their gradients' rows one span, or two."""
    if request.param == "as they are":
        return ""
    monkeypatch.setattr(gather_patches, "TILE", 4)
    monkeypatch.setattr(gather_patches, "BLOCK_M", 2)
    monkeypatch.setattr(patch_embed_visible, "BLOCK_M", 2)
    monkeypatch.setattr(patch_embed_visible, "MERGED", 16)
    square = {"BLOCK_R": 16, "BLOCK_D": 16, "BLOCK_K": 16, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(patch_embed_visible, "tile", lambda weight, rows: dict(square))
    monkeypatch.setattr(patch_embed_visible, "ROWS_A_SPLIT", 16 if request.param == "two splits" else 100)
    monkeypatch.setattr(_tl, "target", lambda device: _tl.Target((9, 0), 100))
    return request.param


def permutations(B, P, seed=0):
    return torch.rand((B, P), generator=torch.Generator().manual_seed(seed)).argsort(1)


@DTYPES
@pytest.mark.parametrize(("B", "P", "keep"), [(2, 11, 3), (3, 4, 4), (1, 1, 1), (2, 37, 1)])
def test_patch_mask_reads_a_row_for_every_block_of_it(blocks, dtype, B, P, keep):
    noise = (4 * uniform(B, P)).round().to(dtype)
    found, count = measured(patch_mask.forward, noise, keep)
    assert all(torch.equal(x, y) for x, y in zip(found, patch_mask_reference.patch_mask(noise, keep), strict=True))
    written_once(count, *found)
    runs = -(-P // (4 if blocks else 32))
    assert count.launches == [("_ranks", (B, runs))]
    assert count.of(noise).read == (runs + 1) * nbytes(noise)


def test_patch_mask_with_noise_far_apart():
    near = uniform(3, 3, dtype=torch.float16)
    for axis in (0, 1):
        found, _ = measured(patch_mask.forward, far(near, FAR, axis), 2)
        assert all(torch.equal(x, y) for x, y in zip(found, patch_mask.forward(near, 2), strict=True))


@DTYPES
@pytest.mark.parametrize(("B", "P", "M", "D"), [(2, 7, 3, 5), (3, 4, 4, 8), (1, 1, 1, 1), (2, 3, 9, 9)])
def test_gather_tokens_moves_every_row_once(blocks, dtype, B, P, M, D):
    x = uniform(B, P, D, dtype=dtype)
    ids = permutations(B, P)[:, :M] if M <= P else torch.randint(P, (B, M), generator=torch.Generator().manual_seed(0))
    out, count = measured(gather_tokens.forward, x, ids)
    assert torch.equal(out, gather_tokens_reference.gather_tokens(x, ids))
    written_once(count, out)
    assert count.kernels == ["_gather"] and count.of(x).read == nbytes(out)
    dout = uniform(B, M, D, dtype=dtype, seed=1)
    dx, count = measured(gather_tokens.backward, dout, ids, P)
    right(dx, lambda dout: dispatch.differentiated(gather_tokens_reference.gather_tokens)(dout, x.to(dout.dtype), ids), dout)
    written_once(count, dx)
    assert count.kernels == ["_sum_places"] and count.of(dout).read == count.of(dout).read_once == nbytes(dout)


def test_an_id_outside_reads_nothing_and_shows(blocks, monkeypatch):
    """Where nobody looks at ids, as on a GPU unless asked: its row is NaN, its gradient nowhere."""
    monkeypatch.setattr(dispatch, "indices_are_checked", lambda device: False)
    x, ids = uniform(2, 4, 3), torch.tensor([[0, 4, 3], [-1, 2**40, 1]])
    out, _ = measured(gather_tokens.forward, x, ids)
    assert torch.equal(out.isnan().all(2), (ids < 0) | (ids > 3)) and torch.equal(out[0, 2], x[0, 3])
    dx, _ = measured(gather_tokens.backward, torch.ones(2, 3, 3), ids, 4)
    assert torch.equal(dx.sum((1, 2)), torch.tensor([6.0, 3.0]))
    r = torch.tensor([[0, 7, -3], [2**40, 1, 2]])
    out, _ = measured(unshuffle_tokens.forward, uniform(2, 2, 3), r, torch.zeros(3), None)
    assert torch.equal((out == 0).all(2), (r < 0) | (r > 1))
    measured(unshuffle_tokens.backward, uniform(2, 3, 3), r, 2, torch.float32, torch.float32)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_tokens_far_apart(axis):
    near, ids = uniform(3, 3, 3, dtype=torch.float16), permutations(3, 3)
    distant = far(near, FAR, axis)
    for body, rest in (
        (gather_tokens.forward, (torch.tensor([[2, 0], [1, 2], [2, 2]]),)),
        (gather_tokens.backward, (ids, 3)),
        (unshuffle_tokens.forward, (permutations(3, 4), torch.zeros(3), None)),
        (unshuffle_tokens.backward, (ids, 2, torch.float32, torch.float32)),
    ):
        found, expected = (x if isinstance(x, tuple) else (x,) for x in (measured(body, distant, *rest)[0], body(near, *rest)))
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True)), body


@DTYPES
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "none"])
@pytest.mark.parametrize(("B", "P", "keep", "D"), [(3, 7, 2, 5), (2, 4, 0, 8), (2, 5, 5, 3), (1, 1, 1, 1)])
def test_unshuffle_tokens_reads_kept_rows_once(blocks, dtype, positions, B, P, keep, D):
    x, token, pos = uniform(B, keep, D, dtype=dtype), uniform(D, dtype=dtype, seed=1), uniform(P, D, dtype=dtype, seed=2)
    args = (x, permutations(B, P), token, pos if positions else None)
    out, count = measured(unshuffle_tokens.forward, *args)
    right(out, unshuffle_tokens_reference.unshuffle_tokens, *args)
    written_once(count, out)
    assert count.kernels == ["_unshuffle"] and count.of(x).read == nbytes(x)
    assert not positions or count.of(pos).read == B * nbytes(pos)


@DTYPES
@pytest.mark.parametrize("images_a_split", [100, 2], ids=["whole", "split"])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "none"])
@pytest.mark.parametrize(("B", "P", "keep", "D"), [(9, 7, 2, 5), (4, 5, 0, 3), (8, 3, 3, 9), (1, 1, 1, 1)])
def test_unshuffle_tokens_sums_in_a_fixed_order(blocks, monkeypatch, dtype, images_a_split, positions, B, P, keep, D):
    monkeypatch.setattr(_tl, "BLOCKS_A_SPLIT", images_a_split)
    monkeypatch.setattr(_tl, "target", lambda device: _tl.Target((9, 0), 100))
    dout, ids = uniform(B, P, D, dtype=dtype), permutations(B, P)
    (dx, dtoken, dpos), count = measured(unshuffle_tokens.backward, dout, ids, keep, dtype, dtype if positions else None)
    right((dx, dtoken, dpos)[: 2 + positions], lambda dout: gradients(dout, ids, keep, positions), dout)
    assert (dx.dtype, dtoken.dtype, dpos.dtype) == (dtype,) * 3 and dpos.numel() == positions * P * D
    written_once(count, dx, dtoken)
    assert count.of(dout).read == count.of(dout).read_once == nbytes(dout)
    split = dict(count.launches)["_scatter"][1] > 1
    assert split == (images_a_split == 2 and B > 3)
    assert count.kernels == ["_scatter"] + (1 + (positions and split)) * ["_sum_parts"]


def gradients(dout, ids, keep, positions):
    made = unshuffle_tokens_op._reference_backward(dout, ids, keep, dout.dtype, dout.dtype if positions else None)
    return made[: 2 + positions]


def images_of(B, C, H, W, dtype=torch.float32, channels_last=False):
    x = uniform(B, C, H, W, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@DTYPES
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize(("B", "C", "H", "W", "p", "M"), [(2, 3, 4, 6, 2, 3), (1, 1, 3, 2, 1, 6), (1, 2, 5, 10, 5, 1), (2, 3, 4, 4, 4, 3)])
def test_gather_patches_moves_every_patch_once(small_patches, dtype, channels_last, B, C, H, W, p, M):
    images, P = images_of(B, C, H, W, dtype, channels_last), H * W // p**2
    ids = permutations(B, P)[:, :M] if M <= P else torch.zeros((B, M), dtype=torch.int64)
    out, count = measured(gather_patches.forward, images, ids, p)
    assert torch.equal(out, gather_patches_reference.gather_patches(images, ids, p))
    written_once(count, out)
    assert count.kernels == ["_gather"] and count.of(images).read == nbytes(out)
    dout = uniform(*out.shape, dtype=dtype, seed=1)
    dx, count = measured(gather_patches.backward, dout, images, ids, p)
    right(dx, lambda dout: gather_patches_op._reference_backward(dout, images.to(dout.dtype), ids, p), dout)
    written_once(count, dx)
    assert count.kernels == ["_scatter"] and count.of(dout).read == count.of(dout).read_once == nbytes(dout)


@DTYPES
@pytest.mark.parametrize("taken", ["planes", "channels_last", "bytes", "alone"])
@pytest.mark.parametrize(("p", "R", "S", "D", "keep"), [(2, 3, 2, 5, 4), (1, 5, 4, 18, 19), (7, 1, 2, 3, 1), (8, 2, 1, 33, 2)])
def test_patch_embed_visible_reads_visible_pixels_once_a_tile(small_patches, dtype, taken, p, R, S, D, keep):
    B, C, P = 2, 3 if p < 5 else 1, R * S
    images = images_of(B, C, R * p, S * p, dtype, taken == "channels_last")
    of_channels = (None, None)
    if taken == "bytes":
        images = ((images.float() + 1) * 127).to(torch.uint8)
        of_channels = (torch.tensor([0.4, 0.5, 0.6])[:C], torch.tensor([0.2, 0.3, 0.25])[:C])
    weight, ids = (uniform(D, C, p, p, dtype=dtype, seed=2) / p).to(dtype), permutations(B, P)[:, :keep]
    others = (None, None) if taken == "alone" else (uniform(D, dtype=dtype, seed=3), uniform(P, D, dtype=dtype, seed=4))
    args = (images, weight, others[0], ids, others[1], *of_channels)
    out, count = measured(patch_embed_visible.forward, *args)
    right(out, patch_embed_visible_reference.patch_embed_visible, *args)
    written_once(count, out)
    tiles = -(-D // 16) if small_patches else 1
    visible = B * keep * weight[0].numel() * images.element_size()
    assert count.kernels == ["_embed"] and count.of(images).read == tiles * visible
    dout = uniform(*out.shape, dtype=dtype, seed=5)
    grads, count = measured(patch_embed_visible.backward, dout, *args)
    expected = len([x for x in (weight, *others) if x is not None])
    right(grads[:expected], lambda dout: patch_embed_gradients(dout, args, expected), dout)
    written_once(count, *grads[:expected])
    assert count.of(images).read == tiles * visible
    assert count.kernels == ["_weight_sums", "_merge"] + (["_position_sums"] if others[1] is not None else [])
    assert dict(count.launches)["_weight_sums"][2] == (2 if small_patches == "two splits" and B * keep > 32 else 1)


def patch_embed_gradients(dout, args, expected):
    wide = [x.to(dout.dtype) if x is not None and x.is_floating_point() else x for x in args]
    return patch_embed_visible_op._reference_backward(dout, *wide)[:expected]


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_images_far_apart(axis):
    near, ids = uniform(2, 2, 2, 2, dtype=torch.float16), permutations(2, 4)[:, :3]
    distant, weight = far(near, FAR, axis), uniform(5, 2, 1, 1, dtype=torch.float16)
    assert torch.equal(measured(gather_patches.forward, distant, ids, 1)[0], gather_patches.forward(near, ids, 1))
    others = (weight, None, ids, None, None, None)
    assert torch.equal(measured(patch_embed_visible.forward, distant, *others)[0], patch_embed_visible.forward(near, *others))
    dout = uniform(2, 3, 5, dtype=torch.float16, seed=1)
    assert torch.equal(*(patch_embed_visible.backward(dout, x, *others)[0] for x in (distant, near)))


def test_an_id_outside_reads_no_pixel(small_patches, monkeypatch):
    monkeypatch.setattr(dispatch, "indices_are_checked", lambda device: False)
    images, ids = uniform(2, 2, 4, 4), torch.tensor([[0, 4, 3], [-1, 2**40, 1]])
    outside = (ids < 0) | (ids > 3)
    weight, pos = uniform(5, 2, 2, 2), uniform(4, 5, seed=1)
    for body, args in ((gather_patches.forward, (ids, 2)), (patch_embed_visible.forward, (weight, None, ids, pos, None, None))):
        out, _ = measured(body, images, *args)
        assert torch.equal(out.isnan().all(2), outside) and torch.equal(out.isnan().any(2), outside)
    measured(gather_patches.backward, uniform(2, 3, 8), images, ids, 2)
    measured(patch_embed_visible.backward, uniform(2, 3, 5), images, weight, None, ids, pos, None, None)


@DTYPES
@pytest.mark.parametrize("several", [False, True], ids=["a row a program", "as they are"])
@pytest.mark.parametrize("rows", ["all", "masked"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
@pytest.mark.parametrize(("normalize", "reduction"), [(True, "mean"), (False, "none")])
def test_masked_patch_mse_reads_masked_pixels_once(monkeypatch, dtype, several, rows, channels_last, normalize, reduction):
    if not several:
        monkeypatch.setattr(masked_patch_mse, "TILE", 1)
    images, ids, M = images_of(2, 3, 4, 6, dtype, channels_last), permutations(2, 6)[:, :4], 4
    pred = uniform(2, 6 if rows == "all" else M, 12, dtype=dtype, seed=1)
    args, compared = (images, ids, 2, normalize, reduction), 2 * M * 12 * pred.element_size()
    found, count = measured(masked_patch_mse.forward, pred, *args)
    right(found, masked_patch_mse_reference.forward, pred, *args)
    assert count.launches == [("_losses", (1 if several else 2 * M,))]
    written_once(count, found[1])
    for x in (images, pred):
        assert count.of(x).read == count.of(x).read_once == compared
    dloss = uniform(*found[0].shape, seed=2)
    dpred, count = measured(masked_patch_mse.backward, dloss, pred, images, ids, found[1], *args[2:])
    right(dpred, lambda *given: masked_patch_mse_op._reference_backward(*given, ids, None, *args[2:]), dloss, pred, images)
    written_once(count, dpred)
    assert count.kernels == ["_gradient"]
    for x in (images, pred):
        assert count.of(x).read == count.of(x).read_once == compared


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_predictions_and_images_far_apart(axis):
    pred, images = uniform(3, 3, 9, dtype=torch.float16), uniform(3, 1, 3, 9, dtype=torch.float16, seed=1)
    ids = permutations(3, 3)[:, :2]
    args = (ids, 3, True, "none")
    loss, statistics = masked_patch_mse.forward(pred, images, *args)
    for one, other in ((far(pred, FAR, axis), images), (pred, far(images, FAR, axis + (axis > 0)))):
        assert torch.equal(measured(masked_patch_mse.forward, one, other, *args)[0][0], loss)
        dpred = measured(masked_patch_mse.backward, loss, one, other, ids, statistics, *args[1:])[0]
        assert torch.equal(dpred, masked_patch_mse.backward(loss, pred, images, ids, statistics, *args[1:]))


def test_a_masked_patch_outside_is_nan(monkeypatch):
    monkeypatch.setattr(dispatch, "indices_are_checked", lambda device: False)
    images, ids = uniform(2, 2, 4, 4), torch.tensor([[0, 4, 3], [-1, 2**40, 1]])
    outside = (ids < 0) | (ids > 3)
    for rows in (3, 4):
        pred = uniform(2, rows, 8)
        (loss, statistics), _ = measured(masked_patch_mse.forward, pred, images, ids, 2, True, "none")
        assert torch.equal(loss.isnan(), outside)
        dpred, _ = measured(masked_patch_mse.backward, loss, pred, images, ids, statistics, 2, True, "none")
        assert torch.equal(dpred.isnan().any(2), outside if rows == 3 else torch.zeros(2, 4, dtype=torch.bool))
