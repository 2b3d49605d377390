"""Is every recipe one that can be built, read back and looked up, and do the tiny contrastive ones train and go on exactly?"""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fuseer.engine import distributed
from fuseer.engine.config import TrainConfig, apply_overrides
from fuseer.engine.methods.method import Ground
from fuseer.engine.models.backbone import build_backbone, initial_backbone
from fuseer.engine.recipes.recipe import load_recipe, recipe_names, saved_config
from fuseer.engine.train import _set_lr, train

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
RANKS = re.compile(r"(?:--num_nodes (\d+) )?--num_accelerators (\d+)")
# parameters of trunk, head and prototypes; images a step and a rank; steps; start, peak, last and final lr
SEER = {
    "seer_regnety_8gf": (37_163_068, 26_108_160, 4_096_000, (4096, 32), 244_140, (0.3, 4.8, 4.8, 0.0048)),
    "seer_regnety_16gf": (80_565_140, 30_236_928, 4_096_000, (4096, 32), 244_140, (0.3, 4.8, 4.8, 0.0048)),
    "seer_regnety_32gf": (141_333_770, 33_054_976, 4_096_000, (4096, 32), 244_140, (0.3, 4.8, 4.8, 0.0048)),
    "seer_regnety_64gf": (276_457_786, 109_527_296, 4_096_000, (4096, 32), 244_140, (0.3, 4.8, 4.8, 0.0048)),
    "seer_regnety_128gf": (637_419_894, 129_777_920, 4_096_000, (4096, 32), 244_140, (0.3, 4.8, 4.8, 4.8)),
    "seer_regnety_256gf": (1_272_156_138, 154_779_904, 4_096_000, (8192, 16), 122_070, (0.15, 9.6, 9.6, 0.0096)),
    "seer_regnety_10b": (9_323_934_872, 300_892_416, 4_096_000, (7936, 16), 126_008, (0.15, 9.3, 9.3, 0.0093)),
    "seer_regnety_256gf_friendly": (1_292_659_514, 155_468_032, 4_096_000, (8192, 16), 122_070, (0.15, 9.6, 9.6, 0.0096)),
    "seer_regnety_10b_friendly": (9_286_843_788, 300_433_664, 4_096_000, (7936, 16), 126_008, (0.15, 9.3, 9.3, 0.0093)),
}


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
    config, ranks = load_recipe(name).config(), ranks_of(name)
    assert config.model.sync_norm_ranks == 0 or ranks % config.model.sync_norm_ranks == 0
    with torch.device("meta"):
        backbone = build_backbone(config.model.name, **config.model.options)
        method = config.method.build(Ground(backbone, None, None, 0, ranks, distributed.micro_batch(config, ranks)))
    first = method.head.dims[0] if hasattr(method, "head") else method.decoder_embed.in_features
    assert first == backbone.width


def ranks_of(name: str) -> int:
    nodes, each = RANKS.search(load_recipe(name).__doc__).groups()
    return int(nodes or 1) * int(each)


@pytest.mark.parametrize("name", SEER)
def test_seer_is_trained_with_the_published_numbers(name):
    trunk, head, prototypes, (batch, each), steps, rates = SEER[name]
    config, ranks = load_recipe(name).config(), ranks_of(name)
    with torch.device("meta"):
        backbone = initial_backbone(config)
        method = config.method.build(Ground(backbone, None, None, 0, ranks, distributed.micro_batch(config, ranks)))
    counted = [sum(p.numel() for p in part.parameters()) for part in (method.backbone, method.head, method.prototypes)]
    assert counted == [trunk, head, prototypes]
    assert (config.batch_size, config.batch_size // ranks, config.steps) == (batch, each, steps)
    assert abs(steps * batch - 1_000_000_000) < batch, "one pass over 1e9 images"
    large, small = config.method.views
    assert (large.size, large.count, large.scale) == (160 if "10b" in name else 224, 2, (0.14, 1.0))
    assert (small.size, small.count, small.scale) == (96, 4, (0.05, 0.14))
    assert config.method.epsilon == (0.03 if "10b" in name else 0.05) and config.method.sinkhorn_iterations == 10
    optim = config.optim
    assert (optim.name, optim.variant, optim.weight_decay, optim.momentum) == ("lars", "larc", 1e-5, 0.9)
    assert optim.lr == pytest.approx(0.3 * batch / 256)
    run = SimpleNamespace(
        config=config,
        total_steps=steps,
        warmup_steps=optim.warmup_steps,
        index=SimpleNamespace(steps_per_epoch=steps),
        optimizer=SimpleNamespace(param_groups=[{}]),
    )
    assert [_set_lr(run, step) for step in (0, optim.warmup_steps - 1, optim.warmup_steps, steps)] == pytest.approx(rates)
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])


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
