"""How good is a run's backbone by weighted kNN, beside its own initialisation and raw pixels?"""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from fuseer.engine import checkpoint
from fuseer.engine.config import TrainConfig
from fuseer.engine.data.plain import plain_batches
from fuseer.engine.data.sources import Source, open_source
from fuseer.engine.distributed import cores
from fuseer.engine.evaluate.knn import extract_features, knn_accuracy
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.models.norm import calibrate
from fuseer.engine.recipes.recipe import saved_config

CALIBRATION_IMAGES = 10_000


class KnnProbe:
    """Weighted kNN from the labelled train split to the test split of a run's data."""

    def __init__(self, config: TrainConfig, train: Source, test: Source):
        self.config, self.train, self.test = config, _thinned(train, config.knn.train_images), test

    @classmethod
    def where_labelled(cls, config: TrainConfig) -> "KnnProbe | None":
        """The probe, or None where the data has no labels or no test split of its own."""
        train = open_source(config.data.path, split="train")
        try:
            test = open_source(config.data.path, split="test")
        except ValueError:
            return None
        return cls(config, train, test) if len(train.classes) > 1 and train.classes == test.classes else None

    def batches(self, source: Source, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        data = self.config.data
        for images, labels in plain_batches(
            source, mean=data.mean, std=data.std, image_size=self.config.knn.image_size, threads=data.threads or cores()
        ):
            yield images.to(device), labels.to(device)

    def accuracy(self, backbone: nn.Module, device: torch.device) -> float:
        """Share in 0…1 of test images whose label the k nearest train images vote for; the backbone in evaluation mode."""
        train_features, train_labels = extract_features(backbone, self.batches(self.train, device))
        test_features, test_labels = extract_features(backbone, self.batches(self.test, device))
        return knn_accuracy(
            train_features,
            train_labels,
            test_features,
            test_labels,
            classes=len(self.train.classes),
            k=self.config.knn.k,
            temperature=self.config.knn.temperature,
        )


class _Pixels(nn.Module):
    """The image itself as its features, undone of the normalisation, which would change the angles that kNN compares."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.shift, self.scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images * self.scale.to(images.device) + self.shift.to(images.device)).flatten(1)


def evaluate_run(run: Path) -> dict:
    """kNN of raw pixels, the run's network at initialisation, the same with calibrated BatchNorm, and as pretrained.

    Writes and returns eval/knn.json. Raises ValueError where the run has no checkpoint or its data no labels and test split.
    """
    config = saved_config(run)
    place = checkpoint.latest(run / "ckpt")
    probe = KnnProbe.where_labelled(config)
    if probe is None:
        raise ValueError(f"eval knn: {config.data.path} needs train/ and test/ with the same two or more class folders")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = initial_backbone(config).to(device)
    rows = [("raw pixels", probe.accuracy(_Pixels(config.data.mean, config.data.std), device))]
    rows.append(("initialisation", probe.accuracy(backbone, device)))
    images = (images for images, _ in probe.batches(probe.train, device))
    calibrate(backbone, islice(images, CALIBRATION_IMAGES // 256 + 1))
    rows.append(("initialisation, BatchNorm calibrated", probe.accuracy(backbone, device)))
    checkpoint.load_weights(place, backbone, prefix="backbone.")
    rows.append(("pretrained", probe.accuracy(backbone, device)))
    result = {
        "step": checkpoint.read_meta(place)["step"],
        "k": config.knn.k,
        "temperature": config.knn.temperature,
        "train_images": len(probe.train),
        "test_images": len(probe.test),
        "rows": [{"name": name, "accuracy": accuracy} for name, accuracy in rows],
    }
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "knn.json").write_text(json.dumps(result, indent=2))
    return result


def _thinned(source: Source, images: int) -> Source:
    """At most `images` of a source, evenly spaced, so that every class keeps its share; all for 0."""
    if not images or images >= len(source):
        return source
    chosen = [i * len(source) // images for i in range(images)]
    return replace(source, paths=[source.paths[i] for i in chosen], labels=source.labels[chosen])
