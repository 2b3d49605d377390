"""Does a gather of patches give the official patchify's rows and gradient, touch nothing else, and refuse what has no meaning?"""

import pytest
import torch
from grid import over, widest

from fuseer.kernels import dispatch
from fuseer.kernels.gather_patches import gather_patches

EVERY_BACKEND = over(widest("gather_patches"))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def subsets(B, P, M, seed=0):
    return torch.rand((B, P), generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :M]


def official(images, ids, patch):
    """models_mae.py: all patches, by an einsum, and an index as large as what is taken of them."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // patch, patch, W // patch, patch)
    x = torch.einsum("nchpwq->nhwpqc", x).reshape(B, -1, patch**2 * C)
    return torch.gather(x, 1, ids.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


@EVERY_BACKEND
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("H", "W", "patch"), [(32, 48, 16), (42, 28, 14), (6, 10, 2), (3, 2, 1)])
def test_is_the_official_patchify_to_the_bit(trial, memory_format, H, W, patch):
    """The gradient too, as long as no patch is taken twice: then it is copies and zeros."""
    images = normal(2, 3, H, W).contiguous(memory_format=memory_format).to(trial.device).requires_grad_()
    ids = subsets(2, H * W // patch**2, 3).to(trial.device)
    out, expected = trial.call(images, ids, patch=patch), official(images, ids, patch)
    dout = normal(*out.shape, seed=1).to(out)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(y, images, dout)[0] for y in (out, expected)))


@EVERY_BACKEND
def test_pixels_as_far_apart_as_channels_are_many(trial):
    """Which looks like channels_last, and is not: the channels lie elsewhere."""
    images, ids = normal(1, 2, 4, 8).to(trial.device)[..., ::2], torch.tensor([[3, 0]], device=trial.device)
    assert images.stride() == (64, 32, 8, 2)
    assert torch.equal(trial.call(images, ids, patch=2), official(images, ids, 2))


@EVERY_BACKEND
def test_a_patch_taken_often_gets_the_sum(trial):
    """300 ones, of which bfloat16 alone would stop counting at 256."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        images = torch.zeros(1, 2, 4, 4, device=trial.device, dtype=dtype, requires_grad=True)
        trial.call(images, torch.full((1, 300), 3, device=trial.device), patch=2).sum().backward()
        expected = torch.zeros(1, 2, 4, 4)
        expected[..., 2:, 2:] = 300
        assert torch.equal(images.grad.cpu(), expected.to(dtype))


@EVERY_BACKEND
def test_patches_that_nobody_takes_are_not_read(trial):
    images = normal(2, 3, 6, 9).to(trial.device)
    images[:, :, 3:, 3:6] = torch.nan
    ids = torch.tensor([[0, 1, 2, 3, 5], [5, 0, 2, 1, 3]], device=trial.device)
    assert not trial.call(images, ids, patch=3).isnan().any()
    assert trial.call(images, torch.full_like(ids, 4), patch=3).isnan().all()


@EVERY_BACKEND
@pytest.mark.parametrize("ids", [[[6, 0]], [[0, -1]]], ids=str)
def test_refuses_ids_outside(trial, ids, monkeypatch):
    monkeypatch.setenv("FUSEER_CHECK_INDICES", "1")
    with pytest.raises(ValueError, match=r"^gather_patches: ids must be in 0\.\.5; got"):
        trial.call(normal(1, 3, 4, 6).to(trial.device), torch.tensor(ids, device=trial.device), patch=2)


@over([trial for trial in widest("gather_patches") if trial.backend == "triton"])
def test_unchecked_ids_outside_are_seen(trial, monkeypatch):
    monkeypatch.setattr(dispatch, "indices_are_checked", lambda device: False)
    images = normal(1, 3, 4, 6).to(trial.device).requires_grad_()
    out = trial.call(images, torch.tensor([[6, 0, -(2**40)]], device=trial.device), patch=2)
    assert torch.equal(out.isnan().all(2).cpu(), torch.tensor([[True, False, True]])) and not out[0, 1].isnan().any()
    out.sum().backward()
    assert images.grad.sum() == 12


@EVERY_BACKEND
def test_keeps_its_arguments_alone_for_the_gradient(trial):
    arguments, kept = trial.arguments(), []
    arguments["images"].requires_grad_()
    given = {x.data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        trial.call(**arguments)
    assert kept and all(x.data_ptr() in given for x in kept)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"images": None}, TypeError, "images must be a tensor"),
        ({"images": torch.ones(2, 3, 4, 6, dtype=torch.uint8)}, TypeError, "images must be float16"),
        ({"images": torch.ones(3, 4, 6)}, ValueError, r"images must be \[B, C, H, W\]; got \[3, 4, 6\]"),
        ({"images": torch.ones(2, 3, 4, 5)}, ValueError, r"sides that the patch's, 2, divides; got \[2, 3, 4, 5\]"),
        ({"images": torch.ones(2, 0, 4, 6)}, ValueError, "C >= 1"),
        ({"patch": 0}, ValueError, "patch must be >= 1; got 0"),
        ({"patch": 2.0}, TypeError, "patch must be an integer; got float"),
        ({"ids": torch.ones(2, 3)}, TypeError, r"ids must be an int64 tensor \[B, M\]; got torch.float32"),
        ({"ids": torch.ones(3, 3, dtype=torch.int64)}, ValueError, r"ids must be \[B = 2, M\]; got \[3, 3\]"),
        ({"ids": torch.ones(2, 3, dtype=torch.int64, device="meta")}, ValueError, "ids must be on the device of images"),
    ],
)
def test_refuses(changes, error, words):
    arguments = {"images": torch.ones(2, 3, 4, 6), "ids": torch.zeros(2, 3, dtype=torch.int64), "patch": 2, **changes}
    with pytest.raises(error, match=f"^gather_patches: .*{words}"):
        gather_patches(**arguments)
