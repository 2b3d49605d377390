"""Do teachers follow their students as published: after every applied step, under every ZeRO stage, across a resume?"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from fuseer.engine import checkpoint, distributed
from fuseer.engine.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.data.sources import open_source
from fuseer.engine.data.view import Batch, View
from fuseer.engine.distributed import Ranks
from fuseer.engine.methods.method import Ground, Loss, Method, embedding_std
from fuseer.engine.models.backbone import build_backbone
from fuseer.engine.models.heads import ProjectionHead
from fuseer.engine.optim import build_optimizer, layout
from fuseer.engine.schedule import half_cosine
from fuseer.engine.teacher import Teachers
from fuseer.engine.train import build_method, train
from tests.ranks import on_ranks

STEPS, B = 10, 12
SMALL = {"depths": [1], "widths": [16], "group_widths": 8, "stem_width": 8, "stem_stride": 2}
ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


class ToyConfig(MethodConfig):
    views: tuple[View, ...] = (View(size=12, count=2, scale=(0.5, 1.0)),)

    def build(self, ground: Ground) -> "Toy":
        return Toy(self, ground)


class Toy(Method):
    """|q - k|² of two views: q through the student, k through its moving average."""

    teacher_of = {"key_backbone": "backbone", "key_head": "heads.projector"}
    asked: list[int] = []

    def __init__(self, config: ToyConfig, ground: Ground):
        super().__init__()
        self.config, self.group, self.total_steps = config, ground.group, ground.total_steps
        self.backbone = ground.backbone
        projector = ProjectionHead((self.backbone.width, 24, 10), bias=False, activation=nn.SiLU, group=ground.norm_group)
        predictor = ProjectionHead((10, 24, 10), bias=False, activation=nn.SiLU, group=ground.norm_group)
        self.heads = nn.ModuleDict({"projector": projector, "predictor": predictor})

    @property
    def views(self):
        return self.config.views

    def teacher_momentum(self, step: int) -> float:
        Toy.asked.append(step)
        return half_cosine(step, total_steps=self.total_steps, start=0.7)

    def forward(self, batch: Batch) -> Loss:
        first, second = batch.crops[0]
        q = self.heads["predictor"](self.heads["projector"](self.backbone(first)))
        with torch.no_grad():
            k = self.key_head(self.key_backbone(second))
        return Loss((q - k).square().sum(1).mean(), {})


CONFIG = TrainConfig(
    recipe="toy",
    method=ToyConfig(),
    model=ModelConfig(name="anynet", options=SMALL),
    optim=OptimConfig(name="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4),
    batch_size=B,
    steps=STEPS,
)


def batch_of(step: int, rows) -> Batch:
    index = torch.tensor(list(rows), dtype=torch.int64)
    crops = torch.randn(2, B, 3, 12, 12, generator=torch.Generator().manual_seed(step))
    return Batch([crops[:, index]], index, torch.full((len(index),), -1), 0)


def build(rank: int = 0, world_size: int = 1) -> Toy:
    torch.manual_seed(0)
    group = torch.distributed.group.WORLD if world_size > 1 else None
    backbone = build_backbone("anynet", group=group, activation=nn.SiLU, **SMALL)
    return CONFIG.method.build(Ground(backbone, group, group, rank, world_size, B // world_size, STEPS))


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def official_run(order=None) -> dict[str, torch.Tensor]:
    """Plain torch in MoCo's order: the average is moved at the head of every forward, with the weights and momentum of that iteration."""
    method, momenta = build(), [half_cosine(step, total_steps=STEPS, start=0.7) for step in range(STEPS + 1)]
    pairs = {"key_backbone": method.backbone, "key_head": method.heads["projector"]}
    keys = {"key_backbone": build().backbone, "key_head": build().heads["projector"]}
    for name, key in keys.items():
        method.__dict__[name] = key
    optimizer = torch.optim.SGD(method.parameters(), lr=CONFIG.optim.lr, momentum=0.9, weight_decay=1e-4)
    losses = []
    for step in range(STEPS + 1):
        for name, student in pairs.items():
            for key, query in zip(keys[name].parameters(), student.parameters(), strict=True):
                key.data = key.data * momenta[step] + query.data * (1 - momenta[step])
        if step == STEPS:
            break
        loss = method(batch_of(step, order or range(B))).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "teacher": flat([p for key in keys.values() for p in key.parameters()]),
        "statistics": flat([b for key in keys.values() for b in key.buffers() if b.is_floating_point()]),
        "student": flat(method.parameters()),
    }


def engine_run(config: TrainConfig, ranks: Ranks, folder: Path | None = None) -> dict:
    method = build(ranks.rank, ranks.world_size)
    optimizer = build_optimizer(method, config.optim)
    engine = distributed.initialize_deepspeed(method, optimizer, config, ranks.world_size)
    zero = engine.optimizer if config.zero_stage else None
    optimizer.bind(layout(method, zero), ranks.group, partitioned=zero is not None)
    teachers = Teachers(method)
    own = range(ranks.rank * B // ranks.world_size, (ranks.rank + 1) * B // ranks.world_size)
    losses, expected = [], [p.detach().clone() for p in (*method.backbone.parameters(), *method.heads["projector"].parameters())]
    for step in range(STEPS):
        loss = engine(batch_of(step, own)).total
        engine.backward(loss)
        engine.step()
        teachers.update(step + 1)
        students = [*method.backbone.parameters(), *method.heads["projector"].parameters()]
        m = half_cosine(step + 1, total_steps=STEPS, start=0.7)
        expected = [torch.lerp(t, p.detach(), 1 - m) for t, p in zip(expected, students, strict=True)]
        loss = loss.detach().clone()
        if ranks.group is not None:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item() / ranks.world_size)
    if folder:
        checkpoint.save(folder, STEPS, method=method, teachers=teachers, optimizer=optimizer, ranks=ranks, meta={}, keep=1)
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "teacher": flat(teachers.parameters()),
        "statistics": flat(b for b in teachers.buffers() if b.is_floating_point()),
        "student": flat(method.parameters()),
        "average of what was seen": flat(expected),
        "fp32": all(p.dtype == torch.float32 for p in teachers.parameters()),
    }


def on_rank(rank: int, world_size: int, folder: str) -> dict:
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    rows = torch.arange(3.0 * 2).view(3, 2)[: 3 * rank] + 1
    found = {"gathered": distributed.gather_rows(rows.requires_grad_(), ranks.group)}
    z = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    found["std"] = embedding_std(3 * z[:4] if rank == 0 else z[4:], ranks.group)
    for stage in (0, 1, 2):
        found[stage] = engine_run(CONFIG.model_copy(update={"zero_stage": stage}), ranks, Path(folder) / f"stage{stage}")
    found["autocast"] = engine_run(CONFIG.model_copy(update={"zero_stage": 2, "precision": "bf16-autocast"}), ranks)
    return found


@pytest.fixture(scope="module")
def official():
    return official_run()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, on_rank, 2, str(folder)), folder


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


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_two_ranks_under_zero_equal_one_process(official, several, stage):
    for rank in several[0]:
        for name in ("losses", "student", "teacher", "statistics"):
            assert relative(rank[stage][name], official[name]) < 1e-5, name
    assert torch.equal(several[0][0][stage]["teacher"], several[0][1][stage]["teacher"]), "ranks never drift apart"


@pytest.mark.parametrize("run", [0, 1, 2, "autocast"])
def test_the_teacher_is_the_average_of_whole_fp32_weights(several, run):
    for rank in several[0]:
        assert torch.equal(rank[run]["teacher"], rank[run]["average of what was seen"]) and rank[run]["fp32"]
        assert torch.equal(rank[run]["teacher"], several[0][0][run]["teacher"])


def test_a_teacher_of_two_ranks_loads_into_one_process(several):
    for stage in (0, 1, 2):
        method = build()
        teachers, optimizer = Teachers(method), build_optimizer(method, CONFIG.optim)
        optimizer.bind(layout(method, None), None, partitioned=False)
        place = checkpoint.latest(several[1] / f"stage{stage}")
        checkpoint.load(place, method=method, teachers=teachers, optimizer=optimizer, ranks=ALONE)
        assert torch.equal(flat(teachers.parameters()), several[0][0][stage]["teacher"])
        assert torch.equal(flat(method.key_head.parameters()), flat(teachers.key_head.parameters())), "the method sees what was loaded"
        mean = (several[0][0][stage]["statistics"] + several[0][1][stage]["statistics"]) / 2
        assert relative(flat(b for b in teachers.buffers() if b.is_floating_point()), mean) < 1e-7


def test_rows_of_uneven_ranks_are_gathered_in_rank_order(several):
    for rank in several[0]:
        rows, counts = rank["gathered"]
        assert torch.equal(rows, torch.arange(6.0).view(3, 2) + 1) and counts == [0, 3] and not rows.requires_grad


def test_the_spread_of_embeddings(several):
    z = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    for rank in several[0]:
        torch.testing.assert_close(rank["std"], z.std(0, correction=0).mean() * 5**0.5, rtol=1e-5, atol=0)
    assert embedding_std(torch.randn(4000, 64), None) == pytest.approx(1, abs=0.01)
    assert embedding_std(torch.ones(50, 64) * torch.rand(50, 1), None) < 1e-3


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
    teacher = {name: p.detach() for name, p in build_method(config, ALONE).named_parameters() if not name.startswith("heads.predictor")}
    for step in range(1, 7):
        m = half_cosine(step, total_steps=6, start=0.7)
        student = files(out, step, "model")
        teacher = {name: torch.lerp(t, student[name], 1 - m) for name, t in teacher.items()}
        saved = files(out, step, "teacher")
        for name, tensor in teacher.items():
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
