"""Do half weights train alike under every ZeRO stage, with fp32 masters, with every method, and go on after a resume?"""

import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from fuseer.engine import checkpoint
from fuseer.engine.config import apply_overrides
from fuseer.engine.distributed import Ranks, initialize_deepspeed, scaler_state
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import forget_gradients, layout
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.engine.run import build_method
from fuseer.engine.skipping import Skipping
from fuseer.engine.teacher import Teachers
from fuseer.engine.train import train
from tests.engine.test_zero import METHODS, SMALL, batch_of, whole_weights
from tests.ranks import on_ranks

RANKS, STEPS, STAGES = 2, 10, (0, 1, 2, 3)
LARS, SGD = {"optim.name": "lars"}, {"optim.name": "sgd", "optim.lr": "0.02"}
# of a bf16 number w the next one is at least w/256 away: ten such steps move no half weight by themselves
SLOW = {"optim.name": "sgd", "optim.lr": "1e-6", "optim.start_lr": "1e-6", "optim.momentum": "0", "method.prototypes": "6"}
RUN = {"data.pipeline": "torchvision", "epochs": "0", "steps": "4", "checkpoint_every_steps": "2", "knn.every_steps": "4", "knn.k": "3"}


def on_rank(rank: int, images: str, folder: str) -> dict:
    """Losses and end of every run; `fp16` runs here whether the processor has such arithmetic or not."""
    import deepspeed

    os.environ["FUSEER_BACKEND"] = "reference"
    accelerator = type(deepspeed.accelerator.get_accelerator())
    accelerator.is_fp16_supported = lambda self: True
    accelerator.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
    ranks = Ranks(rank, RANKS, rank, RANKS, torch.device("cpu"))
    found = {("bf16", stage): one_run(ranks, stage, "bf16") for stage in STAGES}
    found |= {("fp16", stage): one_run(ranks, stage, "fp16", **SGD) for stage in STAGES}
    found |= {("summed", stage): one_run(ranks, stage, "bf16", accumulation=2) for stage in (1, 2, 3)}
    found["fp32", 0], found["fp32 sgd", 0] = one_run(ranks, 0, "fp32"), one_run(ranks, 0, "fp32", **SGD)
    found |= {("slow", stage): one_run(ranks, stage, "bf16", **SLOW) for stage in STAGES}
    for name in sorted(METHODS.keys() - {"tiny_swav"}):
        found |= {(name, stage): one_run(ranks, stage, "bf16", recipe=name, steps=3) for stage in (0, 3)}
        found[name, "fp32"] = one_run(ranks, 0, "fp32", recipe=name, steps=3)
    resumed(images, Path(folder), found)
    return found


def one_run(ranks: Ranks, stage: int, precision: str, *, recipe="tiny_swav", steps=STEPS, accumulation=1, **settings) -> dict:
    """As train.py makes it: losses, steps skipped, half weights and fp32 masters at the end, and how many of both have moved."""
    parts = {"batch_size": str(8 * accumulation), "accumulation_steps": str(accumulation), "precision": precision, "zero_stage": str(stage)}
    given = {key: value for key, value in {**SMALL, **METHODS[recipe], **parts, **settings}.items() if value is not None}
    config = apply_overrides(load_recipe(recipe).config(), given)
    method = build_method(config, ranks, steps)
    optimizer, teachers = build_optimizer(method, config.optim), Teachers(method)
    engine = initialize_deepspeed(method, optimizer, config, RANKS)
    optimizer.bind(layout(method, engine.optimizer if engine.optimizer is not optimizer else None), ranks.group, stage > 0)
    teachers.follow(optimizer, ranks.group)
    skipping = Skipping(engine, optimizer, method, teachers)
    skipping.begin(0)
    method.after_step(0)
    masters = [piece.of(piece.holder).clone() for piece in optimizer.pieces]
    halves = whole_weights(method)
    losses = []
    for step in range(steps):
        forget_gradients(engine.optimizer)
        for part in range(accumulation):
            total = engine(batch_of(method, step * accumulation + part, ranks.rank)).total
            engine.backward(skipping.guarded(total))
            engine.step()
            losses.append(total.item())
        teachers.update(step + 1, skipping.settle())
        method.after_step(step + 1)
    ways = [(piece.of(piece.holder) - before).norm() for piece, before in zip(optimizer.pieces, masters, strict=True)]
    moved = sum(int((piece.of(piece.holder) != before).sum()) for piece, before in zip(optimizer.pieces, masters, strict=True))
    weights = whole_weights(method)
    return {
        "losses": losses,
        "skipped": int(skipping.skipped),
        "scale": scaler_state(engine).get("cur_scale"),
        "weights": weights,
        "masters": {piece.holder.dtype for piece in optimizer.pieces},
        "way": torch.stack(ways).norm().item(),
        "masters moved": moved / sum(before.numel() for before in masters),
        "halves moved": sum(int((weights[name] != halves[name]).sum()) for name in weights) / sum(w.numel() for w in weights.values()),
    }


def resumed(images: str, folder: Path, found: dict) -> None:
    """Whole runs of four steps, and their ends once more from step 2 on, under the same stage and in bf16 under another one."""
    for precision, stages in (("bf16", "20"), ("fp16", "0")):
        given = {**SMALL, **SGD, **RUN, "data.path": images, "precision": precision, "zero_stage": stages[0]}
        config, out = apply_overrides(load_recipe("tiny_swav").config(), given), folder / precision
        train(config, out)
        for stage in stages:
            again = folder / f"{precision} Z{stage}"
            if torch.distributed.get_rank() == 0:
                (again / "ckpt").mkdir(parents=True)
                shutil.copy(out / "config.json", again)
                shutil.copytree(out / "ckpt" / "step_00000002", again / "ckpt" / "step_00000002")
            torch.distributed.barrier()
            train(apply_overrides(config, {"zero_stage": stage}), again, resume=True)


@pytest.fixture(scope="module")
def runs(small_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("precision")
    return on_ranks(RANKS, on_rank, str(small_images), str(folder)), folder


def differing(a: dict, b: dict) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


def relative(a: dict, b: dict) -> float:
    a, b = (torch.cat([weights[name].double().flatten() for name in sorted(weights)]) for weights in (a, b))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_weights_end_in_the_same_bits_under_every_stage(runs, precision):
    """Two ranks' halves are added in one order only; fp16's first steps are skipped while its scale comes down from 2^16, alike."""
    for rank in runs[0]:
        first = rank[precision, 0]
        assert {w.dtype for w in first["weights"].values()} == {torch.bfloat16 if precision == "bf16" else torch.float16}
        assert len(set(first["losses"])) == STEPS and first["masters"] == {torch.float32}
        for stage in STAGES[1:]:
            other = rank[precision, stage]
            assert {key: other[key] for key in ("losses", "skipped", "scale", "masters")} == {
                key: first[key] for key in ("losses", "skipped", "scale", "masters")
            }
            assert differing(other["weights"], first["weights"]) == []


def test_half_weights_follow_the_run_in_fp32(runs):
    """As near as rounding lets them; in fp16 fewer steps are applied, but each as long: the scale is multiplied by and divided by once."""
    rank = runs[0][0]
    assert rank["bf16", 0]["skipped"] == rank["fp32", 0]["skipped"] == 0 < rank["fp16", 0]["skipped"] < 5
    assert 1e-5 < relative(rank["bf16", 0]["weights"], rank["fp32", 0]["weights"]) < 2e-2
    assert rank["fp16", 0]["scale"] == 2.0 ** (16 - rank["fp16", 0]["skipped"])
    assert 0.3 < rank["fp16", 0]["way"] / rank["fp32 sgd", 0]["way"] < 1.5


@pytest.mark.parametrize("stage", STAGES)
def test_masters_move_where_half_weights_alone_would_not(runs, stage):
    for rank in runs[0]:
        slow = rank["slow", stage]
        assert slow["masters moved"] > 0.5 and slow["halves moved"] < 0.05, (slow["masters moved"], slow["halves moved"])


def test_several_micro_batches_are_summed_alike(runs):
    """Stage 1 adds up before ranks do, 2 and 3 after: what travels is rounded to bf16 at another place."""
    for rank in runs[0]:
        assert differing(rank["summed", 2]["weights"], rank["summed", 3]["weights"]) == []
        assert relative(rank["summed", 1]["weights"], rank["summed", 2]["weights"]) < 1e-3


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"tiny_swav"}))
def test_every_method_trains_with_half_weights(runs, name):
    for rank in runs[0]:
        assert rank[name, 3]["losses"] == rank[name, 0]["losses"] and differing(rank[name, 3]["weights"], rank[name, 0]["weights"]) == []
        assert rank[name, 0]["losses"] == pytest.approx(rank[name, "fp32"]["losses"], rel=2e-2)
        assert len(set(rank[name, 0]["losses"])) == 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_resumed_run_ends_in_the_same_bits(runs, precision):
    """Masters and momenta, and in fp16 the loss scale, without which the steps after would overflow anew."""
    stage = {"bf16": 2, "fp16": 0}[precision]
    out, again = (runs[1] / name / "ckpt" / "step_00000004" for name in (precision, f"{precision} Z{stage}"))
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        assert differing(checkpoint.read(again, name), checkpoint.read(out, name)) == []
    assert all(value.dtype == torch.float32 for value in checkpoint.read(out, checkpoint.OPTIMIZER).values())
    metas = [checkpoint.read_meta(place) for place in (out, again)]
    assert metas[0]["loss_scale"] == metas[1]["loss_scale"] and bool(metas[0]["loss_scale"]) == (precision == "fp16")
    assert metas[0]["skipped_steps"] == metas[1]["skipped_steps"]


def test_half_weights_go_on_under_another_stage(runs):
    out, again = (checkpoint.read(runs[1] / name / "ckpt" / "step_00000004", checkpoint.MODEL) for name in ("bf16", "bf16 Z0"))
    assert relative(again, out) < 1e-5


def test_fp16_is_refused_where_there_is_no_such_arithmetic():
    accelerator = mock.Mock()
    accelerator.return_value.is_fp16_supported.return_value = False
    config = apply_overrides(load_recipe("tiny_swav").config(), {"precision": "fp16"})
    with mock.patch("deepspeed.accelerator.get_accelerator", accelerator), pytest.raises(RuntimeError, match="precision=fp16 is not for"):
        initialize_deepspeed(torch.nn.Linear(2, 2), None, config, 1)
