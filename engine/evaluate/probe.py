"""How good is a run's backbone by weighted kNN, beside its own initialisation and raw pixels?"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from fuseer.engine import checkpoint
from fuseer.engine.config import TrainConfig
from fuseer.engine.data.sources import Source
from fuseer.engine.evaluate.frozen import Labelled, Pixels, calibrate_on, load_pretrained, write_result
from fuseer.engine.evaluate.knn import extract_features, knn_accuracy
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.recipes.recipe import saved_config


class GivenUp(Exception):
    """The run was asked to stop while its probe went on."""


class KnnProbe:
    """Weighted kNN from the labelled train split to the test split of a run's data."""

    def __init__(self, images: Labelled):
        self.config, self.images = images.config, images
        self.train, self.test = _thinned(images.train, images.config.knn.train_images), images.test

    @classmethod
    def where_labelled(cls, config: TrainConfig) -> "KnnProbe | None":
        """The probe, or None where the data has no labels or no test split of its own."""
        images = Labelled.of(config)
        return images and cls(images)

    def batches(self, source: Source, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self.images.batches(source, device)

    def accuracy(self, backbone: nn.Module, device: torch.device, asked_to_stop: Callable[[], bool] = lambda: False) -> float:
        """Share in 0…1 of test images whose label the k nearest train images vote for; the backbone in evaluation mode.

        `asked_to_stop` is asked at every batch; raises GivenUp once it says so.
        """

        def until_asked(source: Source) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for batch in self.batches(source, device):
                if asked_to_stop():
                    raise GivenUp
                yield batch

        train_features, train_labels = extract_features(backbone, until_asked(self.train))
        test_features, test_labels = extract_features(backbone, until_asked(self.test))
        return knn_accuracy(
            train_features,
            train_labels,
            test_features,
            test_labels,
            classes=len(self.train.classes),
            k=self.config.knn.k,
            temperature=self.config.knn.temperature,
        )


def evaluate_run(run: Path, config: TrainConfig | None = None) -> dict:
    """kNN of raw pixels, the run's network at initialisation, the same with calibrated BatchNorm, and as pretrained.

    `config` stands in for the run's own settings. Writes and returns eval/knn.json. Raises ValueError where the run has no checkpoint or
    its data no labels and test split.
    """
    config = config or saved_config(run)
    checkpoint.latest(run / "ckpt")
    probe = KnnProbe(Labelled.needed_by("eval knn", config))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = initial_backbone(config).to(device)
    rows = [("raw pixels", probe.accuracy(Pixels(config), device))]
    rows.append(("initialisation", probe.accuracy(backbone, device)))
    calibrate_on(backbone, probe.batches(probe.train, device))
    rows.append(("initialisation, BatchNorm calibrated", probe.accuracy(backbone, device)))
    step = load_pretrained(run, backbone)
    rows.append(("pretrained", probe.accuracy(backbone, device)))
    result = {
        "step": step,
        "k": config.knn.k,
        "temperature": config.knn.temperature,
        "train_images": len(probe.train),
        "test_images": len(probe.test),
        "rows": [{"name": name, "accuracy": accuracy} for name, accuracy in rows],
    }
    write_result(run, "knn", result)
    return result


def _thinned(source: Source, images: int) -> Source:
    """At most `images` of a source, evenly spaced, so that every class keeps its share; all for 0."""
    if not images or images >= len(source):
        return source
    chosen = [i * len(source) // images for i in range(images)]
    return source.only(chosen)
