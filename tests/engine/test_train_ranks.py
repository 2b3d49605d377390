"""Does a step that is thrown away on three ranks change nothing, and does a run end in the same numbers, under every ZeRO stage?"""

import itertools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from fuseer.engine import checkpoint, distributed
from fuseer.engine.config import apply_overrides
from fuseer.engine.methods.moco import MoCoV3
from fuseer.engine.optim import LARS
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.engine.teacher import Teachers
from fuseer.engine.train import train
from tests.ranks import on_ranks

RANKS, STEPS, STAGES = 3, 6, (0, 1, 2, 3)
# calls of forward, from 0: one with a pixel that is no number on one rank, one with an infinite loss there and finite gradients, and one
# for which the optimizer is told to skip
POISONED, INFINITE, TOLD = 2, 3, 4
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
    "checkpoint_every_steps": "1",
    "keep_checkpoints": "9",
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
        call = next(calls)
        LARS.skip = torch.tensor(float(call == TOLD))
        if call == POISONED and rank == 1:
            batch.crops[0].view(-1)[0] = torch.nan
        loss = forward(self, batch)
        return loss._replace(total=loss.total + torch.inf) if call == INFINITE and rank == 1 else loss

    config = apply_overrides(load_recipe("tiny_moco_v3").config(), {**SMALL, "data.path": images, "zero_stage": str(stage)})
    with (
        mock.patch.object(MoCoV3, "forward", disturbed),
        mock.patch.object(Teachers, "update", lambda self, step, *skipped: found["teacher"].append(step) or move(self, step, *skipped)),
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
def test_a_step_thrown_away_is_counted_and_changes_nothing(runs, stage):
    """Neither weights, momenta and teachers, nor statistics, which one rank alone had spoilt; rates go by the number of the step."""
    for rank in runs[0]:
        assert rank[stage] == {"teacher": [1, 2, 3, 4, 5, 6], "method": [0, 1, 2, 3, 4, 5, 6]}
    skipped = [(record["step"], record["skipped"], record["skipped_in_a_row"]) for record in records(runs[1], stage, "skipped")]
    assert skipped == [(POISONED + 1, 1, 1), (INFINITE + 1, 2, 2)]
    train = {record["step"]: record for record in records(runs[1], stage, "train")}
    assert {step: (record["skipped"], record["skipped_in_a_row"]) for step, record in train.items()} == {
        1: (0, 0), 2: (0, 0), TOLD + 1: (3, 3), 6: (3, 0),
    }  # fmt: skip
    assert train[1]["lr"] < train[2]["lr"] == 0.5 > train[5]["lr"] > train[6]["lr"]
    places = [runs[1] / f"stage{stage}" / "ckpt" / f"step_{step:08d}" for step in range(1, STEPS + 1)]
    assert [checkpoint.read_meta(place)["skipped_steps"] for place in places] == [0, 0, 1, 2, 3, 3]
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.TEACHER):
        held = [checkpoint.read(place, name) for place in places]
        changes = [any(not torch.equal(before[key], after[key]) for key in before) for before, after in itertools.pairwise(held)]
        assert changes == [True, False, False, False, True], name
        assert all(value.isfinite().all() for tensors in held for value in tensors.values()), name


@pytest.mark.parametrize("stage", STAGES[1:])
def test_stages_end_in_the_same_numbers(runs, stage):
    whole, sharded = (checkpoint.latest(runs[1] / f"stage{which}" / "ckpt") for which in (0, stage))
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.TEACHER):
        ours, theirs = checkpoint.read(sharded, name), checkpoint.read(whole, name)
        assert ours.keys() == theirs.keys() and ours
        found, wanted = (torch.cat([tensors[key].double().flatten() for key in sorted(tensors)]) for tensors in (ours, theirs))
        assert wanted.isfinite().all() and (found - wanted).norm() <= 1e-5 * wanted.norm(), name
    losses = [[record["loss"] for record in records(runs[1], which, "train")] for which in (0, stage)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(set(losses[0])) == STEPS - 2
