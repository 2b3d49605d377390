"""What must a method offer the loop, and what does the loop promise it?"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from fuseer.engine.data.view import Batch, View


class Loss(NamedTuple):
    """`total` is what is differentiated (house rule: mean over ranks = the global loss); `parts` are scalars to log."""

    total: torch.Tensor
    parts: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Ground:
    """What the loop tells a method about where it runs: its backbone, its ranks, its share of the batch.

    `group` is None for a process alone; `norm_group` holds the ranks that share BatchNorm statistics, None where none do;
    `batch_per_rank` counts images of one forward pass on one rank.
    """

    backbone: nn.Module
    group: dist.ProcessGroup | None
    norm_group: dist.ProcessGroup | None
    rank: int
    world_size: int
    batch_per_rank: int


class Method(nn.Module, ABC):
    """One learning method: a module whose forward turns a batch of views into a loss.

    It never writes `p.data` or `p.grad`: under ZeRO the optimizer's fp32 copy would undo it. It tags parameters instead:
    `p.unit_rows = True` has the optimizer keep unit rows, `p.frozen = True` has it leave the parameter alone.
    Buffers are the same on every rank unless `sharded` names them with the dimension along which ranks hold different rows.
    """

    backbone: nn.Module
    sharded: dict[str, int] = {}

    @property
    @abstractmethod
    def views(self) -> tuple[View, ...]:
        """The views wanted of every image; batch.crops follows this order."""

    @abstractmethod
    def forward(self, batch: Batch) -> Loss:
        """The loss of one micro-batch of this rank. Joins every collective even with 0 rows."""

    def after_step(self, step: int) -> None:  # noqa: B027 - a method without schedules has nothing to do here
        """Called once before training and after every applied optimizer step; `step` counts applied steps."""

    def diagnostics(self) -> dict[str, torch.Tensor]:
        """Tensors about the last forward pass, reduced over all ranks; called on every rank at log steps only."""
        return {}

    def counters(self) -> dict[str, int]:
        """Whole numbers that a checkpoint must carry besides parameters and buffers."""
        return {}

    def load_counters(self, counters: dict[str, int], same_world: bool) -> None:  # noqa: B027
        """Takes `counters()` back; `same_world` is False when the number of ranks has changed since."""
