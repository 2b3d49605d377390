"""Do masks show the object, ride with the image through crop and flip, and take the background away where that was drawn?"""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from fuseer.engine.data.dali import DaliLoader
from fuseer.engine.data.draw import draw
from fuseer.engine.data.masks import open_masks, saliency
from fuseer.engine.data.sources import Reader, SampleIndex, open_source
from fuseer.engine.data.torchvision import TorchvisionLoader
from fuseer.engine.data.view import View
from tests.pipelines import HAS_DALI, GraphLoader, skip_without_dali

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = np.rint(255 * np.array(MEAN)).astype(np.uint8)
STILL = dict(flip=0, jitter=0, grayscale=0, blur=0, solarize=0)


def cut_out(i):
    """A photograph's cut-out on another photograph's sky, water or roofs, and its alpha: a disc, a star or a triangle."""
    china, flower = (Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))
    size, draw_at = 90 + 12 * (i % 4), np.random.default_rng(i)
    left, top = draw_at.integers(20, 220 - size, 2)
    alpha = Image.new("L", (240, 240))
    angles = np.linspace(0, 2 * np.pi, (60, 10, 3)[i % 3], endpoint=False)
    reach = size / 2 * np.where((i % 3 == 1) & (np.arange(len(angles)) % 2 == 1), 0.55, 1.0)
    points = [(left + size / 2 + r * np.cos(a), top + size / 2 + r * np.sin(a)) for r, a in zip(reach, angles, strict=True)]
    ImageDraw.Draw(alpha).polygon(points, fill=255)
    background = china.crop((0, 0, 640, 200)).resize((240, 240)) if i % 2 else china.crop((0, 330, 640, 427)).resize((240, 240))
    background.paste(flower.crop((190, 90, 430, 330)).resize((240, 240)), mask=alpha)
    return background, np.asarray(alpha) >= 128


def overlap(found, true):
    return (found & true).sum() / (found | true).sum()


def test_saliency_finds_cut_outs_better_than_a_guess():
    middle = np.zeros((240, 240), bool)
    middle[40:200, 40:200] = True
    ours, guess = [], []
    for i in range(12):
        image, true = cut_out(i)
        mask = saliency(image)
        assert mask.shape == (240, 240) and set(np.unique(mask)) <= {0, 255}
        ours.append(overlap(mask >= 128, true))
        guess.append(overlap(middle, true))
    assert np.mean(ours) > 0.6 and np.mean(ours) > 1.7 * np.mean(guess), (np.mean(ours), np.mean(guess), np.round(ours, 2))


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (300, 2), (64, 64)])
def test_saliency_of_awkward_and_of_plain_images(size):
    found = saliency(Image.new("RGB", size, (9, 9, 9)))
    assert found.shape == size[::-1] and (found == 255).all()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four cut-outs, and a folder with their alphas."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        image, alpha = cut_out(i)
        for folder, what in (("images", image), ("masks", Image.fromarray(np.where(alpha, 255, 0).astype(np.uint8)))):
            (root / folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            what.save(root / folder / f"class{i % 2}" / f"{i}.{'png' if folder == 'masks' else 'bmp'}")
    return root


def batch_of(kind, pictures, view, masks):
    skip_without_dali(kind)
    source = open_source(str(pictures / "images"))
    options = {"mean": MEAN, "std": STD, "seed": 5, "masks": open_masks(masks, source)}
    made = kind(Reader(source, 0.0, 4), SampleIndex(4, 4, 5), [view], **options)
    batch = next(stream := made.batches(0))
    stream.close()
    made.close()
    shown = batch.crops[0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    return source, batch, (255 * shown).round().permute(0, 1, 3, 4, 2).numpy().astype(np.uint8)


@pytest.mark.parametrize("kind", [DaliLoader, GraphLoader, TorchvisionLoader])
def test_the_background_goes_where_that_was_drawn_and_the_mask_goes_where_the_crop_goes(pictures, kind):
    """Crops of the images' own resolution, so that no resize blurs what is compared; half of them flipped, half without background."""
    view = View(size=240, count=6, scale=(1, 1), aspect=(1, 1), background_removal=0.5, **(STILL | {"flip": 0.5}))
    source, batch, shown = batch_of(kind, pictures, view, str(pictures / "masks"))
    removed = 0
    for v, b in itertools.product(range(6), range(4)):
        drawn, number = draw(view, v, [(240, 240)] * 4, batch.samples.numpy(), 5, 0), int(Path(source.paths[batch.samples[b]]).stem)
        image, alpha = cut_out(number)
        expected = np.where(alpha[..., None], np.asarray(image), FILL) if drawn.remove[b] else np.asarray(image)
        expected = expected[:, ::-1] if drawn.flip[b] else expected
        assert (shown[v, b] == expected).all(), (v, b)
        removed += drawn.remove[b]
    assert 4 <= removed <= 20


@pytest.mark.parametrize("kind", [DaliLoader, GraphLoader])
def test_crops_without_background_agree(pictures, kind):
    view = View(size=96, count=3, scale=(0.2, 0.8), background_removal=0.7)
    _, batch, shown = batch_of(kind, pictures, view, "saliency")
    _, again, expected = batch_of(TorchvisionLoader, pictures, view, "saliency")
    difference = np.abs(shown.astype(int) - expected)
    assert difference.mean() < 0.5 and np.quantile(difference, 0.999) <= 10 and torch.equal(batch.samples, again.samples)
    _, _, plain = batch_of(TorchvisionLoader, pictures, view.model_copy(update={"background_removal": 0.0}), "")
    assert np.abs(plain.astype(int) - expected).mean() > 5


def test_masks_that_are_missing_or_of_another_size_are_named(pictures, tmp_path):
    view = View(size=8, count=1, scale=(1, 1), background_removal=1.0)
    with pytest.raises(ValueError, match="background_removal above 0, and nothing says what the background is; set data.masks"):
        batch_of(TorchvisionLoader, pictures, view, "")
    with pytest.raises(ValueError, match=r"data.masks: .*nowhere is no folder; give a folder of masks, or 'saliency'"):
        open_masks(str(tmp_path / "nowhere"), None)
    with pytest.raises(
        ValueError, match=r"the mask of class\d/\d.bmp is to be .*\d.png: there is none; add it, or set data.masks=saliency"
    ):
        batch_of(TorchvisionLoader, pictures, view, str(tmp_path))
    for i in range(4):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        Image.new("L", (7, 9)).save(tmp_path / f"class{i % 2}" / f"{i}.png")
    with pytest.raises(ValueError, match=r"must be of the size of class\d/\d.bmp, 240 x 240; got 7 x 9"):
        batch_of(DaliLoader if HAS_DALI else TorchvisionLoader, pictures, view, str(tmp_path))
