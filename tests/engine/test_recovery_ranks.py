"""Does a run that has diverged, or learns nothing, go back to its last checkpoint on all ranks, on with other images, and end in words?"""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from fuseer.engine import checkpoint
from fuseer.engine.config import apply_overrides
from fuseer.engine.methods.swav import SwAV
from fuseer.engine.monitor import Monitor, Sign
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.engine.train import train
from tests.ranks import on_ranks

RANKS = 2
SMALL = {
    "method.hidden_widths": "[16]",
    "method.embedding_width": "8",
    "method.prototypes": "6",
    "method.freeze_prototypes_steps": "0",
    "model.name": "anynet",
    "model.options": '{"depths": [1], "widths": [16], "group_widths": 8, "stem_width": 8, "stem_stride": 2}',
    "data.pipeline": "torchvision",
    "batch_size": "8",
    "precision": "fp32",
    "epochs": "0",
    "steps": "12",
    "optim.name": "lars",
    "optim.lr": "0.5",
    "optim.warmup_steps": "2",
    "log_every_steps": "1",
    "checkpoint_every_steps": "4",
    "knn.every_steps": "0",
    "max_skipped_steps": "3",
    "max_rollbacks": "1",
    "on_divergence": "rollback",
}
# calls of forward, from 0, in which the images of rank 1 are no numbers: the three that bring the run back, and all at its end
BAD = {4, 5, 6, 9, 10, 11}


def on_rank(rank: int, images: str, folder: str) -> dict:
    folder = Path(folder)
    return {
        "images": one_run(images, folder / "images", lambda call: call in BAD and rank == 1, zero_stage="1"),
        "resumed": one_run(images, folder / "images", lambda call: False, resume=True, zero_stage="1"),
        "weights": one_run(images, folder / "weights", lambda call: False, spoilt_at=6),
        "nowhere to go": one_run(images, folder / "nowhere", lambda call: True, checkpoint_every_steps="8"),
        "collapse": one_run(images, folder / "collapse", lambda call: False, collapsed_at=5, on_collapse="rollback"),
        "stop": one_run(images, folder / "stop", lambda call: False, collapsed_at=2, on_collapse="stop"),
    }


def one_run(images: str, out: Path, poisoned, *, resume=False, spoilt_at=None, collapsed_at=None, **settings) -> dict:
    """What a run says at its end, and the (epoch, sample) that each forward met; a weight turns infinite, or the monitor sees a collapse,
    the first time that it comes to a step."""
    met, spoilt, seen = [], [], []
    forward, follow = SwAV.forward, SwAV.after_step

    def fed(self, batch):
        if poisoned(len(met)):
            batch.crops[0].fill_(torch.nan)
        met.append([(batch.epoch, sample) for sample in batch.samples.tolist()])
        return forward(self, batch)

    def spoil(self, step):
        follow(self, step)
        if step == spoilt_at and not spoilt:
            spoilt.append(self.backbone.stem.conv.weight.data[0, 0].fill_(torch.inf))

    def collapsed(self, step, numbers):
        first = step == collapsed_at and numbers and not seen
        return [Sign("collapse", False, seen.append(step) or "embeddings have collapsed")] if first else []

    config = apply_overrides(load_recipe("tiny_swav").config(), {**SMALL, "data.path": images, **settings})
    with (
        mock.patch.object(SwAV, "forward", fed),
        mock.patch.object(SwAV, "after_step", spoil),
        mock.patch.object(Monitor, "observe", collapsed),
    ):
        try:
            said = train(config, out, resume=resume)
        except RuntimeError as error:
            said = str(error)
    return {"said": said, "met": met}


@pytest.fixture(scope="module")
def runs(small_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovery")
    return on_ranks(RANKS, on_rank, str(small_images), str(folder)), folder


def records(folder: Path, kind: str) -> list[dict]:
    return [record for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if record["kind"] == kind]


def test_a_run_goes_back_once_and_meets_no_image_again(runs):
    """Steps 5 to 7 are skipped, the checkpoint is of step 4; then steps 7 to 9 of the second try."""
    ranks, folder = runs
    met = [sample for rank in ranks for batch in rank["images"]["met"] for sample in batch]
    assert len(ranks[0]["images"]["met"]) == 12 and len(set(met)) == len(met) == 12 * 8
    for rank in ranks:
        assert "3 steps in a row up to step 9 had a loss or gradients" in rank["images"]["said"]
        assert "went back max_rollbacks=1 times" in rank["images"]["said"]
    (back,) = records(folder / "images", "rollback")
    assert (back["step"], back["left_at"], back["rollbacks"]) == (4, 7, 1)
    assert [record["step"] for record in records(folder / "images", "skipped")] == [5, 6, 7, 7, 8, 9]


def test_what_was_passed_over_is_known_after_a_resume(runs):
    """Step 8 was saved while steps were skipped, with sound weights; step 9 takes its own batch again, with which the run had ended."""
    ranks, folder = runs
    places = checkpoint.complete(folder / "images" / "ckpt")
    assert [place.name for place in places] == ["step_00000008", "step_00000012"]
    meta = checkpoint.read_meta(places[-1])
    assert (meta["passed_over"], meta["rollbacks"], meta["skipped_steps"]) == (3, 1, 5)
    assert all(value.isfinite().all() for value in checkpoint.read(places[0], checkpoint.MODEL).values())
    for rank in ranks:
        assert rank["resumed"]["said"] is None and len(rank["resumed"]["met"]) == 4
        assert rank["resumed"]["met"][0] == rank["images"]["met"][-1]


def test_weights_that_are_not_finite_are_not_saved(runs):
    ranks, folder = runs
    for rank in ranks:
        assert rank["weights"]["said"] is None
        # 8 steps, of which 7 and 8 were skipped, and 8 again from step 4 on
        assert len(rank["weights"]["met"]) == 16
    (diverged,) = records(folder / "weights", "diverged")
    assert diverged["step"] == 8 and diverged["reason"] == "after step 8 a weight is not finite; nothing was saved"
    assert records(folder / "weights", "train")[-1]["step"] == 12


def test_without_a_checkpoint_the_run_ends_in_words(runs):
    for rank in runs[0]:
        assert "3 steps in a row up to step 3" in rank["nowhere to go"]["said"] and "cannot go back" in rank["nowhere to go"]["said"]


def test_a_collapse_is_acted_upon_where_told(runs):
    ranks, folder = runs
    for rank in ranks:
        assert rank["collapse"]["said"] is None and len(rank["collapse"]["met"]) == 5 + 8
        assert rank["stop"]["said"].startswith("step 2: embeddings have collapsed; ")
    assert [(record["step"], record["left_at"]) for record in records(folder / "collapse", "rollback")] == [(4, 5)]
