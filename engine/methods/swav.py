"""SwAV (Caron et al. 2020, arXiv 2006.09882): swapped prediction between online cluster assignments of views.

loss = mean over assign crops i of 1/(V-1) Σ_{v≠i} CE(codes of view i, softmax(scores of view v / temperature)).
Fused: codes, cross-entropy and its gradient (`fuseer.kernels.functional.swapped_prediction`).
Official formulation: facebookresearch/swav main_swav.py.
"""

import math
from itertools import groupby
from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import nn

from fuseer.engine.config import MethodConfig
from fuseer.engine.data.view import Batch, View
from fuseer.engine.methods.method import Ground, Loss, Method, spread_of
from fuseer.engine.models.heads import ProjectionHead, Prototypes
from fuseer.kernels.functional import swapped_prediction

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
USAGE_BARS = 64


def multi_crop() -> tuple[View, ...]:
    """The published default: 2 x 224 px of 14-100 % of the area, 6 x 96 px of 5-14 %."""
    return View(size=224, count=2, scale=(0.14, 1.0)), View(size=96, count=6, scale=(0.05, 0.14))


class SwAVConfig(MethodConfig):
    """Defaults are those of the published ResNet-50 runs."""

    views: tuple[View, ...] = Field(default_factory=multi_crop)
    assign_crops: tuple[int, ...] = (0, 1)
    hidden_widths: tuple[int, ...] = (2048,)
    embedding_width: int = Field(128, ge=1)
    head_batch_norm: bool = True
    head_bias: bool = True
    head_activation: Literal["relu", "silu", "gelu"] = "relu"
    prototypes: int = Field(3000, ge=1)
    epsilon: float = Field(0.05, gt=0)
    sinkhorn_iterations: int = Field(3, ge=1)
    temperature: float = Field(0.1, gt=0)
    freeze_prototypes_steps: int = Field(313, ge=0)
    queue_length: int = Field(0, ge=0, description="embeddings kept per assign crop over all ranks; 0 = no queue")
    queue_start_step: int = Field(0, ge=0, description="the queue fills from here on and is used once it is full")

    @model_validator(mode="after")
    def _crops_exist(self):
        total = sum(view.count for view in self.views)
        if total < 2:
            raise ValueError(f"views: SwAV needs at least 2 views of an image; got {total}")
        chosen = set(self.assign_crops)
        if not chosen or len(chosen) < len(self.assign_crops) or not chosen <= set(range(total)):
            raise ValueError(f"assign_crops must be distinct views in 0…{total - 1}; got {list(self.assign_crops)}")
        return self

    def build(self, ground: Ground) -> "SwAV":
        return SwAV(self, ground)


class SwAV(Method):
    """Backbone → head → unit embeddings z [V·B, D] → scores [V, B, K] against unit prototypes → swapped prediction."""

    sharded = {"queue": 1}

    def __init__(self, config: SwAVConfig, ground: Ground):
        super().__init__()
        self.config = config
        self.group, self.world_size = ground.group, ground.world_size
        self.backbone = ground.backbone
        self.head = ProjectionHead(
            (self.backbone.width, *config.hidden_widths, config.embedding_width),
            batch_norm=config.head_batch_norm,
            bias=config.head_bias,
            activation=ACTIVATIONS[config.head_activation],
            group=ground.norm_group,
        )
        self.prototypes = Prototypes(config.embedding_width, config.prototypes)
        rows = _queue_rows(config.queue_length, ground)
        self.register_buffer("queue", torch.zeros(len(config.assign_crops), rows, config.embedding_width))
        self.queue_rows = 0
        self.step = 0
        self._z = self._scores = None

    @property
    def views(self):
        return self.config.views

    def forward(self, batch: Batch) -> Loss:
        V, B = sum(len(crops) for crops in batch.crops), batch.crops[0].shape[1]
        z = self.head(self._features(batch))
        with torch.autocast(z.device.type, enabled=False):
            self.prototypes.weight.frozen = self.step < self.config.freeze_prototypes_steps
            scores = self.prototypes(z, frozen=self.prototypes.weight.frozen).unflatten(0, (V, B))
            total = swapped_prediction(
                scores,
                assign=self.config.assign_crops,
                epsilon=self.config.epsilon,
                iterations=self.config.sinkhorn_iterations,
                temperature=self.config.temperature,
                queue_scores=self._queue_scores(),
                group=self.group,
            )
        if self.training and self.queue.shape[1] and self.step >= self.config.queue_start_step:
            self._enqueue(z.detach().unflatten(0, (V, B))[list(self.config.assign_crops)])
        self._z, self._scores = z.detach(), scores.detach()
        return Loss(total, {})

    def after_step(self, step: int) -> None:
        self.step = step

    def chance_loss(self) -> float:
        return math.log(self.config.prototypes)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, torch.Tensor]:
        """Spread of the embeddings, entropy (nats) of the mean softmax over all views and ranks, and how the argmax spreads."""
        scores = self._scores.flatten(0, 1).float()
        mean = torch.softmax(scores / self.config.temperature, -1).sum(0)
        counts = torch.bincount(scores.argmax(-1), minlength=scores.shape[-1]).to(mean.dtype)
        both = torch.stack([mean, counts])
        if self.group is not None:
            dist.all_reduce(both, group=self.group)
        mean, counts = both / both.sum(1, keepdim=True).clamp_min(1)
        return {
            **spread_of(self._z, self.group),
            "prototype_entropy": -torch.xlogy(mean, mean).sum(),
            "prototypes_used": (counts > 0).sum(),
            "prototype_usage": counts.sort(descending=True).values[:USAGE_BARS],
        }

    def counters(self) -> dict[str, int]:
        return {"queue_rows": self.queue_rows}

    def load_counters(self, counters: dict[str, int], same_world: bool) -> None:
        # A part-filled queue has its newest rows at the front of every rank's part: re-split, it would hold zeros in the middle.
        whole = counters["queue_rows"] >= self.queue.shape[1]
        self.queue_rows = min(counters["queue_rows"], self.queue.shape[1]) if same_world else self.queue.shape[1] * whole

    def _features(self, batch: Batch) -> torch.Tensor:
        """[V·B, width], crop-major: one trunk pass for each run of equally large crops, so that BatchNorm never mixes sizes."""
        passes = []
        for _, run in groupby(batch.crops, key=lambda crops: crops.shape[-2:]):
            passes.append(self.backbone(torch.cat([crops.flatten(0, 1) for crops in run])))
        return torch.cat(passes)

    @torch.no_grad()
    def _queue_scores(self) -> torch.Tensor | None:
        if not self.queue.shape[1] or self.queue_rows < self.queue.shape[1]:
            return None
        return self.queue @ self.prototypes.weight.detach().to(self.queue.dtype).T

    def _enqueue(self, z: torch.Tensor) -> None:
        B = min(z.shape[1], self.queue.shape[1])
        self.queue.copy_(torch.cat([z[:, :B], self.queue[:, : self.queue.shape[1] - B]], 1))
        self.queue_rows += B


def _queue_rows(length: int, ground: Ground) -> int:
    """Rows per rank: `length` rounded down to whole global batches, as in the official code."""
    if not length:
        return 0
    whole = length - length % (ground.batch_per_rank * ground.world_size)
    if not whole:
        raise ValueError(
            f"method.queue_length must be 0 or at least one batch of {ground.batch_per_rank * ground.world_size} images; got {length}"
        )
    return whole // ground.world_size
