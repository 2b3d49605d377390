"""Is the loss on masked patches MAE's, whichever rows are predicted, and refused clearly?"""

import pytest
import torch
from grid import DTYPES, of, over, telling, trials, widest

from fuseer.kernels.masked_patch_mse import masked_patch_mse
from fuseer.kernels.testing import Case

EVERY_BACKEND = over(widest("masked_patch_mse"))


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def permutations(B, P, seed=0):
    return torch.rand((B, P), generator=torch.Generator().manual_seed(seed)).argsort(1)


def on(trial, *tensors):
    return [x.to(trial.device, trial.dtype if x.is_floating_point() else x.dtype) for x in tensors]


def official(images, pred, mask, p, norm_pix_loss):
    """The lines of models_mae.py, with the grid's two sides told apart."""
    N, _, height, width = images.shape
    h, w = height // p, width // p
    target = torch.einsum("nchpwq->nhwpqc", images.reshape(N, 3, h, p, w, p)).reshape(N, h * w, p**2 * 3)
    if norm_pix_loss:
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("M", [1, 4, 5, 6])
@EVERY_BACKEND
def test_is_the_official_loss_at_any_mask_ratio(trial, normalize, M):
    """From one patch masked to all; gradient included, which is 0 where nothing is masked."""
    images, pred, ids = on(trial, normal(2, 3, 8, 12), normal(2, 6, 48, seed=1), permutations(2, 6)[:, :M])
    mask = torch.zeros(2, 6, device=trial.device, dtype=trial.dtype).scatter_(1, ids, 1.0)
    found, expected = (pred.clone().requires_grad_() for _ in range(2))
    loss = trial.call(found, images, ids, patch=4, normalize=normalize)
    truth = official(images, expected, mask, 4, normalize)
    loss.backward()
    truth.backward()
    bound = {"rtol": 1e-12, "atol": 1e-12} if trial.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss, truth, **bound)
    torch.testing.assert_close(found.grad, expected.grad, **bound)
    assert (found.grad[mask == 0] == 0).all()


@EVERY_BACKEND
def test_rows_of_masked_patches_alone_give_the_same(trial):
    images, pred, ids = on(trial, normal(2, 3, 8, 12), normal(2, 6, 48, seed=1), permutations(2, 6)[:, :4])
    image = torch.arange(2, device=trial.device)[:, None]
    every, own = pred.clone().requires_grad_(), pred[image, ids].requires_grad_()
    losses = [trial.call(x, images, ids, patch=4, reduction="none") for x in (every, own)]
    assert torch.equal(*losses)
    weights = torch.arange(8.0, device=trial.device).view(2, 4)
    for loss in losses:
        loss.backward(weights.to(loss))
    assert torch.equal(every.grad[image, ids], own.grad)


@EVERY_BACKEND
def test_where_all_are_masked_rows_are_those_of_the_image(trial):
    """pred [B, P, n] and M = P: ids_masked picks rows, in whatever order it is given."""
    images, pred, ids = on(trial, normal(2, 3, 8, 12), normal(2, 6, 48, seed=1), permutations(2, 6))
    found = trial.call(pred, images, ids, patch=4, reduction="none")
    in_order = trial.call(pred, images, ids.sort(1).values, patch=4, reduction="none")
    assert torch.equal(found, in_order.gather(1, ids))
    assert not torch.equal(found, in_order)


@EVERY_BACKEND
def test_a_repeated_patch_counts_twice(trial):
    images, pred = on(trial, normal(1, 3, 8, 8), normal(1, 4, 48, seed=1))
    ids = torch.tensor([[2, 1, 2]], device=trial.device)
    leaf = pred.clone().requires_grad_()
    loss = trial.call(leaf, images, ids, patch=4, reduction="none")
    loss.backward(torch.tensor([[1.0, 1.0, 3.0]]).to(loss))
    once = pred.clone().requires_grad_()
    trial.call(once, images, ids[:, :2], patch=4, reduction="none").backward(torch.tensor([[4.0, 1.0]]).to(loss))
    torch.testing.assert_close(leaf.grad, once.grad)
    assert loss[0, 0] == loss[0, 2]


@EVERY_BACKEND
def test_a_patch_of_one_colour_has_the_target_zero(trial):
    """To the bit, though 0.7 has none in binary: its mean is the pixel, whatever is summed."""
    (pred,) = on(trial, normal(2, 1, 768))
    images = torch.full((2, 3, 16, 32), 0.7, device=trial.device, dtype=trial.dtype)
    ids = torch.tensor([[0], [1]], device=trial.device)
    found = trial.call(pred, images, ids, patch=16, reduction="none")
    torch.testing.assert_close(found, pred.square().mean(-1), rtol=1e-6, atol=0)


def far_from_zero(generator, offset, contrast):
    images = offset + contrast * torch.randn((2, 3, 16, 32), dtype=torch.float64, generator=generator)
    pred = torch.randn((2, 2, 768), dtype=torch.float64, generator=generator)
    return {"pred": pred, "images": images, "ids_masked": torch.tensor([[1], [0]]), "patch": 16, "normalize": True, "reduction": "none"}


EXTREMES = tuple(
    Case(name, lambda generator, offset=offset, contrast=contrast: far_from_zero(generator, offset, contrast))
    for name, offset, contrast in (("bright", 50.0, 1.0), ("faint", 0.5, 1e-2), ("black", 0.0, 0.0), ("large", 0.0, 1e3))
)


@over(trials(DTYPES, of("masked_patch_mse", *EXTREMES)))
def test_extremes(trial):
    found = trial.verdicts()
    assert all(found.values()), {name: str(verdict) for name, verdict in found.items()}


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["pred", "images"])
def test_nan_is_seen_in_its_patch_and_nowhere_else(trial, name):
    images, pred, ids = on(trial, normal(2, 3, 4, 6), normal(2, 6, 12, seed=1), permutations(2, 6)[:, :4])
    p = ids[1, 2].item()
    if name == "pred":
        pred[1, p, 3] = torch.nan
    else:
        images[1, 2, p // 3 * 2, p % 3 * 2 + 1] = torch.nan
    loss = trial.call(pred.requires_grad_(), images, ids, patch=2, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), pred)
    expected = torch.zeros(2, 4, dtype=torch.bool)
    expected[1, 2] = True
    assert torch.equal(loss.isnan().cpu(), expected)
    assert gradient[1, p].isnan().any()
    assert gradient.isnan().any(2).sum() == 1


@over([trial for trial in trials(chosen=telling) if trial.op == "masked_patch_mse"])
def test_keeps_two_numbers_a_patch_and_nothing_of_its_own_size(trial):
    arguments = trial.arguments()
    arguments["pred"].requires_grad_()
    given, kept = {x.data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor)}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        trial.call(**arguments)
    assert sum(x.numel() for x in kept if x.data_ptr() not in given) <= 2 * arguments["ids_masked"].numel()


@EVERY_BACKEND
@pytest.mark.parametrize("ids", [[[0, 4]], [[-1, 0]]])
def test_an_index_outside_is_refused(trial, ids, monkeypatch):
    monkeypatch.setenv("FUSEER_CHECK_INDICES", "1")
    images, pred, ids = on(trial, normal(1, 3, 4, 4), normal(1, 4, 12), torch.tensor(ids))
    with pytest.raises(ValueError, match=r"^masked_patch_mse: ids_masked must be in 0\.\.3; got (0\.\.4|-1\.\.0)"):
        trial.call(pred, images, ids, patch=2)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"pred": None}, TypeError, "pred must be a tensor"),
        ({"pred": torch.ones(2, 6, 11)}, ValueError, r"pred must be \[B, P, n\] = \[2, 6, 12\] or \[B, M, n\] = \[2, 3, 12\]"),
        ({"pred": torch.ones(2, 5, 12)}, ValueError, r"n = patch \* patch \* C; got \[2, 5, 12\]"),
        ({"pred": torch.ones(1, 6, 12)}, ValueError, r"got \[1, 6, 12\]"),
        ({"pred": torch.ones(2, 6, 12, device="meta")}, ValueError, "must be on the device of"),
        ({"images": torch.ones(2, 3, 4, 6, dtype=torch.uint8)}, TypeError, r"images must be .*got torch.uint8; convert it with .float"),
        ({"images": torch.ones(2, 3, 4)}, ValueError, r"images must be \[B, C, H, W\]; got \[2, 3, 4\]"),
        ({"images": torch.ones(2, 3, 5, 6)}, ValueError, r"sides that the patch's, 2, divides; got \[2, 3, 5, 6\]"),
        ({"ids_masked": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "ids_masked must be an int64 tensor"),
        ({"ids_masked": torch.zeros(3, 3, dtype=torch.int64)}, ValueError, r"ids_masked must be \[B = 2, M\]; got \[3, 3\]"),
        ({"ids_masked": torch.zeros(2, 0, dtype=torch.int64)}, ValueError, r"no masked patch has no mean; got ids_masked \[2, 0\]"),
        ({"patch": 0}, ValueError, "patch must be >= 1; got 0"),
        ({"patch": 2.0}, TypeError, "patch must be an integer; got float"),
        ({"reduction": "sum"}, ValueError, 'reduction must be "mean" or "none"; got \'sum\''),
    ],
)
def test_refuses(changes, error, words):
    arguments = {
        "pred": torch.ones(2, 6, 12),
        "images": torch.ones(2, 3, 4, 6),
        "ids_masked": torch.tensor([[0, 1, 2], [3, 4, 5]]),
        "patch": 2,
    }
    with pytest.raises(error, match=f"^masked_patch_mse: .*{words}"):
        masked_patch_mse(**{**arguments, **changes})


def test_refuses_to_normalise_single_numbers():
    with pytest.raises(ValueError, match="normalize needs patches of at least 2 numbers"):
        masked_patch_mse(torch.ones(1, 4, 1), torch.ones(1, 1, 2, 2), torch.tensor([[0]]), patch=1)


def test_no_images_have_losses_but_no_mean():
    given = (torch.ones(0, 4, 3), torch.ones(0, 3, 2, 2), torch.zeros(0, 2, dtype=torch.int64))
    assert masked_patch_mse(*given, patch=1, reduction="none").shape == (0, 2)
    with pytest.raises(ValueError, match="no masked patch has no mean"):
        masked_patch_mse(*given, patch=1)
