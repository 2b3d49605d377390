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
    `batch_per_rank` counts images of one forward pass on one rank; `total_steps` the steps of the whole run, for schedules
    of the method's own (0 where there is no run, as in an evaluation).
    """

    backbone: nn.Module
    group: dist.ProcessGroup | None
    norm_group: dist.ProcessGroup | None
    rank: int
    world_size: int
    batch_per_rank: int
    total_steps: int = 0


class Method(nn.Module, ABC):
    """One learning method: a module whose forward turns a batch of views into a loss.

    It never writes `p.data` or `p.grad`: under ZeRO the optimizer's fp32 copy would undo it. It tags parameters instead:
    `p.unit_rows = True` has the optimizer keep unit rows, `p.frozen = True` has it leave the parameter alone.
    Buffers are the same on every rank unless `sharded` names them with the dimension along which ranks hold different rows.
    `teacher_of` maps an attribute to the submodule it is the moving average of: before training, `engine/teacher.py` puts a copy
    there that requires no gradient, is no part of parameters() or state_dict(), and follows the student after every applied step.
    """

    backbone: nn.Module
    sharded: dict[str, int] = {}
    teacher_of: dict[str, str] = {}

    @property
    @abstractmethod
    def views(self) -> tuple[View, ...]:
        """The views wanted of every image; batch.crops follows this order."""

    @abstractmethod
    def forward(self, batch: Batch) -> Loss:
        """The loss of one micro-batch of this rank. Joins every collective even with 0 rows."""

    def after_step(self, step: int) -> None:  # noqa: B027 - a method without schedules has nothing to do here
        """Called once before training and after every optimizer step; `step` counts steps, those that were thrown away included."""

    def teacher_momentum(self, step: int) -> float:
        """m of teacher ← m · teacher + (1 - m) · student in the update after step `step` (1, 2, …), ahead of the next forward."""
        raise NotImplementedError(f"{type(self).__name__} names teachers in teacher_of; it must say their momentum")

    def train(self, mode: bool = True):
        """As nn.Module.train, and the teachers follow."""
        super().train(mode)
        for name in self.teacher_of:
            if name in self.__dict__:
                self.__dict__[name].train(mode)
        return self

    def chance_loss(self) -> float | None:
        """What `Loss.total` is, over all ranks, when no two images are told apart; None where no such number exists."""
        return None

    def diagnostics(self) -> dict[str, torch.Tensor]:
        """Tensors about the last forward pass, reduced over all ranks; called on every rank at log steps only.

        The monitor reads "embedding_std" and "embedding_rank" (see `spread_of`), and "prototypes_used" and "prototype_entropy", in nats
        (where chance_loss is ln K).
        """
        return {}

    def counters(self) -> dict[str, int]:
        """Whole numbers that a checkpoint must carry besides parameters and buffers."""
        return {}

    def load_counters(self, counters: dict[str, int], same_world: bool) -> None:  # noqa: B027
        """Takes `counters()` back; `same_world` is False when the number of ranks has changed since."""


@torch.no_grad()
def embedding_std(z: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """√D · mean over dimensions of the standard deviation over all rows of `group` of z / |z|; z [N, D], any N per rank, one scalar.

    1 where the rows spread over the whole sphere, 0 where they have collapsed to one point.
    """
    unit = torch.nn.functional.normalize(z.float(), dim=1)
    sums = torch.cat([unit.sum(0), unit.square().sum(0), unit.new_tensor([len(unit)])]).double()
    if group is not None:
        dist.all_reduce(sums, group=group)
    D = z.shape[1]
    mean, square = sums[:D] / sums[-1], sums[D:-1] / sums[-1]
    return (square - mean.square()).clamp_min(0).sqrt().mean().mul(D**0.5).float()


@torch.no_grad()
def effective_rank(z: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """exp(entropy of σ / Σσ), σ the singular values of all rows of `group` of z / |z|; z [N, D], any N per rank, one scalar.

    1 where all rows lie on one line, min(N, D) where they fill all dimensions alike; nan where z is not finite. The rows are not centred.
    One all-reduce of D² numbers and a decomposition in fp64. Source: Garrido et al. 2023 (RankMe), arXiv 2210.02885.
    """
    unit = torch.nn.functional.normalize(z.double(), dim=1)
    moments = unit.T @ unit
    if group is not None:
        dist.all_reduce(moments, group=group)
    finite = moments.isfinite().all()
    lengths = torch.linalg.eigvalsh(torch.where(finite, moments, 0)).clamp_min(0).sqrt()
    shares = lengths / lengths.sum()
    return torch.where(finite, torch.special.entr(shares).sum().exp(), torch.nan).float()


def spread_of(z: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """What `diagnostics` says of embeddings z [N, D]."""
    return {"embedding_std": embedding_std(z, group), "embedding_rank": effective_rank(z, group)}
