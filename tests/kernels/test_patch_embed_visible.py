"""Is the embedding of visible patches the official one of all, gathered; and are images and ids refused that have no meaning?"""

import pytest
import torch
from grid import over, widest
from torch.nn import functional as F

from fuseer.kernels import dispatch
from fuseer.kernels.patch_embed_visible import patch_embed_visible
from fuseer.kernels.patch_embed_visible.reference import patch_embed_visible as meant
from fuseer.kernels.testing import error_vs_eager

EVERY_BACKEND = over(widest("patch_embed_visible"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def subsets(B, P, keep, seed=0):
    return torch.rand((B, P), generator=torch.Generator().manual_seed(seed)).argsort(1)[:, :keep]


def given(B=2, C=3, H=8, W=12, p=4, D=5, keep=3):
    """images, weight, bias, ids_keep, pos_embed"""
    P = H * W // p**2
    rows = normal(B, C, H, W), normal(D, C, p, p, seed=1) / p, normal(D, seed=2)
    return *rows, subsets(B, P, keep), normal(P, D, seed=3)


def official(images, weight, bias, ids_keep, pos_embed=None):
    """forward_encoder of models_mae.py: all patches embedded, positions added, then an index as large as what is kept of them."""
    x = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    if pos_embed is not None:
        x = x + pos_embed
    return torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, len(weight)))


def on(trial, *tensors):
    return [x.to(trial.device, trial.dtype if x.is_floating_point() else x.dtype) for x in tensors]


def judged(trial, found, arguments, make):
    """The verdict on `found` = [out, gradients to weight, bias and pos_embed] against make(*arguments) in double."""
    every = {}
    for dtype in (torch.float32, torch.float64):
        images, weight, bias, ids, pos_embed = (x.to(dtype) if x.is_floating_point() else x for x in arguments)
        leaves = [x.detach().requires_grad_() for x in (weight, bias, pos_embed)]
        out = make(images, *leaves[:2], ids, leaves[2])
        every[dtype] = [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9).to(out))]
    for mine, eager, truth in zip(found, every[torch.float32], every[torch.float64], strict=True):
        if trial.dtype == torch.float64:
            torch.testing.assert_close(mine.cpu(), truth, rtol=1e-11, atol=1e-11)
        else:
            verdict = error_vs_eager(mine.cpu(), eager, truth)
            assert verdict, str(verdict)


def called(trial, arguments, **options):
    images, weight, bias, ids, pos_embed = on(trial, *arguments)
    leaves = [x.requires_grad_() for x in (weight, bias, pos_embed)]
    out = trial.call(images, *leaves[:2], ids, pos_embed=leaves[2], **options)
    return [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9).to(out))]


@EVERY_BACKEND
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("H", "W", "p"), [(32, 16, 16), (14, 42, 14), (8, 12, 4), (9, 3, 3)])
def test_is_the_official_embedding_of_all_then_gathered(trial, memory_format, H, W, p):
    arguments = given(H=H, W=W, p=p, keep=2)
    arguments = (arguments[0].contiguous(memory_format=memory_format), *arguments[1:])
    judged(trial, called(trial, arguments), arguments, official)


@EVERY_BACKEND
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("keep", [1, 3, 5, 6])
def test_from_one_patch_to_all(trial, B, keep):
    arguments = given(B=B, keep=keep)
    judged(trial, called(trial, arguments), arguments, official)


@EVERY_BACKEND
def test_more_rows_than_lie_in_memory_at_once(trial):
    """9,000 of one pixel, any of which may repeat."""
    images, weight, bias, _, pos_embed = given(H=3, W=5, p=1, D=4)
    ids = torch.randint(15, (2, 4500), generator=torch.Generator().manual_seed(5))
    arguments = (images, weight, bias, ids, pos_embed)
    judged(trial, called(trial, arguments), arguments, official)


@EVERY_BACKEND
@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_bytes_are_normalised_on_the_way(trial, as_tensors, memory_format):
    """Every value of a byte in every channel; mean and std as numbers or tensors."""
    _, weight, bias, ids, pos_embed = given(H=16, W=16, p=4, keep=16)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1).contiguous(memory_format=memory_format)
    mean, std = (torch.tensor(x).to(trial.device) if as_tensors else x for x in (MEAN, STD))
    found = called(trial, (images, weight, bias, ids, pos_embed), mean=mean, std=std)

    def normalised(images, weight, *rest):
        mean, std = (torch.tensor(x).to(weight.dtype).view(3, 1, 1) for x in (MEAN, STD))
        return official((images.to(weight.dtype) / 255 - mean) / std, weight, *rest)

    if trial.dtype == torch.float64:
        # three decimals are not the same number in float32
        mean, std = (x.double() if as_tensors else torch.tensor(x, dtype=torch.float64) for x in (mean, std))
        expected = meant(images, weight, bias, ids, pos_embed, *(x.cpu() for x in (mean, std)))
        return torch.testing.assert_close(found[0].cpu(), expected, rtol=1e-12, atol=1e-12)
    return judged(trial, found, (images, weight, bias, ids, pos_embed), normalised)


@EVERY_BACKEND
def test_patches_that_are_not_visible_are_not_read(trial):
    arguments = given()
    images = arguments[0].clone()
    images[:, :, 4:, 4:8] = torch.nan
    ids = torch.tensor([[0, 5, 2], [3, 1, 0]])
    found = called(trial, (images, *arguments[1:3], ids, arguments[4]))
    assert not any(x.isnan().any() for x in found)
    assert called(trial, (images, *arguments[1:3], torch.full_like(ids, 4), arguments[4]))[0].isnan().all()


@EVERY_BACKEND
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_a_convolution(trial, bias, half):
    """Operands rounded as torch rounds them, the dtype of out as torch promotes it; gradients in the parameters' own."""
    images, weight, b, ids, pos_embed = on(trial.but(dtype=torch.float32), *given())
    b = b if bias else None
    for positions in (None, pos_embed):
        leaves = [x.clone().requires_grad_() for x in (weight, b, positions) if x is not None]
        w, own, pos = leaves[0], leaves[1] if bias else None, leaves[-1] if positions is not None else None
        found = {}
        with torch.autocast(trial.device, half):
            for name, out in (("ours", trial.call(images, w, own, ids, pos_embed=pos)), ("torch", official(images, w, own, ids, pos))):
                found[name] = [out, *torch.autograd.grad(out, leaves, normal(*out.shape, seed=9).to(out))]
        for mine, theirs in zip(found["ours"], found["torch"], strict=True):
            assert mine.dtype == theirs.dtype
        rounded = [None if x is None else x.detach().to(half).double() for x in (images, w, own)]
        truth = official(rounded[0], *rounded[1:], ids, None if pos is None else pos.detach().double())
        # the product itself may have been rounded, whatever it is added to
        verdict = error_vs_eager(found["ours"][0].detach().to(half), truth.float(), truth)
        assert verdict, str(verdict)
        torch.testing.assert_close(*(found[name][1] for name in ("ours", "torch")), rtol=0.05, atol=0.05)


@EVERY_BACKEND
def test_images_are_rounded_to_the_weight(trial):
    images, weight, bias, ids, pos_embed = given()
    half = [x.to(trial.device, torch.bfloat16) for x in (weight, bias, pos_embed)]
    wide = trial.call(images.to(trial.device, torch.float32), *half[:2], ids.to(trial.device), pos_embed=half[2])
    narrow = trial.call(images.to(trial.device, torch.bfloat16), *half[:2], ids.to(trial.device), pos_embed=half[2])
    assert wide.dtype == torch.bfloat16 and torch.equal(wide, narrow)


@EVERY_BACKEND
def test_gradients_that_nobody_wants_are_none(trial):
    images, weight, bias, ids, pos_embed = on(trial, *given())
    for wanted in ((weight,), (bias,), (pos_embed,), (weight, pos_embed)):
        for x in (weight, bias, pos_embed):
            x.requires_grad_(any(x is y for y in wanted)).grad = None
        trial.call(images, weight, bias, ids, pos_embed=pos_embed).sum().backward()
        assert all((x.grad is not None) == any(x is y for y in wanted) for x in (weight, bias, pos_embed))


@EVERY_BACKEND
def test_keeps_its_arguments_alone_for_the_gradient(trial):
    arguments, kept = trial.arguments(), []
    for name in trial.differentiable:
        arguments[name].requires_grad_()
    given = {x.data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        trial.call(**arguments)
    assert kept and all(x.data_ptr() in given for x in kept)


@EVERY_BACKEND
@pytest.mark.parametrize("ids", [[[6, 0]], [[0, -1]]], ids=str)
def test_refuses_ids_outside(trial, ids, monkeypatch):
    monkeypatch.setenv("FUSEER_CHECK_INDICES", "1")
    images, weight, bias, _, pos_embed = on(trial, *given(B=1))
    with pytest.raises(ValueError, match=r"^patch_embed_visible: ids_keep must be in 0\.\.5; got"):
        trial.call(images, weight, bias, torch.tensor(ids, device=trial.device), pos_embed=pos_embed)


@over([trial for trial in widest("patch_embed_visible") if trial.backend == "triton"])
def test_unchecked_ids_outside_are_seen(trial, monkeypatch):
    monkeypatch.setattr(dispatch, "indices_are_checked", lambda device: False)
    images, weight, bias, _, pos_embed = on(trial, *given(B=1))
    out = trial.call(images, weight, bias, torch.tensor([[6, 0, -(2**40)]], device=trial.device), pos_embed=pos_embed)
    assert torch.equal(out.isnan().all(2).cpu(), torch.tensor([[True, False, True]])) and not out[0, 1].isnan().any()


IMAGES, BYTES = torch.ones(2, 3, 4, 6), torch.ones(2, 3, 4, 6, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"images": None}, TypeError, "images must be a tensor"),
        ({"images": torch.ones(2, 3, 4, 6, dtype=torch.int32)}, TypeError, "images must be float16"),
        ({"images": torch.ones(3, 4, 6)}, ValueError, r"images must be \[B, C, H, W\]; got \[3, 4, 6\]"),
        ({"images": torch.ones(2, 3, 4, 5)}, ValueError, r"sides that the patch's, 2, divides; got \[2, 3, 4, 5\]"),
        ({"images": IMAGES.clone().requires_grad_()}, ValueError, r"images must not require a gradient.* give images\.detach\(\)"),
        ({"images": BYTES}, ValueError, r"mean \[C\] is needed to normalise uint8 images; got None"),
        ({"images": BYTES, "mean": MEAN}, ValueError, r"std \[C\] is needed"),
        ({"images": BYTES, "mean": MEAN[:2], "std": STD}, ValueError, r"mean must be \[C\] of images = \[3\]; got \[2\]"),
        ({"mean": MEAN, "std": STD}, ValueError, "mean is for uint8 images.* leave it out"),
        ({"std": STD}, ValueError, "std is for uint8 images"),
        ({"weight": torch.ones(5, 3, 2, 3)}, ValueError, r"weight must be \[D, C, p, p\].* got \[5, 3, 2, 3\]"),
        ({"weight": torch.ones(5, 1, 2, 2)}, ValueError, r"weight must be \[D, C, p, p\].* and the C of images"),
        ({"weight": torch.ones(0, 3, 2, 2)}, ValueError, "D, p >= 1"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must be \[D\] = \[5\]; got \[4\]"),
        ({"bias": torch.ones(5).half()}, TypeError, "bias must have the dtype of weight"),
        ({"pos_embed": torch.ones(7, 5)}, ValueError, r"pos_embed must be \[P, D\] = \[6, 5\]; got \[7, 5\]"),
        ({"pos_embed": torch.ones(6, 5, device="meta")}, ValueError, "pos_embed must be on the device of images"),
        ({"ids_keep": torch.ones(2, 3)}, TypeError, r"ids_keep must be an int64 tensor \[B, keep\]; got torch.float32"),
        ({"ids_keep": torch.ones(3, 3, dtype=torch.int64)}, ValueError, r"ids_keep must be \[B = 2, keep\]; got \[3, 3\]"),
    ],
)
def test_refuses(changes, error, words):
    arguments = {
        "images": IMAGES,
        "weight": torch.ones(5, 3, 2, 2),
        "bias": torch.ones(5),
        "ids_keep": torch.zeros(2, 3, dtype=torch.int64),
    }
    with pytest.raises(error, match=f"^patch_embed_visible: .*{words}"):
        patch_embed_visible(**{**arguments, **changes})
