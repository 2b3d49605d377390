"""Do the pictures show what is visible as it is, what is hidden as it was painted, and each head's map where it belongs?"""

import numpy as np
import pytest
import torch

from fuseer.engine.evaluate.pictures import _tiled, attention_rows, reconstruction_rows
from fuseer.engine.methods.mae import MAE, MAEConfig
from fuseer.engine.methods.method import Ground
from fuseer.engine.models.vit import build_vit
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.kernels.functional import gather_patches

CONFIG = load_recipe("tiny_mae").config()


def method(normalize: bool = True) -> MAE:
    torch.manual_seed(0)
    vit = build_vit("vit_tiny", patch_size=4, embed_dim=16, depth=2, num_heads=2, start="mae")
    config = MAEConfig(decoder_width=8, decoder_depth=1, decoder_heads=2, normalize_targets=normalize)
    return config.build(Ground(vit, None, None, 0, 1, 4)).eval()


def images(B: int = 3) -> torch.Tensor:
    return torch.randn(B, 3, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_perfect_prediction_is_the_image_and_visible_patches_are_untouched(normalize, monkeypatch):
    mae, shown, noise = method(normalize), images(), torch.rand(3, 6, generator=torch.Generator().manual_seed(2))
    painted, hidden = mae.reconstruction(shown, noise)
    assert hidden.shape == (3, 1, 8, 12) and hidden.sum().item() == 3 * 5 * 16, "all but one of six patches"
    every = hidden.expand_as(shown)
    assert torch.equal(painted[~every], shown[~every]) and not torch.isclose(painted[every], shown[every]).any(0).all()
    _, ids = mae.painted(shown, noise)
    true = gather_patches(shown, ids, patch=4)
    if normalize:
        true = (true - true.mean(-1, keepdim=True)) / (true.var(-1, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr(mae, "painted", lambda *_: (true, ids))
    torch.testing.assert_close(mae.reconstruction(shown, noise)[0], shown, rtol=1e-5, atol=1e-5)


def test_each_row_shows_image_visible_patches_and_painting():
    rows = reconstruction_rows(images(), method(), CONFIG)
    assert [len(row) for row in rows] == [2, 1] and all(picture.shape == (8, 12, 3) for row in rows for group in row for picture in group)
    whole, seen, _ = rows[0][0]
    grey = (seen == 128).all(-1)
    assert grey.sum() >= 5 * 16 and np.array_equal(seen[~grey], whole[~grey])


def test_each_head_has_a_map_that_is_brightest_where_it_looks(monkeypatch):
    vit, maps = method().backbone, torch.zeros(1, 2, 2, 3)
    maps[0, 0, 0, 2] = maps[0, 1, 1, 0] = 0.25
    monkeypatch.setattr(vit, "class_attention", lambda shown: maps)
    ((image, heads),) = attention_rows(torch.zeros(1, 3, 8, 12), vit, CONFIG)
    assert len(image) == 1 and len(heads) == 2
    for head, (row, column) in zip(heads, ((0, 2), (1, 0)), strict=True):
        bright = head.sum(-1)
        patch = bright[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        assert (patch == bright.max()).all() and (bright == bright.max()).sum() == 16


def test_small_pictures_are_enlarged_by_a_whole_factor_and_large_ones_reduced():
    small = _tiled([[[np.full((8, 12, 3), 7, np.uint8)] * 3, [np.full((8, 12, 3), 9, np.uint8)]]])
    assert small.size == (4 * 108 + 2 * 3 + 14, 72)
    assert small.getpixel((0, 0)) == (7, 7, 7) and small.getpixel((small.width - 1, 0)) == (9, 9, 9)
    large = _tiled([[[np.zeros((448, 224, 3), np.uint8)]]])
    assert large.size == (56, 112)
