"""Is the mask that of MAE's two sorts, whatever the noise, of any number of patches, and refused clearly?"""

import pytest
import torch
from grid import over, widest

from fuseer.kernels.patch_mask import patch_mask

EVERY_BACKEND = over(widest("patch_mask"))


def random_masking(noise, keep):
    """MAE's, with both sorts stable."""
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1, stable=True)
    mask = torch.ones_like(noise, dtype=torch.float32)
    mask[:, :keep] = 0
    return ids_shuffle[:, :keep], ids_restore, torch.gather(mask, 1, ids_restore)


def same(found, expected):
    return all(x.dtype == y.dtype and torch.equal(x.cpu(), y) for x, y in zip(found, expected, strict=True))


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@EVERY_BACKEND
@pytest.mark.parametrize("P", [1, 2, 31, 33, 196, 300])
def test_is_two_stable_sorts_at_every_ratio(trial, P):
    for keep in {1, P // 4 or 1, P - 1 or 1, P}:
        noise = uniform(3, P, seed=P)
        assert same(trial.call(noise.to(trial.device), keep), random_masking(noise, keep)), keep


@EVERY_BACKEND
def test_every_number_has_its_place(trial):
    """Both zeros alike, subnormal numbers apart, infinities at the ends, NaN of either sign behind them; ties by patch."""
    tiny = 1e-42
    values = torch.tensor([0.0, -0.0, tiny, -tiny, 2 * tiny, 1.0, -1.0, 3e38, torch.inf, -torch.inf, torch.nan, -torch.nan])
    for seed in range(8):
        noise = values[torch.randint(len(values), (5, 40), generator=torch.Generator().manual_seed(seed))]
        assert same(trial.call(noise.to(trial.device), 10), random_masking(noise, 10)), seed


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_tie_often_and_rank_by_patch(trial, dtype):
    noise = uniform(4, 150).to(dtype)
    assert len(noise[0].unique()) < 150
    assert same(trial.call(noise.to(trial.device), 40), random_masking(noise, 40))


@over([trial for trial in widest("patch_mask") if trial.backend == "cpu"])
def test_float64_tells_what_float32_does_not(trial):
    noise = 1 + 1e-12 * uniform(3, 70).double()
    assert (noise.float() == 1).all()
    assert same(trial.call(noise, 20), random_masking(noise, 20))


@EVERY_BACKEND
def test_the_three_answers_are_one(trial):
    """ids_restore undoes ids_keep; the mask is 0 exactly there; P - keep patches are removed in every image."""
    noise, keep = uniform(4, 50).to(trial.device), 13
    ids_keep, ids_restore, mask = trial.call(noise, keep)
    assert torch.equal(ids_restore.gather(1, ids_keep), torch.arange(keep, device=trial.device).expand(4, keep))
    assert (mask.gather(1, ids_keep) == 0).all() and (mask.sum(1) == 50 - keep).all()
    assert torch.equal(ids_restore.sort(1).values.cpu(), torch.arange(50).expand(4, 50))


@EVERY_BACKEND
def test_more_patches_than_a_block_holds(trial):
    """Of any number; the interpreter's programs take their time for each."""
    P = 150 if trial.backend == "triton" and trial.device == "cpu" else 5000
    noise = (uniform(2, P) * P / 3).round()
    assert same(trial.call(noise.to(trial.device), P // 4), random_masking(noise, P // 4))


def test_noise_is_detached():
    assert not any(x.requires_grad for x in patch_mask(uniform(2, 5).requires_grad_(), 2))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"noise": [0.5]}, TypeError, "noise must be a tensor"),
        ({"noise": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "noise must be float16"),
        ({"noise": torch.ones(4)}, ValueError, r"noise must be \[B, P\]; got \[4\]"),
        ({"keep": 0}, ValueError, "keep must be >= 1; got 0"),
        ({"keep": 5}, ValueError, "keep must be at most P = 4, the patches there are; got 5"),
        ({"keep": 0.25}, TypeError, "keep must be an integer; got float"),
        ({"noise": torch.ones(2, 0)}, ValueError, "keep must be at most P = 0"),
    ],
)
def test_refuses(changes, error, words):
    with pytest.raises(error, match=f"^patch_mask: .*{words}"):
        patch_mask(**{"noise": torch.ones(2, 4), "keep": 2, **changes})
