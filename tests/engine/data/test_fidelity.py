"""Given what was drawn, does every pipeline make torchvision's pixels, and does the compiled arithmetic make numpy's bits?"""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from sklearn.datasets import load_sample_image

from fuseer.engine.data import pixels
from fuseer.engine.data.dali import DaliLoader
from fuseer.engine.data.draw import draw
from fuseer.engine.data.sources import Reader, SampleIndex, open_source
from fuseer.engine.data.torchvision import TorchvisionLoader
from fuseer.engine.data.view import View
from tests.pipelines import GraphLoader, needs_dali, skip_without_dali

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFF = dict(flip=0, jitter=0, grayscale=0, blur=0, solarize=0)
STILL = dict(brightness=0, contrast=0, saturation=0, hue=0)
CROP = dict(size=80, count=1, scale=(0.14, 1.0), **OFF)
SIZE = (120, 160)


def of(name, factor):
    """torchvision's adjust_<name> of float pixels, where a factor was drawn."""
    return lambda x, drawn: getattr(TF, f"adjust_{name}")(x, factor(drawn)) if drawn.jitter else x


def gaussian(x, drawn):
    return TF.gaussian_blur(x, 2 * int(np.ceil(3 * drawn.sigma)) + 1, float(drawn.sigma)) if drawn.blur else x


# name: (what the view asks for, what torchvision does, mean and 99.9th percentile of the difference allowed, of 255)
OPERATIONS = {
    "bilinear": ({}, lambda x, drawn: x, 0.2, 1.1),
    "bicubic": (dict(interpolation="bicubic"), lambda x, drawn: x, 0.2, 1.1),
    "flip": (dict(flip=0.5), lambda x, drawn: TF.hflip(x) if drawn.flip else x, 0.2, 1.1),
    "brightness": (dict(STILL, jitter=0.9, brightness=0.8), of("brightness", lambda d: float(d.brightness)), 0.35, 2.5),
    "contrast": (dict(STILL, jitter=0.9, contrast=0.8), of("contrast", lambda d: float(d.contrast)), 0.35, 2.5),
    "saturation": (dict(STILL, jitter=0.9, saturation=0.8), of("saturation", lambda d: float(d.saturation)), 0.4, 2.5),
    "hue": (dict(STILL, jitter=0.9, hue=0.2), of("hue", lambda d: float(d.hue)), 0.3, 2.8),
    "gray": (dict(grayscale=0.5), lambda x, drawn: TF.rgb_to_grayscale(x, 3) if drawn.gray else x, 0.3, 2.3),
    "blur": (dict(blur=0.8), gaussian, 0.3, 2.2),
    # a threshold: a pixel of 127 or 128 may fall on the other side
    "solarize": (dict(solarize=0.5), lambda x, drawn: TF.solarize(x, 127.5 / 255) if drawn.solarize else x, 0.2, 2.3),
}
VIEWS = [View(**(CROP | asked)) for asked, *_ in OPERATIONS.values()]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twelve different cuts of two photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    both = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    for i in range(12):
        both[i % 2].crop((30 * i, 20 * i, 30 * i + 2 * SIZE[1], 20 * i + 2 * SIZE[0])).resize(SIZE[::-1]).save(folder / f"{i:02d}.png")
    return open_source(str(folder))


@pytest.fixture(scope="module")
def by_torchvision(photographs):
    """[V, B, 3, h, w] on the scale 0..255 of each operation, made by torchvision alone from the same drawn parameters."""
    index, found, number = SampleIndex(12, 12, 4), [], 0
    epoch, _, samples = index.samples(0)
    for view, (_, change, *_) in zip(VIEWS, OPERATIONS.values(), strict=True):
        mode = {"bilinear": TF.InterpolationMode.BILINEAR, "bicubic": TF.InterpolationMode.BICUBIC}[view.interpolation]
        views = []
        for _ in range(view.count):
            drawn = draw(view, number, [SIZE] * 12, samples, 4, epoch)
            number += 1
            for b, sample in enumerate(samples):
                one = dataclasses.make_dataclass("One", drawn.__dataclass_fields__)(*(x[b] for x in vars(drawn).values()))
                image = TF.pil_to_tensor(Image.open(photographs.paths[sample]).convert("RGB"))
                box = [int(x) for x in (one.top, one.left, one.height, one.width)]
                # resized as float, rounded as a byte, changed as float: nothing of ours
                small = TF.resized_crop(image.double(), *box, [80, 80], mode, antialias=True).clamp(0, 255).round()
                views.append((change(small / 255, one) * 255).clamp(0, 255))
        found.append(torch.stack(views).view(view.count, 12, 3, 80, 80).float())
    return found


@pytest.mark.parametrize("kind", [DaliLoader, GraphLoader, TorchvisionLoader])
def test_every_augmentation_is_torchvisions(photographs, by_torchvision, kind):
    skip_without_dali(kind)
    made = kind(Reader(photographs, 0.0, 4), SampleIndex(12, 12, 4), VIEWS, mean=MEAN, std=STD, seed=4)
    batch = next(stream := made.batches(0))
    stream.close()
    made.close()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    for name, crops, expected in zip(OPERATIONS, batch.crops, by_torchvision, strict=True):
        _, _, allowed_mean, allowed_most = OPERATIONS[name]
        difference = (crops - (expected / 255 - mean) / std).mul(std * 255).abs()
        most = difference.flatten().sort().values[int(0.999 * difference.numel())].item()
        assert difference.mean() <= allowed_mean and most <= allowed_most, (name, difference.mean().item(), most)
        if name not in ("bilinear", "bicubic"):
            assert (expected - by_torchvision[0]).abs().mean() > 3, name


def test_compiled_arithmetic_is_numpys_to_the_bit():
    if pixels._REASON is not None:
        pytest.skip(pixels._REASON)
    china, random = load_sample_image("china.jpg"), np.random.default_rng(0)
    for size, seed in itertools.product((1, 2, 5, 33, 64, 80), range(2)):
        asked = dict(solarize=0.3, hue=0.5, brightness=1.5) if seed else dict(solarize=0.3)
        view = View(size=size, count=1, scale=(1, 1), blur_sigma=(0.1, 2.0 + 3 * seed), **asked)
        cuts = torch.from_numpy(np.stack([china[y : y + size, x : x + size] for y, x in random.integers(0, 340, (48, 2))]))
        drawn = draw(view, 0, [(9, 9)] * 48, np.arange(48), seed, 0)
        outs = {backend: torch.full((48, 3, size, size), torch.nan) for backend in ("cpu", "reference")}
        for backend, out in outs.items():
            pixels.augment_pixels(cuts.permute(0, 3, 1, 2), view, drawn, pixels.scale_of(MEAN, STD), out, backend)
        assert torch.equal(outs["cpu"], outs["reference"]), (size, seed)
        half = torch.empty(48, 3, size, size, dtype=torch.float16)
        pixels.augment_pixels(cuts.permute(0, 3, 1, 2), view, drawn, pixels.scale_of(MEAN, STD), half)
        assert torch.equal(half, outs["cpu"].half())


def _fields(data):
    """(number, value) of a message in protobuf's wire format."""
    at = 0

    def integer():
        nonlocal at
        value = shift = 0
        while True:
            value, shift, at = value | (data[at] & 127) << shift, shift + 7, at + 1
            if data[at - 1] < 128:
                return value

    while at < len(data):
        key = integer()
        length = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            yield key >> 3, integer()
        else:
            length = integer() if length is None else length
            yield key >> 3, data[at : at + length]
            at += length


def operators(graph):
    """(counted (operator, its arguments), devices of each operator) of a serialized pipeline; where it stands in our files is left out."""
    found, devices = Counter(), {}
    for number, message in _fields(graph):
        parts = list(_fields(message)) if number == 5 else []
        name = parts[0][1].decode() if parts else ""
        arguments = {dict(_fields(value))[1].decode(): bytes(value) for key, value in parts if key == 4}
        device = next((name.decode() for name in (b"mixed", b"gpu", b"cpu") if name in arguments.get("device", b"")), "")
        kept = {key: value for key, value in arguments.items() if key not in ("device", "preserve_name") and not key.startswith("_")}
        if name:
            found[name, tuple(sorted(kept.items()))] += 1
            devices.setdefault(name, set()).add(device)
    return found, devices


@needs_dali
def test_the_gpus_graph_has_the_operators_and_arguments_of_the_cpus():
    """Constructed, not run: both are serialised without a GPU."""
    views = [View(size=8, count=2, scale=(0.5, 1), solarize=0.5, background_removal=0.1), View(size=6, count=1, scale=(0.1, 1), jitter=1.0)]

    def graph(device, views):
        options = {"mean": MEAN, "std": STD, "seed": 0, "device": device, "masks": lambda sample: None}
        return operators(DaliLoader(None, SampleIndex(6, 3, 0), views, **options).pipeline(lambda: []).serialize())

    (on_gpu, devices), (on_cpu, plain) = (graph(device, views) for device in ("cuda:0", None))
    assert on_gpu == on_cpu
    assert sum(on_cpu.values()) > 100
    assert {"Resize", "GaussianBlur", "ColorTwist", "CropMirrorNormalize", "Slice", "BrightnessContrast"} <= {name for name, _ in on_cpu}
    decoder = next(name for name in devices if "Image" in name)
    assert devices[decoder] == {"mixed"} and plain[decoder] == {"cpu"}
    on_cpu_only = {"ExternalSource", decoder}
    assert all(found == {"gpu"} for name, found in devices.items() if name not in on_cpu_only and "onditional" not in name), devices
    assert graph(None, [views[0].model_copy(update={"interpolation": "bicubic"}), views[1]])[0] != on_cpu
