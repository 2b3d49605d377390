"""Which crop, flip, jitter, blur and solarization does each view of each sample get?"""

import math
from dataclasses import dataclass

import numpy as np

from fuseer.engine.data.philox import uniforms
from fuseer.engine.data.view import View

_TRIES = 10


@dataclass(frozen=True)
class Drawn:
    """The parameters of one view of B samples, every field [B].

    top, left, height, width: int64 pixels of the (upright) image. flip, jitter, gray, blur, solarize: bool. brightness, contrast,
    saturation: float32 factors, 1 where not applied. hue: float32 turns in [-0.5, 0.5], 0 where not applied. sigma: float32 pixels of
    the view, 0 where not applied. remove: bool, where the background is replaced. A pipeline applies what it finds; it decides nothing.
    """

    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    flip: np.ndarray
    jitter: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    hue: np.ndarray
    gray: np.ndarray
    blur: np.ndarray
    sigma: np.ndarray
    solarize: np.ndarray
    remove: np.ndarray


def draw(view: View, view_index: int, sizes, samples, seed: int, epoch: int) -> Drawn:
    """Parameters keyed by (seed, epoch, sample, view_index) alone: the rest of the batch, the rank and the past do not matter.

    sizes [B, 2] are (height, width) of the images as displayed; samples [B] are the samples their positions asked for. Where a broken
    image was replaced, the parameters are still those of the sample asked for, applied to the size of its replacement. `view_index`
    counts all views of the batch, across the `View`s asked for. The crop follows torchvision's RandomResizedCrop: ten tries with a
    uniform share of the area and a log-uniform aspect ratio, then the centre crop clamped to the nearest allowed aspect ratio.
    """
    sizes = np.asarray(sizes, dtype=np.int64).reshape(-1, 2)
    u = uniforms(seed, epoch, samples, view_index, 2 * _TRIES + 13)
    tries, at, coin, amount = np.split(u, [2 * _TRIES, 2 * _TRIES + 2, 2 * _TRIES + 7], axis=1)
    height, width, centred = _crop_size(view, sizes, tries)
    room = sizes - np.stack([height, width], 1)
    corner = np.where(centred[:, None], room // 2, (at * (room + 1)).astype(np.int64))
    # the last of `amount` is a coin too: an added column leaves the older ones as they were
    flip, jitter, gray, blur, solarize = (coin < [view.flip, view.jitter, view.grayscale, view.blur, view.solarize]).T

    def between(low: float, high: float, column: int, applied: np.ndarray, neutral: float) -> np.ndarray:
        return np.where(applied, low + (high - low) * amount[:, column], neutral).astype(np.float32)

    def factor(strength: float, column: int) -> np.ndarray:
        return between(max(0.0, 1 - strength), 1 + strength, column, jitter, 1.0)

    return Drawn(
        top=corner[:, 0], left=corner[:, 1], height=height, width=width, flip=flip, jitter=jitter,
        brightness=factor(view.brightness, 0), contrast=factor(view.contrast, 1), saturation=factor(view.saturation, 2),
        hue=between(-view.hue, view.hue, 3, jitter, 0.0), gray=gray, blur=blur,
        sigma=between(*view.blur_sigma, 4, blur, 0.0), solarize=solarize, remove=amount[:, 5] < view.background_removal,
    )  # fmt: skip


def _crop_size(view: View, sizes: np.ndarray, tries: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Height and width of every crop, and where none of the tries fitted so that the clamped centre crop was taken."""
    image_height, image_width = sizes[:, :1], sizes[:, 1:]
    area = image_height * image_width * (view.scale[0] + (view.scale[1] - view.scale[0]) * tries[:, :_TRIES])
    low, high = (math.log(a) for a in view.aspect)
    aspect = np.exp(low + (high - low) * tries[:, _TRIES:])
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    first = fits.argmax(1)
    rows = np.arange(len(sizes))
    image_height, image_width = sizes.T
    ratio = image_width / image_height
    widest = np.where(ratio > view.aspect[1], np.rint(image_height * view.aspect[1]), image_width)
    tallest = np.where(ratio < view.aspect[0], np.rint(image_width / view.aspect[0]), image_height)
    none = ~fits.any(1)
    height = np.where(none, tallest, heights[rows, first])
    width = np.where(none, widest, widths[rows, first])
    return np.maximum(height, 1).astype(np.int64), np.maximum(width, 1).astype(np.int64), none
