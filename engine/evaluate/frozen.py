"""Which labelled images and which frozen networks of a run does an evaluation compare, and where does its result go?"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuseer.engine import checkpoint
from fuseer.engine.config import TrainConfig
from fuseer.engine.data.plain import plain_batches
from fuseer.engine.data.sources import Source, open_source
from fuseer.engine.distributed import cores
from fuseer.engine.models.norm import calibrate

CALIBRATION_IMAGES = 10_000


@dataclass(frozen=True)
class Labelled:
    """The train and the test images of a run's data, of the same two or more classes."""

    config: TrainConfig
    train: Source
    test: Source

    @classmethod
    def of(cls, config: TrainConfig) -> "Labelled | None":
        """None where the data has no labels or no test split of its own."""
        train = open_source(config.data.path, split="train")
        try:
            test = open_source(config.data.path, split="test")
        except ValueError:
            return None
        return cls(config, train, test) if len(train.classes) > 1 and train.classes == test.classes else None

    @classmethod
    def needed_by(cls, command: str, config: TrainConfig) -> "Labelled":
        """The same, or ValueError in words that begin with `command`."""
        found = cls.of(config)
        if found is None:
            raise ValueError(f"{command}: {config.data.path} needs train/ and test/ with the same two or more class folders")
        return found

    def check(self, command: str, batch_size: int) -> None:
        """ValueError for an image without a class or too few images for a batch, in words that begin with `command`."""
        for split, source in (("train", self.train), ("test", self.test)):
            if (source.labels < 0).any():
                stray = source.paths[int((source.labels < 0).argmax())]
                raise ValueError(f"{command}: {stray} lies in no class folder; move it into one of {split}/'s, or away")
        if batch_size > len(self.train):
            raise ValueError(f"{command}: batch_size={batch_size} is more than the {len(self.train)} train images; give less")

    def side(self, command: str, device: torch.device) -> int:
        """Height and width of the test images as the network sees them; crops for training get the same."""
        first, _ = next(self.batches(self.test, device))
        height, width = first.shape[-2:]
        if height != width:
            raise ValueError(f"{command}: the images are {width}x{height} pixels; give image_size=N for the square to cut out of them")
        return width

    def batches(self, source: Source, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of all of `source` on `device`, in order, without augmentation."""
        data = self.config.data
        for images, labels in plain_batches(
            source, mean=data.mean, std=data.std, image_size=self.config.knn.image_size, threads=data.threads or cores()
        ):
            yield images.to(device), labels.to(device)


class Pixels(nn.Module):
    """The image itself as its features, undone of the normalisation, which would change the angles that kNN compares.

    Averaged down to `largest` x `largest` where it is larger; 0 = never.
    """

    def __init__(self, config: TrainConfig, largest: int = 0):
        super().__init__()
        self.shift, self.scale = torch.tensor(config.data.mean).view(3, 1, 1), torch.tensor(config.data.std).view(3, 1, 1)
        self.largest = largest

    def forward(self, images: Tensor) -> Tensor:
        if self.largest and max(images.shape[-2:]) > self.largest:
            images = F.adaptive_avg_pool2d(images, self.largest)
        return (images * self.scale.to(images.device) + self.shift.to(images.device)).flatten(1)


def calibrate_on(backbone: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> nn.Module:
    """`backbone` with the BatchNorm statistics of the first images of `batches`: at initialisation it has none of its own."""
    return calibrate(backbone, islice((images for images, _ in batches), CALIBRATION_IMAGES // 256 + 1))


def shares(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """{"accuracy": top-1, "top5": … with ten classes or more} of scores [N, classes], shares in 0…1."""
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    found = {"accuracy": hits[:, 0].double().mean().item()}
    return {**found, "top5": hits.any(1).double().mean().item()} if scores.shape[1] >= 10 else found


def load_pretrained(run: Path, backbone: nn.Module) -> int:
    """Loads the newest checkpoint's backbone and returns its step. Raises ValueError where there is none."""
    place = checkpoint.latest(run / "ckpt")
    checkpoint.load_weights(place, backbone, prefix="backbone.")
    return checkpoint.read_meta(place)["step"]


def write_result(run: Path, name: str, result: dict) -> None:
    """eval/<name>.json of the run, replaced in one move."""
    folder = run / "eval"
    folder.mkdir(exist_ok=True)
    part = folder / f"{name}.json.part"
    part.write_text(json.dumps(result, indent=2))
    os.replace(part, folder / f"{name}.json")
