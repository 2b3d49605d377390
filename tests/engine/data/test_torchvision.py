"""Is the twin's arithmetic torchvision's, and is its stream the same however it is made?"""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from sklearn.datasets import load_sample_image

from fuseer.engine.data import pixels as twin
from fuseer.engine.data.draw import Drawn
from fuseer.engine.data.torchvision import resized
from fuseer.engine.data.view import View

B = 6


@pytest.fixture(scope="module")
def photos():
    both = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return np.stack([both[i % 2][30 * i : 30 * i + 64, 50 * i : 50 * i + 64] for i in range(B)])


def by_torchvision(photos, operation, *values):
    """operation(float image, value…) of each photo, on the scale 0..255, rounded."""
    images = torch.from_numpy(photos).permute(0, 3, 1, 2).double() / 255
    done = [operation(image, *(float(v[i]) for v in values)) for i, image in enumerate(images)]
    return (torch.stack(done) * 255).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()


def drawn_as(**given):
    """Parameters that do nothing, but for those given."""
    n = len(next(iter(given.values())))
    neutral = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "sigma": 0.0}
    whole = dict.fromkeys(("top", "left", "height", "width"), np.zeros(n, np.int64))
    coins = dict.fromkeys(("flip", "jitter", "gray", "blur", "solarize", "remove"), np.zeros(n, bool))
    return Drawn(**(whole | coins | {name: np.full(n, x, np.float32) for name, x in neutral.items()} | given))


def taps(sigma):
    blur = drawn_as(sigma=np.float32(sigma), blur=np.ones(len(sigma), bool))
    return twin.taps_of(View(size=8, count=1, scale=(1, 1)), blur)[1]


def assert_close(ours, theirs, photos, most=1, mean=0.005):
    difference = np.abs(ours.astype(float) - theirs)
    assert difference.max() <= most and difference.mean() <= mean, (difference.max(), difference.mean())
    assert np.abs(photos - theirs).mean() > 100 * mean


def test_each_operation_is_torchvisions(photos):
    hue = np.array([-0.4871, -0.3137, -0.0519, 0.1093, 0.2711, 0.4657], np.float32)
    assert_close(twin.hue_shifted(photos, hue), by_torchvision(photos, TF.adjust_hue, hue), photos)
    grey = by_torchvision(photos, lambda image: TF.rgb_to_grayscale(image, 3))
    assert_close(twin.gray(photos), grey, photos)
    sigma = np.array([0.1, 0.33, 0.34, 1.0, 1.7, 2.0], np.float32)
    blurred = by_torchvision(photos, lambda image, s: TF.gaussian_blur(image, 2 * int(np.ceil(3 * np.float32(s))) + 1, s), sigma)
    assert_close(twin.blurred(photos, taps(sigma)), blurred, photos)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_factor_is_torchvisions(photos, name):
    # none that puts many products on a half, where one ulp decides the rounding
    factor = np.array([0, 0.2137, 0.9173, 1, 1.4191, 1.7931], np.float32)
    view = View(size=64, count=1, scale=(1, 1), **(dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0) | {name: 0.8}))
    ours = twin.augmented(photos, view, drawn_as(jitter=np.ones(B, bool), **{name: factor}))
    theirs = by_torchvision(photos, getattr(TF, f"adjust_{name}"), factor)
    # contrast pivots on the mean of the rounded grey image, which can move every pixel's rounding
    assert_close(ours, theirs, photos, mean=0.05 if name == "contrast" else 0.005)


def test_blur_of_images_smaller_than_its_window(photos):
    for size in (1, 2, 3):
        small = photos[:1, :size, :size]
        wide = np.pad(small, ((0, 0), (8, 8), (8, 8), (0, 0)), mode="reflect" if size > 1 else "edge")
        inner = twin.blurred(wide, taps([2.0]))[:, 8 : 8 + size, 8 : 8 + size]
        assert (twin.blurred(small, taps([2.0])) == inner).all()


def test_resized_crop_is_torchvisions_on_pillow(photos):
    image = Image.fromarray(photos[0])
    view = View(size=20, count=1, scale=(1, 1), interpolation="bicubic")
    box = dict(zip(("top", "left", "height", "width"), np.array([[3], [5], [40], [31]]), strict=True))
    expected = TF.resized_crop(image, 3, 5, 40, 31, [20, 20], TF.InterpolationMode.BICUBIC)
    assert (resized([image], view, drawn_as(**box))[0] == np.asarray(expected)).all()
