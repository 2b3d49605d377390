"""Do teachers follow their students as published: after every applied step, in every precision, across a resume?"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fuseer.engine import distributed
from fuseer.engine.config import DataConfig
from fuseer.engine.data.sources import open_source
from fuseer.engine.methods.method import Ground, Method
from fuseer.engine.models.backbone import build_backbone
from fuseer.engine.run import build_method
from fuseer.engine.schedule import half_cosine
from fuseer.engine.teacher import Teachers
from fuseer.engine.train import train
from fuseer.kernels.functional import ema_update_
from tests.taught import ALONE, CONFIG, SMALL, STEPS, B, Half, Toy, batch_of, build, flat, official_run, relative


@pytest.fixture(scope="module")
def official():
    return official_run()


def test_the_control_run_is_calm_and_moves(official):
    turned = official_run(order=list(reversed(range(B))))
    assert all(relative(turned[name], official[name]) < 1e-6 for name in official)
    start = flat(build().parameters())
    assert relative(official["student"], start) > 1e-2
    keys = len(official["teacher"])
    assert relative(official["teacher"], start[:keys]) > 1e-3 and relative(official["teacher"], official["student"][:keys]) > 1e-3


def test_an_update_after_the_step_is_the_official_one_before_the_forward(official):
    method = build()
    teachers, optimizer = Teachers(method), torch.optim.SGD(method.parameters(), lr=CONFIG.optim.lr, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(STEPS):
        loss = method(batch_of(step, range(B))).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teachers.update(step + 1)
        losses.append(loss.item())
    assert relative(torch.tensor(losses, dtype=torch.float64), official["losses"]) < 1e-6
    assert relative(flat(teachers.parameters()), official["teacher"]) < 1e-6
    assert relative(flat(b for b in teachers.buffers() if b.is_floating_point()), official["statistics"]) < 1e-6


@pytest.mark.parametrize("momentum", [0.996, 0.999, 0.9999])
def test_a_bf16_average_alone_stops_moving_and_ours_arrives(momentum):
    """bf16 has a spacing of 2⁻⁷ in [1, 2): a move of 0.004 · 0.4 · t is below half of it, wherever t is, and is rounded away."""
    method = Half()
    method.teacher_momentum = lambda step: momentum
    followed, generator = list(method.body.parameters()), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in followed:
            p.copy_(1 + 0.99 * torch.rand(p.shape, generator=generator))
        start = [p.clone() for p in followed]
        teachers, alone = Teachers(method), [p.clone() for p in followed]
        for p in followed:
            p.mul_(1.4)
    steps = min(round(1 / (1 - momentum)), 1000)
    for step in range(steps):
        teachers.update(step)
        ema_update_(alone, followed, momentum)
    arrived = 1 - momentum**steps
    for (name, ours), begun, stuck, target in zip(teachers.named_parameters(), start, alone, followed, strict=True):
        truth = begun.double() + arrived * (target.double() - begun.double())
        (piece,) = teachers.pieces_of[name]
        assert torch.equal(stuck, begun) and arrived > 0.09
        assert piece.holder.dtype == torch.float32 and ours.dtype == torch.bfloat16
        assert (piece.holder.double() - truth).abs().max() < 1e-4
        assert torch.equal(ours, piece.holder.bfloat16()), "what runs is the average, rounded once"


def test_teachers_stay_outside_the_method():
    method = build()
    names, state = [name for name, _ in method.named_parameters()], set(method.state_dict())
    teachers = Teachers(method)
    assert [name for name, _ in method.named_parameters()] == names and set(method.state_dict()) == state
    assert not any(p.requires_grad for p in teachers.parameters())
    assert not {p.data_ptr() for p in teachers.parameters()} & {p.data_ptr() for p in method.parameters()}
    method.eval()
    assert not method.key_backbone.training
    method.train()
    assert method.key_backbone.training and all(module.training for module in method.key_head.modules())


def test_a_method_with_teachers_must_say_their_momentum():
    class Silent(Toy):
        teacher_momentum = Method.teacher_momentum

    method = Silent(CONFIG.method, Ground(build_backbone("anynet", **SMALL), None, None, 0, 1, B))
    with pytest.raises(NotImplementedError, match="Silent names teachers"):
        Teachers(method).update(1)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for path in open_source("demo", split="train").paths[:26]:
        shutil.copy(path, folder / Path(path).name)
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """Six steps of two accumulated micro-batches through the real loop, every step kept."""
    Toy.asked.clear()
    out = tmp_path_factory.mktemp("train") / "run"
    config = CONFIG.model_copy(
        update={
            "steps": 6, "accumulation_steps": 2, "log_every_steps": 1, "checkpoint_every_steps": 1, "keep_checkpoints": 6,
            "data": DataConfig(path=str(images), pipeline="torchvision"),
        }
    )  # fmt: skip
    train(config, out)
    yield config, out, list(Toy.asked)
    distributed.stop()


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def files(out: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / "ckpt" / f"step_{step:08d}" / f"{name}.safetensors")


def test_the_loop_updates_once_for_each_applied_step(run):
    config, out, asked = run
    assert asked == [1, 2, 3, 4, 5, 6], "not once for each of the 12 micro-batches"
    average = {name: p.detach() for name, p in build_method(config, ALONE).named_parameters() if not name.startswith("heads.predictor")}
    for step in range(1, 7):
        student, saved = files(out, step, "model"), files(out, step, "teacher")
        ema_update_(list(average.values()), [student[name] for name in average], half_cosine(step, total_steps=6, start=0.7))
        for name, tensor in average.items():
            key = name.replace("heads.projector", "key_head").replace("backbone.", "key_backbone.", 1)
            assert torch.equal(saved[key], tensor), (step, key)
    assert saved["key_head.layers.1.num_batches_tracked"] == 12, "its BatchNorm saw every micro-batch"


def test_resume_with_a_teacher_is_bitwise(run, tmp_path):
    config, out, _ = run
    again = tmp_path / "run"
    (again / "ckpt").mkdir(parents=True)
    shutil.copy(out / "config.json", again)
    shutil.copytree(out / "ckpt" / "step_00000003", again / "ckpt" / "step_00000003")
    train(config, again, resume=True)
    expected = losses(out)
    assert losses(again) == {step: expected[step] for step in (4, 5, 6)}
    for name in ("model", "teacher"):
        ours, theirs = files(again, 6, name), files(out, 6, name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
