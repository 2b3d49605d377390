"""Which small methods learn from a teacher, and what would plain torch make of one?"""

import torch
from torch import nn

from fuseer.engine.config import MethodConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.data.view import Batch, View
from fuseer.engine.distributed import Ranks
from fuseer.engine.methods.method import Ground, Loss, Method
from fuseer.engine.models.backbone import build_backbone
from fuseer.engine.models.heads import ProjectionHead
from fuseer.engine.schedule import half_cosine

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


class Half(nn.Module):
    """bf16 weights, whose teacher is in the same precision."""

    teacher_of = {"key": "body"}

    def __init__(self, width: int = 37):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(5, width), nn.Linear(width, 3)).bfloat16()

    def teacher_momentum(self, step: int) -> float:
        return 0.9
