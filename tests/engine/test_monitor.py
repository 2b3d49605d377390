"""Is a run that learns nothing told apart from one that does, in words and once?"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fuseer.engine import distributed, monitor
from fuseer.engine.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.data.sources import open_source
from fuseer.engine.data.view import Batch, View
from fuseer.engine.methods.method import Ground, effective_rank
from fuseer.engine.methods.moco import MoCoConfig
from fuseer.engine.methods.simclr import SimCLRConfig
from fuseer.engine.methods.swav import SwAVConfig
from fuseer.engine.models.backbone import build_backbone
from fuseer.engine.monitor import Monitor
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import layout
from fuseer.engine.teacher import Teachers
from fuseer.engine.train import train

pytestmark = pytest.mark.usefixtures("one_thread")
CHANCE = math.log(100)


def watched(losses, *, every=10, warmup=0, total=1000, chance=CHANCE, batch=64, **diagnostics):
    """(step, sign, over) of all that is said about a loss, and diagnostics, given per log step."""
    watch, said = Monitor(chance, batch, warmup, total), []
    for number, loss in enumerate(losses, 1):
        numbers = {"loss": loss, **{key: values[number - 1] for key, values in diagnostics.items()}}
        said += [(number * every, *sign) for sign in watch.observe(number * every, numbers)]
    return said


def test_a_loss_at_chance_is_said_once_in_words():
    ((step, sign, over, text),) = watched([CHANCE + 0.001] * 60)
    assert (step, sign, over) == (210, "chance", False)
    assert text == "the loss has stayed at chance (4.6052) for 200 steps: nothing is being learnt; see docs/symptoms.md"


def test_a_loss_above_chance_is_no_better():
    ((_, sign, _, text),) = watched([6.1, 5.9, 5.95] * 20)
    assert sign == "chance" and "stayed above chance (5.9500 over 4.6052) for 200 steps" in text


def test_it_is_said_again_when_it_comes_back_and_when_it_has_passed():
    said = [entry for entry in watched([CHANCE] * 30 + [3.0] * 30 + [CHANCE] * 40) if entry[1] != "jump"]
    assert [(sign, over) for _, sign, over, _ in said] == [("chance", False), ("chance", True), ("chance", False)]
    assert said[1][3] == "the loss has left chance" and said[2][0] >= 600 + 150


def test_hovering_around_the_tolerance_is_not_said_again_and_again():
    near = monitor.NEAR_CHANCE
    assert len(watched([CHANCE * (1 - near * (0.9 if block % 2 else 1.4)) for block in range(20) for _ in range(30)], total=6000)) <= 1


def test_what_a_healthy_run_passes_through_is_not_said():
    assert not watched([CHANCE] * 15 + [4.5 - 0.01 * n for n in range(60)]), "it starts there and leaves"
    assert not watched([CHANCE] * 60, warmup=600), "warm-up steps do not count"
    assert not watched([3.0] * 5 + [5.0 - 0.01 * n for n in range(100)]), "MoCo's rises above chance and comes down"
    assert not watched([CHANCE * 0.98] * 60), "a hot softmax stays close, but below"
    assert not watched([CHANCE] * 20), "too short to tell"


def test_the_patience_grows_with_the_run_and_with_rare_records():
    assert watched([CHANCE] * 300, total=50_000)[0][0] == 1010
    assert watched([CHANCE] * 300, total=5_000)[0][0] == 210
    assert watched([CHANCE] * 9, every=500)[0][0] == 2000, "four records at least"
    assert watched([CHANCE] * 60, warmup=300)[0][0] == 510


def test_a_method_without_a_chance_loss_is_watched_for_collapse():
    said = watched([1.0] * 40, chance=None, embedding_std=[0.9] * 10 + [0.01] * 30, prototypes_used=[1] * 40)
    assert [(step, sign) for step, sign, *_ in said] == [(310, "collapse")]
    assert said[0][3].startswith("embeddings have collapsed: their spread is 0.01 of a sphere's, small for 200 steps")


def test_collapse_is_no_passing_dip_and_can_pass():
    assert not watched([1.0] * 60, embedding_std=([0.01] * 19 + [0.2]) * 3), "a network without norms begins narrow, and widens"
    said = watched([1.0] * 60, embedding_std=[0.01] * 30 + [0.07] * 10 + [0.5] * 20)
    assert [(sign, over) for _, sign, over, _ in said] == [("collapse", False), ("collapse", True)] and said[1][0] == 410


def test_few_prototypes_are_judged_by_what_a_batch_can_use():
    assert [sign for _, sign, *_ in watched([4.0] * 40, prototypes_used=[5] * 40, batch=1000)] == ["prototypes"]
    ((*_, text),) = watched([4.0] * 40, prototypes_used=[5] * 40, batch=64)
    assert text.startswith("only 5 of 100 prototypes are used, for 200 steps fewer than 6")
    assert not watched([4.0] * 40, prototypes_used=[5] * 40, batch=32)


def test_ranks_without_numbers_say_nothing():
    watch = Monitor(CHANCE, 64, 0, 1000)
    assert not any(watch.observe(step, {}) for step in range(10, 1000, 10))


def test_a_jump_of_the_loss_is_said_at_once_and_when_it_is_over():
    steady = [3.0 + 0.02 * (step % 3) for step in range(40)]
    said = watched([*steady, 4.0, 4.1, *steady])
    assert [(step, sign, over) for step, sign, over, _ in said] == [(410, "jump", False), (430, "jump", True)]
    assert said[0][3] == "the loss has jumped to 4.0000, after 3.0200 for 200 steps; see docs/symptoms.md"
    assert not watched([*steady, 3.2, *steady]), "within a tenth"
    noisy = [3.0 + 0.2 * (step % 5) for step in range(40)]
    assert not watched([*noisy, 4.4, *noisy]), "within what batches differ by"
    assert not watched([5 - 0.04 * step for step in range(60)]), "falling is no jump"


def test_what_is_not_finite_hides_nothing():
    assert [sign for _, sign, *_ in watched([CHANCE if step % 3 else math.nan for step in range(90)])] == ["chance"]


def test_few_dimensions_and_low_entropy_are_said_in_words():
    low, losses = [1.2] * 30 + [6.0] * 40, [3.0] * 70
    (rank, again) = watched(losses, embedding_rank=low)
    assert rank[:3] == (210, "rank", False) and "effective rank 1.20, small for 200 steps" in rank[3] and again[2]
    # the batch is of 64 images, a tenth of that 6.4 prototypes
    (entropy, again) = watched(losses, prototype_entropy=[math.log(value) for value in [6.0] * 30 + [20.0] * 40])
    assert entropy[:3] == (210, "entropy", False) and "is that of 6.0, low for 200 steps" in entropy[3] and again[2]
    assert not watched(losses, prototype_entropy=[math.log(7.0)] * 70, embedding_rank=[2.1] * 70)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_the_effective_rank_counts_dimensions(rank):
    z = torch.randn(2000, rank) @ torch.linalg.qr(torch.randn(16, rank))[0].T
    assert effective_rank(z, None) == pytest.approx(rank, rel=0.01)
    assert effective_rank(torch.full((4, 16), torch.nan), None).isnan()


GREY = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.0, "hue": 0.0, "grayscale": 0.0, "blur": 0.0}
TWO = (View(size=8, count=2, scale=(0.5, 1.0), **GREY),)
HEAD = {"views": TWO, "hidden_widths": (32,), "embedding_width": 16}
NET = {"depths": [1], "widths": [16], "group_widths": 8, "stem_width": 8, "stem_stride": 1}
ADAMW = {"name": "adamw", "lr": 2e-3, "warmup_steps": 20}
# so much weight decay that the weights, and with them all differences between images, vanish within tens of steps
CRUSHED = {"name": "sgd", "lr": 0.1, "weight_decay": 3.0}
B, LENGTH = 16, 240


class Blind(nn.Module):
    """A backbone that sees no image."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.seeing, self.width = backbone, backbone.width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 0 * self.seeing(images) + 1


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    paths = open_source("demo", split="train").paths[::20]
    grey = torch.stack([torch.from_numpy(np.array(Image.open(path).convert("L"), dtype=np.float32)) for path in paths])
    return (grey / 255 - 0.286) / 0.353


def pair_of_crops(photographs: torch.Tensor, step: int) -> Batch:
    """Two crops of 16 px, thinned to 8, of other brightness, of 16 photographs."""
    generator = torch.Generator().manual_seed(step)
    index = torch.randint(len(photographs), (B,), generator=generator)
    corners = torch.randint(0, 13, (2, B, 2), generator=generator)
    crops = torch.stack([photographs[i, y : y + 16 : 2, x : x + 16 : 2] for v in corners for i, (y, x) in zip(index, v, strict=True)])
    crops = crops * (0.6 + 0.8 * torch.rand(2 * B, 1, 1, generator=generator))
    return Batch([crops.view(2, B, 1, 8, 8).expand(2, B, 3, 8, 8)], index, torch.full((B,), -1), 0)


def trained(config, optim: dict, photographs: torch.Tensor, blind: bool = False) -> tuple[set[str], float, float]:
    """Trains for real and returns the signs that the monitor gave, the last loss, and the loss at chance."""
    torch.manual_seed(0)
    backbone = build_backbone("anynet", **NET)
    method = config.build(Ground(Blind(backbone) if blind else backbone, None, None, 0, 1, B, LENGTH)).train()
    optimizer = build_optimizer(method, OptimConfig(**optim))
    optimizer.bind(layout(method, None), None, partitioned=False)
    teachers, watch = Teachers(method), Monitor(method.chance_loss(), B, optim.get("warmup_steps", 0), LENGTH)
    said = set()
    method.after_step(0)
    for step in range(1, LENGTH + 1):
        loss = method(pair_of_crops(photographs, step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teachers.update(step)
        method.after_step(step)
        if step % 10 == 0:
            numbers = {"loss": loss.item(), **{key: value.tolist() for key, value in method.diagnostics().items()}}
            said |= {sign.sign for sign in watch.observe(step, numbers)}
    return said, numbers["loss"], method.chance_loss()


SWAV = SwAVConfig(**HEAD, prototypes=20, freeze_prototypes_steps=10, head_batch_norm=False)
MOCO = MoCoConfig(**HEAD, queue_length=256, norm_images=8, teacher_momentum=0.99)


@pytest.mark.parametrize("config", [SWAV, SimCLRConfig(**HEAD), MOCO], ids=["swav", "simclr", "moco"])
def test_a_training_that_learns_is_left_alone(config, photographs):
    said, loss, chance = trained(config, ADAMW, photographs)
    assert not said and loss < 0.95 * chance


@pytest.mark.parametrize(
    ("config", "optim", "blind", "signs"),
    [
        (SWAV, ADAMW, True, {"chance", "collapse", "rank", "prototypes"}),
        (SimCLRConfig(**HEAD), ADAMW, True, {"chance", "collapse", "rank"}),
        (SWAV, CRUSHED, False, {"collapse", "rank", "prototypes"}),
        (MOCO, CRUSHED, False, {"collapse", "rank"}),
    ],
    ids=["swav, blind", "simclr, blind", "swav, crushed", "moco, crushed"],
)
def test_a_training_that_collapses_is_recognised(config, optim, blind, signs, photographs):
    said, *_ = trained(config, optim, photographs, blind)
    assert said >= signs


class BlindSwAVConfig(SwAVConfig):
    def build(self, ground: Ground):
        return super().build(Ground(Blind(ground.backbone), *list(vars(ground).values())[1:]))


def test_the_loop_says_it_in_the_terminal_and_in_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(monitor, "STEPS", 10)
    for path in open_source("demo", split="train").paths[:16]:
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "images" / Path(path).name)
    config = TrainConfig(
        recipe="blind",
        method=BlindSwAVConfig(**HEAD, prototypes=20, freeze_prototypes_steps=0, head_batch_norm=False),
        model=ModelConfig(name="anynet", options=NET),
        optim=OptimConfig(**ADAMW),
        data=DataConfig(path=str(tmp_path / "images"), pipeline="torchvision"),
        batch_size=8,
        steps=36,
        log_every_steps=2,
    )
    try:
        train(config, tmp_path / "run")
    finally:
        distributed.stop()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    said = [record for record in records if record["kind"] == "monitor"]
    assert {record["sign"] for record in said} >= {"collapse"} and all(record["step"] > ADAMW["warmup_steps"] for record in said)
    printed = capsys.readouterr().out
    assert all(f"step {record['step']}: {record['text']}" in printed and record["over"] is False for record in said)
    assert json.loads((tmp_path / "run" / "env.json").read_text())["chance_loss"] == pytest.approx(math.log(20))
