"""How do drawn parameters become pixels on the CPU, without DALI?"""

import io
from collections.abc import Iterator

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps

from fuseer.engine.data.draw import Drawn
from fuseer.engine.data.feed import Feed
from fuseer.engine.data.view import Batch, View

_GRAY = np.array([0.299, 0.587, 0.114], np.float32)
_FILTER = {"bilinear": TF.InterpolationMode.BILINEAR, "bicubic": TF.InterpolationMode.BICUBIC}


class TorchvisionLoader(Feed):
    """The micro-batches of `index`, decoded and resized by Pillow and torchvision, coloured and blurred by numpy, in threads.

    Twin of `dali.DaliLoader`: same constructor, parameters and arithmetic, pixels rounded to 8 bits after every operation. Bitwise the
    same for every number of threads, world size, accumulation and start. Errors of `reader` are raised by the iterator.
    """

    def batches(self, start: int) -> Iterator[Batch]:
        for epoch, parts in self.prepared(start, self._part):
            samples = [sample for part, _ in parts for sample in part]
            yield Batch(
                crops=[torch.cat([crops[i] for _, crops in parts], dim=1).to(self.device) for i in range(len(self.views))],
                samples=torch.tensor([sample.sample for sample in samples]),
                labels=torch.tensor([sample.label for sample in samples]),
                epoch=epoch,
            )

    def _part(self, samples: list, drawn: list[list[Drawn]]) -> tuple[list, list[torch.Tensor]]:
        images = [decoded(sample.data) for sample in samples]
        mean, std = (np.array(x, np.float32).reshape(3, 1, 1) * 255 for x in (self.mean, self.std))
        crops = []
        for view, copies in zip(self.views, drawn, strict=True):
            pixels = np.stack([augmented(resized(images, view, copy), view, copy) for copy in copies])
            planes = np.ascontiguousarray(pixels.transpose(0, 1, 4, 2, 3)).astype(np.float32)
            crops.append(torch.from_numpy((planes - mean) / std).to(self.dtype_of_crops))
        return samples, crops


def decoded(data: bytes) -> Image.Image:
    """The image upright, RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def resized(images: list[Image.Image], view: View, drawn: Drawn) -> np.ndarray:
    """Crop, resize with an antialiasing filter -> uint8 [B, size, size, 3]."""
    boxes = zip(images, drawn.top, drawn.left, drawn.height, drawn.width, strict=True)
    size, mode = [view.size, view.size], _FILTER[view.interpolation]
    return np.stack([np.asarray(TF.resized_crop(image, *map(int, box), size, mode)) for image, *box in boxes])


def augmented(pixels: np.ndarray, view: View, drawn: Drawn) -> np.ndarray:
    """Everything between the resize and the normalisation, in the order of `View`, on uint8 [B, h, w, 3].

    The formulas are torchvision's for float images; contrast pivots on the mean of the rounded grey image, hue shifts in HSV. Blur is
    separable with 2 ceil(3 sigma) + 1 taps, borders mirrored without repeating the edge. Solarize inverts pixels of 128 and above.
    """
    pixels = pixels.copy()
    if view.flip:
        pixels[drawn.flip] = pixels[drawn.flip, :, ::-1]
    if view.jitter:
        pixels[drawn.jitter] = _jittered(pixels[drawn.jitter], view, drawn, drawn.jitter)
    if view.grayscale and drawn.gray.any():
        pixels[drawn.gray] = gray(pixels[drawn.gray])
    if view.blur and drawn.blur.any():
        pixels[drawn.blur] = blurred(pixels[drawn.blur], drawn.sigma[drawn.blur])
    if view.solarize and drawn.solarize.any():
        chosen = pixels[drawn.solarize]
        pixels[drawn.solarize] = np.where(chosen >= 128, 255 - chosen, chosen)
    return pixels


def _jittered(x: np.ndarray, view: View, drawn: Drawn, chosen: np.ndarray) -> np.ndarray:
    if view.brightness:
        x = _eight_bit(x * _each(drawn.brightness[chosen]))
    if view.contrast:
        pivot = _each(gray(x)[..., 0].mean(axis=(1, 2), dtype=np.float64).astype(np.float32))
        x = _eight_bit(pivot + _each(drawn.contrast[chosen]) * (x - pivot))
    if view.saturation:
        grey = (x * _GRAY).sum(-1, keepdims=True)
        x = _eight_bit(grey + _each(drawn.saturation[chosen]) * (x - grey))
    if view.hue:
        x = hue_shifted(x, drawn.hue[chosen])
    return x


def gray(x: np.ndarray) -> np.ndarray:
    """0.299 R + 0.587 G + 0.114 B, rounded, in three equal channels."""
    return np.repeat(_eight_bit((x * _GRAY).sum(-1, keepdims=True)), 3, axis=-1)


def hue_shifted(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """The HSV hue of uint8 [B, h, w, 3] shifted by `turns` [B], value and saturation kept.

    Channel n = 5, 3, 1 (red, green, blue) of the result is v - c clip(min(k, 4 - k), 0, 1) with k = (n + 6 hue) mod 6.
    """
    r, g, b = (x[..., i : i + 1].astype(np.float32) for i in range(3))
    v = np.maximum(np.maximum(r, g), b)
    c = v - np.minimum(np.minimum(r, g), b)
    width = np.maximum(c, 1)
    hue = np.where(v == r, (g - b) / width, np.where(v == g, 2 + (b - r) / width, 4 + (r - g) / width))
    k = np.mod(hue + 6 * _each(turns) + np.array([5, 3, 1], np.float32), 6)
    return _eight_bit(v - c * np.clip(np.minimum(k, 4 - k), 0, 1))


def blurred(x: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Gaussian blur of uint8 [B, h, w, 3] by sigma [B] pixels."""
    radii = np.ceil(3 * sigma).astype(int)
    at = np.arange(-radii.max(), radii.max() + 1)
    taps = np.exp(-0.5 * (at / sigma[:, None]) ** 2) * (np.abs(at) <= radii[:, None])
    taps = (taps / taps.sum(1, keepdims=True)).astype(np.float32)
    x = x.astype(np.float32)
    for axis in (1, 2):
        source, size = x, x.shape[axis]
        x = np.zeros_like(source)
        for tap, offset in zip(taps.T, at, strict=True):
            x += _each(tap) * source.take(_mirrored(np.arange(size) + offset, size), axis=axis)
    return _eight_bit(x)


def _mirrored(at: np.ndarray, size: int) -> np.ndarray:
    """Indices outside [0, size) reflected at the edge pixels, as often as needed."""
    if size == 1:
        return np.zeros_like(at)
    at = np.mod(at, 2 * size - 2)
    return np.minimum(at, 2 * size - 2 - at)


def _each(values: np.ndarray) -> np.ndarray:
    return values[:, None, None, None]


def _eight_bit(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)
