"""Do DALI and its twin see the same pixels, and does a batch depend on its micro-step alone?"""

import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from fuseer.engine.data.dali import DaliLoader
from fuseer.engine.data.sources import Reader, SampleIndex, open_source
from fuseer.engine.data.torchvision import TorchvisionLoader
from fuseer.engine.data.view import View
from tests.pipelines import GraphLoader, skip_without_dali

OFF = dict(flip=0, jitter=0, grayscale=0, blur=0, solarize=0)
STILL = dict(brightness=0, contrast=0, saturation=0, hue=0)
OPERATIONS = {
    "flip": dict(flip=0.5),
    "brightness": dict(STILL, jitter=0.9, brightness=0.8),
    "contrast": dict(STILL, jitter=0.9, contrast=0.8),
    "saturation": dict(STILL, jitter=0.9, saturation=0.8),
    "hue": dict(STILL, jitter=0.9, hue=0.5),
    "gray": dict(grayscale=0.5),
    "blur": dict(blur=0.8),
    "solarize": dict(solarize=0.5),
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Eighteen files of two photographs in many sizes and encodings."""
    folder = tmp_path_factory.mktemp("photos")
    china, flower = (Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg"))
    small = china.resize((200, 120))
    for orientation in (2, 3, 5, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        small.save(folder / f"exif{orientation}.jpg", exif=exif)
    small.save(folder / "exif6.png", exif=exif)
    china.save(folder / "large.jpg", quality=90, subsampling=0)
    flower.save(folder / "progressive.jpg", progressive=True)
    small.convert("CMYK").save(folder / "cmyk.jpg")
    small.convert("L").save(folder / "grey.jpg")
    flower.resize((160, 240)).convert("L").save(folder / "grey.png")
    Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    small.convert("RGBA").rotate(20).save(folder / "alpha.png")
    small.quantize(100).save(folder / "palette.png")
    small.convert("1").save(folder / "bits.png")
    flower.resize((20, 12)).save(folder / "smaller_than_the_crop.bmp")
    flower.resize((1, 1)).save(folder / "one_pixel.png")
    flower.resize((7, 300)).save(folder / "narrow.webp")
    return open_source(str(folder))


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Six cuts of 64 x 64 pixels, which a view of all of it leaves as they are."""
    folder = tmp_path_factory.mktemp("squares")
    for i, name in enumerate(["china.jpg", "flower.jpg"] * 3):
        Image.fromarray(load_sample_image(name)[40 * i : 40 * i + 64, 60 * i : 60 * i + 64]).save(folder / f"{i}.png")
    return open_source(str(folder))


def loader(kind, source, views, batch_size, **options):
    skip_without_dali(kind)
    split = {key: options.pop(key) for key in ("rank", "world_size", "accumulation_steps") if key in options}
    index = SampleIndex(len(source), batch_size, 4, **split)
    reader = Reader(source, options.pop("max_broken_share", 0.0), 4)
    return kind(reader, index, views, **({"mean": (0, 0, 0), "std": (1 / 255,) * 3, "seed": 4} | options))


def take(made, start, count):
    """Micro-steps start … start + count - 1 of a new loader, which is closed."""
    stream = made.batches(start)
    batches = list(itertools.islice(stream, count))
    stream.close()
    made.close()
    return batches


def both(source, view, kind=GraphLoader):
    return [take(loader(kind, source, [view], len(source)), 0, 1)[0] for kind in (kind, TorchvisionLoader)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_equal_pixels_are_equal(squares, name):
    plain = View(size=64, count=4, scale=(1, 1), aspect=(1, 1), **OFF)
    dali, twin = (batch.crops[0] for batch in both(squares, plain.model_copy(update=OPERATIONS[name])))
    still = both(squares, plain)[0].crops[0]
    difference = (dali - twin).abs()
    # saturation goes through DALI's YIQ matrices, grey and blur through other orders of summation; the others agree to the bit
    mean, most = {"saturation": (0.2, 1), "gray": (0.001, 1), "blur": (0.001, 1)}.get(name, (0, 0))
    assert difference.mean() <= mean and difference.max() <= most
    assert (twin - still).abs().mean() > 1


def test_operations_in_threads_are_equal_to_the_bit(squares):
    plain = View(size=64, count=4, scale=(1, 1), aspect=(1, 1), **OFF)
    view = plain.model_copy(update={**OPERATIONS["hue"], "brightness": 0.8, "contrast": 0.8, "saturation": 0.8, **OPERATIONS["gray"]})
    dali, twin = (batch.crops[0] for batch in both(squares, view.model_copy(update=OPERATIONS["blur"]), DaliLoader))
    assert torch.equal(dali, twin) and (twin - both(squares, plain, DaliLoader)[0].crops[0]).abs().mean() > 10


@pytest.mark.parametrize("kind", [DaliLoader, GraphLoader])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_of_every_encoding_agree(photos, interpolation, kind):
    view = View(size=64, count=3, scale=(0.14, 1), interpolation=interpolation, **OFF)
    dali, twin = both(photos, view, kind)
    difference = (dali.crops[0] - twin.crops[0]).abs()
    # Pillow clips between its two passes, which shows where a bicubic filter meets pure black and white
    photographs = torch.tensor([not photos.paths[sample].endswith("bits.png") for sample in dali.samples])
    by_image = difference.mean((0, 2, 3, 4))
    assert by_image[photographs].max() < 0.5 and by_image[~photographs] < 2.0
    values = difference[:, photographs].flatten().sort().values
    assert values.mean() < 0.25 and values[int(len(values) * 0.999)] <= 6
    assert (dali.samples == twin.samples).all() and sorted(dali.samples.tolist()) == list(range(len(photos)))


def test_the_full_chain_agrees_and_other_draws_do_not(photos):
    views = [View(size=64, count=2, scale=(0.14, 1), solarize=0.2), View(size=24, count=3, scale=(0.05, 0.14), jitter=1, flip=0)]
    made = {kind: take(loader(kind, photos, views, 6), 0, 4) for kind in (DaliLoader, GraphLoader, TorchvisionLoader)}
    for i, view in enumerate(views):
        *ours, twin = (torch.cat([batch.crops[i] for batch in batches], dim=1) for batches in made.values())
        for dali in ours:
            assert dali.shape == (view.count, 24, 3, view.size, view.size)
            difference = (dali - twin).abs()
            assert difference.mean() < 0.4 and difference.flatten().sort().values[int(difference.numel() * 0.999)] <= 10
            assert (dali[0] - dali[1]).abs().mean() > 20
    same, again = (batch.crops[0] for batch in made[DaliLoader][:2])
    assert (same - again).abs().mean() > 20


@pytest.mark.parametrize("kind", [DaliLoader, GraphLoader, TorchvisionLoader])
def test_a_batch_depends_on_its_micro_step_alone(photos, kind):
    views = [View(size=32, count=1, scale=(0.2, 1), solarize=0.2), View(size=16, count=2, scale=(0.05, 0.3))]
    whole = take(loader(kind, photos, views, 8, threads=1), 0, 7)
    assert [batch.epoch for batch in whole] == [0, 0, 1, 1, 2, 2, 3]
    for start, options in ((1, {"threads": 2}), (2, {"prefetch_batches": 1}), (5, {"threads": 2, "prefetch_batches": 4})):
        for ours, resumed in zip(whole[start:], take(loader(kind, photos, views, 8, **options), start, 7 - start), strict=True):
            assert_equal(ours, resumed)
    for world, parts in ((2, 1), (4, 1), (1, 2), (2, 2)):
        split = {"world_size": world, "accumulation_steps": parts}
        ranks = [take(loader(kind, photos, views, 8, rank=rank, **split), 2 * parts, 2 * parts) for rank in range(world)]
        for step in range(2):
            dealt = [ranks[rank][step * parts + part] for part in range(parts) for rank in range(world)]
            for i in range(2):
                assert torch.equal(torch.cat([batch.crops[i] for batch in dealt], dim=1), whole[2 + step].crops[i])
            assert torch.equal(torch.cat([batch.samples for batch in dealt]), whole[2 + step].samples)
    assert not torch.equal(whole[0].crops[0], whole[1].crops[0])


def assert_equal(a, b):
    assert a.epoch == b.epoch and torch.equal(a.samples, b.samples) and torch.equal(a.labels, b.labels)
    assert all(torch.equal(x, y) for x, y in zip(a.crops, b.crops, strict=True))


@pytest.mark.parametrize("kind", [DaliLoader, GraphLoader, TorchvisionLoader])
def test_batches_stay_valid_and_are_normalised(squares, kind):
    view = View(size=64, count=1, scale=(1, 1), aspect=(1, 1), **OFF)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    stream = (made := loader(kind, squares, [view], 3, mean=mean, std=std)).batches(0)
    kept = [next(stream) for _ in range(8)]
    for batch in kept:
        for crop, sample in zip(batch.crops[0][0], batch.samples, strict=True):
            raw = torch.from_numpy(np.asarray(Image.open(squares.paths[sample])).copy()).permute(2, 0, 1) / 255
            expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
            assert (crop - expected).abs().max() < 1e-5
    stream.close()
    made.close()
    half = take(loader(kind, squares, [view], 3, mean=mean, std=std, dtype="float16"), 0, 1)[0].crops[0]
    assert half.dtype == torch.float16 and (half - kept[0].crops[0]).abs().max() < 4e-3


@pytest.mark.parametrize("kind", [DaliLoader, TorchvisionLoader])
def test_broken_images_are_replaced_and_too_many_reach_the_caller(tmp_path, kind):
    for i in range(12):
        Image.new("RGB", (9, 9), (20 * i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    source, view = open_source(str(tmp_path)), View(size=8, count=1, scale=(1, 1), **OFF)
    (tmp_path / "03.png").write_text("text")
    for batch in take(loader(kind, source, [view], 6, max_broken_share=0.1), 0, 4):
        assert 3 not in batch.samples.tolist()
        assert (batch.crops[0][0, :, 0].mean((1, 2)).round() == 20 * batch.samples).all()
    for i in range(12):
        (tmp_path / f"{i:02d}.png").write_text("text")
    with pytest.raises(RuntimeError, match="images read so far are broken, more than data.max_broken_share=0.1 allows; the first: "):
        take(loader(kind, source, [view], 6, max_broken_share=0.1), 0, 4)


def test_operators_that_cannot_apply_are_not_in_the_graph(squares):
    full = View(size=8, count=2, scale=(1, 1), solarize=0.5)
    graphs = [
        loader(DaliLoader, squares, [view], 3, **options).pipeline(lambda: []).serialize().decode("latin-1")
        for view, options in ((full, {}), (full.model_copy(update=OFF), {}), (full.model_copy(update={"saturation": 0, "hue": 0}), {}))
    ]
    for name in ("BrightnessContrast", "ColorTwist", "GaussianBlur", "ColorSpaceConversion", "ArithmeticGenericOp"):
        assert name in graphs[0] and name not in graphs[1]
    assert "ColorTwist" not in graphs[2] and "BrightnessContrast" in graphs[2]


def test_the_graph_for_a_gpu_is_made_without_one(squares):
    made = loader(DaliLoader, squares, [View(size=8, count=2, scale=(1, 1), solarize=0.5)], 3, device="cuda:0")
    graph = made.pipeline(lambda: []).serialize().decode("latin-1")
    assert "mixed" in graph and "gpu" in graph and "GaussianBlur" in graph


def test_without_dali_the_right_package_is_named(squares, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(RuntimeError, match=r"dali-cu13.*or dali-cu12.*only a placeholder.*data.pipeline=torchvision"):
        DaliLoader(None, SampleIndex(6, 3, 0), [], mean=(0, 0, 0), std=(1, 1, 1), seed=0)
    with pytest.raises(ValueError, match="at least 1; got 0 and 2"):
        loader(TorchvisionLoader, squares, [], 3, threads=0)
