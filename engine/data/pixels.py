"""How are the pixels of views flipped, coloured, blurred and normalised on the CPU?"""

import numpy as np
import torch

from fuseer.engine.data.draw import Drawn
from fuseer.engine.data.view import View
from fuseer.kernels import dispatch, extension

# csrc/pixels_cpu.cpp implements it
_COMPILED = dispatch.define(
    "augment_pixels",
    "(Tensor pixels, Tensor steps, Tensor factors, Tensor taps, Tensor radii, Tensor scale, Tensor(a!) out) -> ()",
)
# a library that was built before this function came lacks it
_OLD = not torch._C._dispatch_has_kernel_for_dispatch_key("fuseer::augment_pixels", "CPU")
_REASON = extension.reason() or ("fuseer.kernels._C is older than this file; install fuseer again" if _OLD else None)
_FLIP, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY, _BLUR, _SOLARIZE = (1 << bit for bit in range(8))
_JITTER = {"brightness": _BRIGHTNESS, "contrast": _CONTRAST, "saturation": _SATURATION, "hue": _HUE}


def augment_pixels(pixels: torch.Tensor, view: View, drawn: Drawn, scale: np.ndarray, out: torch.Tensor, backend: str = "") -> None:
    """out <- (augmented(pixels) - mean) / std: what a view does after its crop is resized.

    pixels: uint8 [B, 3, h, w]; scale: float32 [2, 3], mean and std of the channels on the scale 0..255; out: float32 or float16, of the
    shape of pixels. In the calling thread, image by image, without the interpreter's lock. backend: "cpu" for the compiled function,
    "reference" for the numpy one below, "" for the first where it was built. The two agree to the bit, on every instruction set.
    """
    if backend != "reference" and _REASON is None:
        wide = out if out.dtype == torch.float32 and out.is_contiguous() else torch.empty(pixels.shape)
        radii, taps = taps_of(view, drawn)
        numbers = (_steps(view, drawn), _factors(drawn), taps, radii, scale)
        _COMPILED(pixels.contiguous(), *map(torch.from_numpy, numbers), wide)
        if wide is not out:
            out.copy_(wide)
    elif backend == "cpu":
        raise RuntimeError(f"augment_pixels: backend 'cpu' was asked for and cannot run; {_REASON}")
    else:
        done = augmented(pixels.permute(0, 2, 3, 1).numpy(), view, drawn)
        planes = np.ascontiguousarray(done.transpose(0, 3, 1, 2)).astype(np.float32)
        mean, std = scale[:, :, None, None]
        out.copy_(torch.from_numpy((planes - mean) / std))


def scale_of(mean, std) -> np.ndarray:
    """mean and std per channel on the scale 0..1 -> float32 [2, 3] on the scale 0..255."""
    return np.array([mean, std], np.float32) * 255


def _steps(view: View, drawn: Drawn) -> np.ndarray:
    """int32 [B]: the bits of what is done to each sample."""
    chosen = {_FLIP: drawn.flip & (view.flip > 0), _GRAY: drawn.gray & (view.grayscale > 0)}
    chosen |= {_BLUR: drawn.blur & (view.blur > 0), _SOLARIZE: drawn.solarize & (view.solarize > 0)}
    chosen |= {bit: drawn.jitter & (view.jitter > 0 and getattr(view, name) > 0) for name, bit in _JITTER.items()}
    return np.sum([bit * of for bit, of in chosen.items()], axis=0).astype(np.int32)


def _factors(drawn: Drawn) -> np.ndarray:
    return np.stack([getattr(drawn, name) for name in _JITTER], axis=1).astype(np.float32)


def taps_of(view: View, drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """Radii int32 [B] and weights float32 [B, 2 R + 1] of the Gaussians, in the middle of a table as wide as the widest of the view."""
    sigma = np.where(drawn.blur, drawn.sigma, np.float32(0))
    radii = np.ceil(3 * sigma).astype(np.int32)
    widest = int(np.ceil(3 * np.float32(view.blur_sigma[1]))) if view.blur else 0
    at = np.arange(-widest, widest + 1)
    taps = np.exp(-0.5 * (at / np.where(sigma > 0, sigma, 1)[:, None]) ** 2) * (np.abs(at) <= radii[:, None])
    return radii, (taps / taps.sum(1, keepdims=True)).astype(np.float32)


def augmented(pixels: np.ndarray, view: View, drawn: Drawn) -> np.ndarray:
    """Everything between the resize and the normalisation, in the order of `View`, on uint8 [B, h, w, 3], in numpy.

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
        pixels[drawn.blur] = blurred(pixels[drawn.blur], taps_of(view, drawn)[1][drawn.blur])
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
        grey = _luma(x)
        x = _eight_bit(grey + _each(drawn.saturation[chosen]) * (x - grey))
    if view.hue:
        x = hue_shifted(x, drawn.hue[chosen])
    return x


def gray(x: np.ndarray) -> np.ndarray:
    """0.299 R + 0.587 G + 0.114 B, rounded, in three equal channels."""
    return np.repeat(_eight_bit(_luma(x)), 3, axis=-1)


def _luma(x: np.ndarray) -> np.ndarray:
    r, g, b = (x[..., i : i + 1].astype(np.float32) for i in range(3))
    return r * np.float32(0.299) + g * np.float32(0.587) + b * np.float32(0.114)


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


def blurred(x: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """uint8 [B, h, w, 3] convolved with the rows of taps [B, 2 R + 1], down the columns and then along the rows."""
    at = np.arange(taps.shape[1]) - taps.shape[1] // 2
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
