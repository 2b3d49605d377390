"""Does the probe see the images that a run trains on, and the known value for raw pixels?"""

import shutil
from pathlib import Path

import pytest
import torch

from fuseer.engine.config import apply_overrides
from fuseer.engine.data.plain import plain_batches
from fuseer.engine.data.sources import open_source
from fuseer.engine.evaluate.frozen import Pixels
from fuseer.engine.evaluate.probe import KnnProbe
from fuseer.engine.recipes.recipe import load_recipe

CPU = torch.device("cpu")


def config(**overrides):
    return apply_overrides(load_recipe("tiny_swav").config(), {key.replace("__", "."): str(value) for key, value in overrides.items()})


def test_raw_pixels_of_the_demo_set_reach_the_known_value():
    """81.1 %: weighted kNN, k = 20, T = 0.07, on the first 10,000 and 2,000 images, computed elsewhere from the original files."""
    chosen = config()
    probe = KnnProbe.where_labelled(chosen)
    assert (len(probe.train), len(probe.test)) == (10_000, 2_000)
    assert abs(probe.accuracy(Pixels(chosen), CPU) - 0.811) < 0.0005


def test_a_thinned_probe_keeps_every_class():
    probe = KnnProbe.where_labelled(config(knn__train_images=100))
    assert len(probe.train) == 100 and len(set(probe.train.labels.tolist())) == 10


def test_there_is_no_probe_without_labels_or_test_split(tmp_path):
    paths = open_source("demo", split="train").paths[:4]
    for path in paths:
        shutil.copy(path, tmp_path)
    assert KnnProbe.where_labelled(config(data__path=tmp_path)) is None


def test_sizes_that_differ_are_named_and_can_be_made_one(tmp_path):
    from PIL import Image

    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.png")
    Image.new("RGB", (20, 30), "red").save(tmp_path / "b.png")
    source = open_source(str(tmp_path))
    options = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    with pytest.raises(ValueError, match=r"b.png is 20x30 pixels .* 30x20; set knn.image_size"):
        list(plain_batches(source, **options))
    (images, _), *_ = plain_batches(source, image_size=14, **options)
    assert images.shape == (2, 3, 14, 14) and Path(source.paths[0]).name == "a.png"
    torch.testing.assert_close(images[0, 0], torch.ones(14, 14))
