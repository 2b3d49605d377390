"""Is every recipe one that can be built, read back and looked up, and do the tiny contrastive ones train and go on exactly?"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from fuseer.engine import distributed
from fuseer.engine.config import TrainConfig, apply_overrides
from fuseer.engine.methods.method import Ground
from fuseer.engine.models.backbone import build_backbone
from fuseer.engine.recipes.recipe import load_recipe, recipe_names, saved_config
from fuseer.engine.train import train

TINY = ("tiny_simclr", "tiny_moco_v2", "tiny_moco_v3")
SMALL = {
    "method.hidden_widths": "[16]",
    "method.embedding_width": "8",
    "model.options": '{"depths": [1], "widths": [16], "group_widths": 8, "stem_width": 8, "stem_stride": 2}',
    "batch_size": "16",
    "optim.warmup_steps": "2",
    "log_every_steps": "1",
    "checkpoint_every_steps": "3",
    "keep_checkpoints": "2",
    "knn.every_steps": "0",
    "steps": "6",
}
MORE = {
    "tiny_moco_v2": {"method.queue_length": "40", "method.norm_images": "8"},
    "tiny_moco_v3": {"method.predictor_widths": "[16]"},
}
SHARED_NORMS = re.compile(r"--num_accelerators (\d+)")


@pytest.fixture(scope="module", autouse=True)
def leave_the_world():
    yield
    distributed.stop()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_says_how_it_is_run_and_reads_back(name, tmp_path):
    recipe = load_recipe(name)
    config = recipe.config()
    assert config.recipe == name and (name == "tiny_swav" or f"recipe={name}" in recipe.__doc__)
    assert type(config)(**{**config.model_dump(), "method": config.method}) == config, "valid as a whole"
    (tmp_path / "config.json").write_text(config.to_json())
    assert saved_config(tmp_path) == config
    if not name.startswith("tiny_"):
        assert "Not run here" in recipe.__doc__ and "Published result" in recipe.__doc__


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("tiny_")])
def test_a_published_recipe_fits_the_ranks_of_its_command(name):
    recipe = load_recipe(name)
    config, ranks = recipe.config(), int(SHARED_NORMS.search(recipe.__doc__)[1])
    assert config.model.sync_norm_ranks == 0 or ranks % config.model.sync_norm_ranks == 0
    with torch.device("meta"):
        backbone = build_backbone(config.model.name, **config.model.options)
        method = config.method.build(Ground(backbone, None, None, 0, ranks, distributed.micro_batch(config, ranks)))
    first = method.head.dims[0] if hasattr(method, "head") else method.decoder_embed.in_features
    assert first == backbone.width


def small(name: str, **more: str) -> TrainConfig:
    return apply_overrides(load_recipe(name).config(), {**SMALL, **MORE.get(name, {}), **more})


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_recipe_trains_and_goes_on_bitwise(name, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(small(name), whole)
    found = losses(whole)
    assert sorted(found) == [1, 2, 3, 4, 5, 6] and all(0 < loss < 20 for loss in found.values())
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "ckpt" / "step_00000006")
    (stopped / "metrics.jsonl").write_text("")
    train(small(name), stopped, resume=True)
    assert losses(stopped) == {step: found[step] for step in (4, 5, 6)}
