"""Which views of an image does a method ask for, and in what shape do they arrive?"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field

from fuseer.engine.config import Config


class View(Config):
    """`count` views of `size` x `size` pixels, each drawn on its own.

    Order: background replaced by the mean colour (`data.masks` says what it is), random resized crop (share of the area in
    `scale`, aspect ratio in `aspect`), horizontal flip, colour jitter (brightness, contrast, saturation, hue; always in this order),
    grayscale, Gaussian blur, solarize, normalisation. Probabilities are per view. A factor of jitter strength s is uniform in
    [max(0, 1-s), 1+s]; hue shifts by up to `hue` turns; `blur_sigma` is in pixels of the view.
    """

    size: int = Field(gt=0)
    count: int = Field(gt=0)
    scale: tuple[float, float]
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: float = Field(0.5, ge=0, le=1)
    jitter: float = Field(0.8, ge=0, le=1, description="probability")
    brightness: float = Field(0.8, ge=0)
    contrast: float = Field(0.8, ge=0)
    saturation: float = Field(0.8, ge=0)
    hue: float = Field(0.2, ge=0, le=0.5)
    grayscale: float = Field(0.2, ge=0, le=1)
    blur: float = Field(0.5, ge=0, le=1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = Field(0.0, ge=0, le=1)
    background_removal: float = Field(0.0, ge=0, le=1, description="probability, as ReLICv2 has it for its large views")


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    crops[i] is [V_i, B, 3, h, w], float32 or float16, normalised, for the i-th `View` asked for; samples [B] int64 (CPU) are the
    global sample indices; labels [B] int64 (CPU), -1 where unknown.
    """

    crops: list[torch.Tensor]
    samples: torch.Tensor
    labels: torch.Tensor
    epoch: int


class Loader(Protocol):
    """What both pipelines offer the loop: the endless stream of micro-batches from micro-step `start` on."""

    def batches(self, start: int) -> Iterator[Batch]: ...

    def close(self) -> None: ...
