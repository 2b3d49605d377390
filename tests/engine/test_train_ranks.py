"""Does a run on three ranks pass over a step that is thrown away, and end in the same numbers, under every ZeRO stage?"""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from fuseer.engine import checkpoint, distributed
from fuseer.engine.config import apply_overrides
from fuseer.engine.methods.moco import MoCoV3
from fuseer.engine.optim import LARS
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.engine.teacher import Teachers
from fuseer.engine.train import train
from tests.ranks import on_ranks

RANKS, STEPS, STAGES = 3, 5, (0, 1, 2, 3)
# calls of forward, from 0: one whose gradient is infinite on one rank, and one for which the optimizer is told to skip
INFINITE, TOLD = 2, 4
SMALL = {
    "method.hidden_widths": "[16]",
    "method.embedding_width": "8",
    "method.predictor_widths": "[16]",
    "model.name": "anynet",
    "model.options": '{"depths": [1], "widths": [16], "group_widths": 8, "stem_width": 8, "stem_stride": 2}',
    "data.pipeline": "torchvision",
    "batch_size": "12",
    "precision": "fp32",
    "epochs": "0",
    "steps": str(STEPS),
    "optim.name": "lars",
    "optim.lr": "0.5",
    "optim.warmup_steps": "2",
    "log_every_steps": "1",
    "knn.every_steps": "0",
}


def on_rank(rank: int, images: str, folder: str) -> dict:
    """{stage: which steps the teacher and the method were told of} of a run of each stage."""
    made = distributed.deepspeed_config
    # DeepSpeed keeps small parameters whole under stage 3, which here would be all
    cut = {"stage3_param_persistence_threshold": 0}
    distributed.deepspeed_config = lambda *given: (tree := made(*given)) | {"zero_optimization": tree["zero_optimization"] | cut}
    return {stage: one_run(rank, stage, images, Path(folder) / f"stage{stage}") for stage in STAGES}


def one_run(rank: int, stage: int, images: str, out: Path) -> dict:
    found, calls = {"teacher": [], "method": []}, iter(range(99))
    forward, move, follow = MoCoV3.forward, Teachers.update, MoCoV3.after_step

    def disturbed(self, batch):
        call, loss = next(calls), forward(self, batch)
        LARS.skip = torch.tensor(float(call == TOLD))
        return loss._replace(total=loss.total * float("inf")) if call == INFINITE and rank == 1 else loss

    config = apply_overrides(load_recipe("tiny_moco_v3").config(), {**SMALL, "data.path": images, "zero_stage": str(stage)})
    with (
        mock.patch.object(MoCoV3, "forward", disturbed),
        mock.patch.object(Teachers, "update", lambda self, step: found["teacher"].append(step) or move(self, step)),
        mock.patch.object(MoCoV3, "after_step", lambda self, step: found["method"].append(step) or follow(self, step)),
        mock.patch.object(LARS, "skip", None),
    ):
        train(config, out)
    return found


@pytest.fixture(scope="module")
def runs(small_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return on_ranks(RANKS, on_rank, str(small_images), str(folder)), folder


def records(folder: Path, stage: int, kind: str) -> list[dict]:
    lines = (folder / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_thrown_away_counts_no_step(runs, stage):
    for rank in runs[0]:
        assert rank[stage] == {"teacher": [1, 2, 3, 4, 5], "method": [0, 1, 2, 3, 4, 5]}
    assert [record["step"] for record in records(runs[1], stage, "skipped")] == [2, 3]
    rates = {record["step"]: record["lr"] for record in records(runs[1], stage, "train")}
    assert list(rates) == [1, 2, 3, 4, 5] and rates[1] < rates[2] == 0.5 > rates[5], "neither was a step of the warm-up"
    meta = checkpoint.read_meta(checkpoint.latest(runs[1] / f"stage{stage}" / "ckpt"))
    assert (meta["step"], meta["skipped_steps"], meta["world_size"]) == (STEPS, 2, RANKS)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stages_end_in_the_same_numbers(runs, stage):
    whole, sharded = (checkpoint.latest(runs[1] / f"stage{which}" / "ckpt") for which in (0, stage))
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.TEACHER):
        ours, theirs = load_file(sharded / name), load_file(whole / name)
        assert ours.keys() == theirs.keys() and ours
        found, wanted = (torch.cat([tensors[key].double().flatten() for key in sorted(tensors)]) for tensors in (ours, theirs))
        assert wanted.isfinite().all() and (found - wanted).norm() <= 1e-5 * wanted.norm(), name
    losses = [[record["loss"] for record in records(runs[1], which, "train")] for which in (0, stage)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(set(losses[0])) == STEPS
