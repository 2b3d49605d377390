"""Are the drawn crops torchvision's in distribution, and do they depend on the sample alone?"""

from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ks_2samp, kstest
from torchvision.transforms.v2 import ColorJitter, RandomResizedCrop

from fuseer.engine.data.draw import Drawn, draw
from fuseer.engine.data.view import View
from fuseer.engine.recipes.recipe import load_recipe

# recipe: (size, views, area, ColorJitter's arguments, probabilities of jitter, grey, blur, solarize) of each group of its views, as the
# official code has them: swav main_swav.py and src/multicropdataset.py, simclr data_util.py, moco main_moco.py, moco-v3 main_moco.py
SWAV, V3 = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)
PUBLISHED = {
    "swav_rn50": [(224, 2, (0.14, 1), SWAV, 0.8, 0.2, 0.5, 0), (96, 6, (0.05, 0.14), SWAV, 0.8, 0.2, 0.5, 0)],
    "seer_regnety_32gf": [(224, 2, (0.14, 1), SWAV, 0.8, 0.2, 0.5, 0), (96, 4, (0.05, 0.14), SWAV, 0.8, 0.2, 0.5, 0)],
    "simclr_rn50": [(224, 2, (0.08, 1), SWAV, 0.8, 0.2, 0.5, 0)],
    "moco_v1_rn50": [(224, 2, (0.2, 1), (0.4, 0.4, 0.4, 0.4), 1, 0.2, 0, 0)],
    "moco_v2_rn50": [(224, 2, (0.2, 1), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, 0)],
    "moco_v3_rn50": [(224, 1, (0.2, 1), V3, 0.8, 0.2, 1, 0), (224, 1, (0.2, 1), V3, 0.8, 0.2, 0.1, 0.2)],
    "moco_v3_vit_s": [(224, 1, (0.08, 1), V3, 0.8, 0.2, 1, 0), (224, 1, (0.08, 1), V3, 0.8, 0.2, 0.1, 0.2)],
    "mae_vit_b": [(224, 1, (0.2, 1), None, 0, 0, 0, 0)],
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipes_parameters_are_distributed_as_the_official_codes(recipe):
    n, size, number = 2000, (375, 500), 0
    views = load_recipe(recipe).config().method.views
    assert len(views) == len(PUBLISHED[recipe])
    for view, (pixels, count, area, jitter, *probabilities) in zip(views, PUBLISHED[recipe], strict=True):
        drawn = draw(view, number, np.tile(size, (n, 1)), np.arange(n), 3, 0)
        assert (view.size, view.count) == (pixels, count)
        number += view.count
        torch.manual_seed(number)
        crop, image = RandomResizedCrop(pixels, scale=area), torch.empty(1, *size)
        theirs = [crop.make_params([image]) for _ in range(n)]
        for of in (lambda p: p["height"] * p["width"], lambda p: p["height"] / p["width"]):
            assert ks_2samp(of(vars(drawn)), [of(params) for params in theirs]).pvalue > 1e-3
        for name, probability in zip(("flip", "jitter", "gray", "blur", "solarize"), (0.5, *probabilities), strict=True):
            assert binomtest(int(getattr(drawn, name).sum()), n, probability).pvalue > 1e-3, name
        factors = _by_torchvision(jitter, n) if jitter is not None else {}
        for name, values in factors.items():
            assert ks_2samp(getattr(drawn, name)[drawn.jitter], values).pvalue > 1e-3, name
        if drawn.blur.any():
            assert kstest((drawn.sigma[drawn.blur] - 0.1) / 1.9, "uniform").pvalue > 1e-3


def _by_torchvision(jitter, n):
    made = [ColorJitter(*jitter).make_params([]) for _ in range(n)]
    return {name: [params[f"{name}_factor"] for params in made] for name in ("brightness", "contrast", "saturation", "hue")}


def rows(drawn: Drawn) -> np.ndarray:
    return np.stack([np.asarray(getattr(drawn, field.name), dtype=np.float64) for field in fields(Drawn)], axis=1)


@pytest.mark.parametrize("size", [(375, 500), (28, 28), (40, 400), (9, 2)])
@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.14)])
def test_crops_are_distributed_as_torchvision_draws_them(size, scale):
    n = 3000
    drawn = draw(View(size=8, count=1, scale=scale), 0, np.tile(size, (n, 1)), np.arange(n), 0, 0)
    ours = np.stack([drawn.top, drawn.left, drawn.height, drawn.width], 1)
    transform, image = RandomResizedCrop(8, scale=scale), torch.empty(1, *size)
    torch.manual_seed(0)
    theirs = [transform.make_params([image]) for _ in range(n)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    assert (ours[:, :2] >= 0).all() and (ours[:, 2:] >= 1).all() and (ours[:, :2] + ours[:, 2:] <= size).all()
    for of in (lambda c: c[:, 0], lambda c: c[:, 1], lambda c: c[:, 2] * c[:, 3], lambda c: c[:, 2] / c[:, 3]):
        assert ks_2samp(of(ours), of(theirs), method="asymp").pvalue > 1e-3
    if size == (375, 500):
        other = draw(View(size=8, count=1, scale=(scale[0], 0.7 * scale[1])), 0, np.tile(size, (n, 1)), np.arange(n), 0, 0)
        assert ks_2samp(other.height * other.width, theirs[:, 2] * theirs[:, 3]).pvalue < 1e-3


def test_crop_of_awkward_images_lies_inside():
    for size in ((1, 1), (1, 1000), (1000, 1), (2, 3), (3, 5000)):
        drawn = draw(View(size=8, count=1, scale=(0.05, 1.0)), 0, np.tile(size, (200, 1)), np.arange(200), 0, 0)
        assert (drawn.height >= 1).all() and (drawn.width >= 1).all()
        assert (drawn.top >= 0).all() and (drawn.top + drawn.height <= size[0]).all()
        assert (drawn.left >= 0).all() and (drawn.left + drawn.width <= size[1]).all()


def test_factors_lie_in_their_ranges_and_are_neutral_where_not_applied():
    n = 4000
    view = View(
        size=8, count=1, scale=(0.2, 1), jitter=0.7, brightness=1.5, contrast=0.4, hue=0.1, blur=0.3, solarize=0.2, background_removal=0.1
    )
    drawn = draw(view, 0, np.full((n, 2), 32), np.arange(n), 1, 2)
    on = drawn.jitter
    ranges = (("brightness", 0, 2.5, 1), ("contrast", 0.6, 1.4, 1), ("saturation", 0.2, 1.8, 1), ("hue", -0.1, 0.1, 0))
    for name, low, high, neutral in ranges:
        values = getattr(drawn, name)
        assert (values[~on] == neutral).all()
        assert kstest((values[on] - low) / (high - low), "uniform").pvalue > 1e-3
    assert (drawn.sigma[~drawn.blur] == 0).all()
    assert kstest((drawn.sigma[drawn.blur] - 0.1) / 1.9, "uniform").pvalue > 1e-3
    for name, probability in (("flip", 0.5), ("jitter", 0.7), ("gray", 0.2), ("blur", 0.3), ("solarize", 0.2), ("remove", 0.1)):
        assert abs(getattr(drawn, name).mean() - probability) < 5 * np.sqrt(0.25 / n)


def test_a_sample_is_drawn_alike_in_any_company_and_differently_under_any_other_key():
    view, rng = View(size=8, count=1, scale=(0.14, 1)), np.random.default_rng(0)
    samples, sizes = rng.integers(0, 10**9, 64), rng.integers(1, 600, (64, 2))
    whole = rows(draw(view, 3, sizes, samples, 7, 11))
    order = rng.permutation(64)
    assert (rows(draw(view, 3, sizes[order], samples[order], 7, 11)) == whole[order]).all()
    for i in range(0, 64, 9):
        assert (rows(draw(view, 3, sizes[i : i + 1], samples[i : i + 1], 7, 11)) == whole[i]).all()
    for key in ((4, 7, 11), (3, 8, 11), (3, 7, 12)):
        assert (rows(draw(view, key[0], sizes, samples, *key[1:])) != whole).any(1).all()
