"""Does the crop sheet show the batch's pixels, in the right place, at a readable size?"""

import pytest
import torch
from PIL import Image

from fuseer.engine.data.sheet import crop_sheet
from fuseer.engine.data.view import Batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(rgb, size):
    """[3, size, size] of one colour as the pipelines hand it over."""
    return ((torch.tensor(rgb) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).view(3, 1, 1).expand(3, size, size).clone()


def batch_of(*sizes, images=3, labels=None, dtype=torch.float32):
    """One view per entry of `sizes`; the crop of view v and image b is filled with the colour (40·v + 20, 25·b + 10, 200)."""
    crops = [torch.stack([normalised((40 * v + 20, 25 * b + 10, 200), size) for b in range(images)])[None] for v, size in enumerate(sizes)]
    labels = torch.full((images,), -1) if labels is None else torch.tensor(labels)
    return Batch([views.to(dtype) for views in crops], torch.arange(images), labels, 0)


def drawn(batch, path, **options):
    return Image.open(crop_sheet(batch, path, mean=MEAN, std=STD, **options))


def colours(sheet):
    """{colour: bounding box} of every crop colour found."""
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
    found = {}
    for colour in torch.unique(pixels[pixels[..., 2] == 200], dim=0).tolist():
        y, x = torch.where((pixels == torch.tensor(colour, dtype=torch.uint8)).all(-1))
        if len(x) > 50:
            found[tuple(colour)] = (x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_crop_is_drawn_in_its_row_and_column_with_its_own_colour(tmp_path, dtype):
    sheet = drawn(batch_of(28, 28, 18, dtype=dtype), tmp_path / "crops.png")
    boxes = colours(sheet)
    assert set(boxes) == {(40 * v + 20, 25 * b + 10, 200) for v in range(3) for b in range(3)}
    for v, side in enumerate((112, 112, 126)):
        for b in range(3):
            x0, y0, x1, y1 = boxes[(40 * v + 20, 25 * b + 10, 200)]
            assert (x1 - x0, y1 - y0) == (side, side), "whole enlargement factors: 28 · 4 and 18 · 7"
            assert b == 0 or y0 > boxes[(40 * v + 20, 25 * (b - 1) + 10, 200)][3]
            assert v == 0 or x0 > boxes[(40 * (v - 1) + 20, 25 * b + 10, 200)][2]


def test_views_of_one_size_stand_together(tmp_path):
    boxes = colours(drawn(batch_of(28, 18, 28), tmp_path / "crops.png"))
    first, small, third = (boxes[(40 * v + 20, 10, 200)] for v in range(3))
    assert first[0] < third[0] < small[0]
    assert small[0] - third[2] > third[0] - first[2], "a wider gap between sizes than between views"


def test_small_crops_are_enlarged_by_nearest_neighbour(tmp_path):
    batch = batch_of(8, images=1)
    batch.crops[0][0, 0, :, 0, 0] = normalised((20, 250, 200), 1).flatten()
    boxes = colours(drawn(batch, tmp_path / "crops.png"))
    x0, y0, x1, y1 = boxes[(20, 250, 200)]
    assert (x1 - x0, y1 - y0) == (16, 16), "one pixel of 8 is a square of 16 of 128, its edges sharp"
    assert (x0, y0) == boxes[(20, 10, 200)][:2]


@pytest.mark.parametrize("sizes", [(224,) * 2 + (96,) * 6, (224,) * 2 + (96,) * 30, (1,), (28,) * 100])
def test_the_sheet_is_never_wider_than_1400_pixels(tmp_path, sizes):
    sheet = drawn(batch_of(*sizes, images=2, labels=[3, 12345]), tmp_path / "crops.png")
    assert sheet.width <= 1400
    assert len(sizes) == 1 or sheet.width > 700


def test_images_limits_the_rows(tmp_path):
    batch = batch_of(28, images=5)
    assert {colour[1] for colour in colours(drawn(batch, tmp_path / "a.png", images=2))} == {10, 35}
    assert len(colours(drawn(batch, tmp_path / "b.png"))) == 5


def test_known_labels_take_room_at_the_left_and_unknown_ones_none(tmp_path):
    none, short, long = (colours(drawn(batch_of(28, labels=of), tmp_path / "a.png")) for of in (None, [7, -1, 3], [1007, 2, 3]))
    assert none[(20, 10, 200)][0] < short[(20, 10, 200)][0] < long[(20, 10, 200)][0]


def test_values_outside_the_image_range_are_clipped(tmp_path):
    batch = batch_of(28, images=1)
    batch.crops[0][0, 0, :, :14] = 1e4
    batch.crops[0][0, 0, :, 14:] = float("nan")
    sheet = drawn(batch, tmp_path / "deeper" / "crops.png")
    assert {(255, 255, 255), (0, 0, 0)} <= {colour for _, colour in sheet.getcolors(1 << 20)}


@pytest.mark.parametrize(
    ("batch", "options", "words"),
    [
        (batch_of(images=1), {}, "no views"),
        (Batch([torch.zeros(2, 0, 3, 8, 8)], torch.arange(0), torch.arange(0), 0), {}, r"crops\[0\] must be .*\[2, 0, 3, 8, 8\]"),
        (Batch([torch.zeros(2, 3, 8, 8)], torch.arange(2), torch.arange(2), 0), {}, r"must be \[V, B, 3, h, w\].*got \[2, 3, 8, 8\]"),
        (batch_of(28), {"mean": (0.5,)}, "one number per channel"),
        (batch_of(28), {"images": 0}, "at least 1; got 0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(tmp_path, batch, options, words):
    with pytest.raises(ValueError, match=words):
        crop_sheet(batch, tmp_path / "crops.png", **{"mean": MEAN, "std": STD, **options})
    assert not list(tmp_path.iterdir())
