"""How does a method get its momentum teachers, and how do they follow their students?"""

import copy
from collections.abc import Iterator
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import nn

from fuseer.engine.distributed import gather_rows
from fuseer.engine.partitions import Piece, shape_of
from fuseer.kernels.functional import ema_update_

# elements a rank sends at once when the pieces of a teacher are put together: 64 MiB in fp32, and as much from each other rank
EXCHANGED = 2**24


class Teachers(nn.Module):
    """teacher ← m · teacher + (1 - m) · student after every applied step, for each teacher that `method.teacher_of` names.

    A teacher begins as a copy of its student and is handed to the method as a plain attribute, outside the method's module tree: it is
    no part of its parameters() or state_dict(), DeepSpeed and the optimizer never see it. Its parameters require no gradient and have
    the student's dtype; where that is a half one, the average itself is kept in fp32 and what runs is its copy, rounded in the same pass.
    Parameters that are not trained are not averaged. Buffers, BatchNorm statistics among them, are the teacher's own and move with its
    own forwards. `pieces_of` and `partitioned` tell where this rank keeps the averages, as the optimizer's tell it of the weights.

    Build it before `deepspeed.initialize`, which under ZeRO 3 takes the student apart, and call `follow` after it. Without `follow`
    (plain loops, stage 0) every rank averages whole weights, and there is no communication. Under ZeRO 1 and 2 each rank averages its own
    pieces of the optimizer's fp32 weights, then all-gathers the teacher's. Under ZeRO 3 a teacher is cut as its student is, each rank
    averages its shards without communication, and DeepSpeed's hooks gather them in the teacher's forward.
    """

    def __init__(self, method: nn.Module):
        super().__init__()
        self.partitioned, self._group = False, None
        self._students, self._shards, self._exchanges = {}, [], []
        self._momentum = method.teacher_momentum if method.teacher_of else None
        names = {parameter: name for name, parameter in method.named_parameters()}
        for name, student in method.teacher_of.items():
            teacher = _copy(method.get_submodule(student)).requires_grad_(False)
            for (path, parameter), followed in zip(teacher.named_parameters(), method.get_submodule(student).parameters(), strict=True):
                self._students[f"{name}.{path}"] = (parameter, followed, names[followed])
            self.add_module(name, teacher)
            method.__dict__[name] = teacher
        self._plan({name: [Piece(name, p, p, 0, 0, p.numel())] for p, name in names.items() if p.requires_grad})
        self.train(method.training)

    @torch.no_grad()
    def follow(self, optimizer, group: dist.ProcessGroup | None) -> None:
        """Has each rank average the pieces that it updates, once `optimizer.bind` knows them; the teachers begin as the students again.

        Every rank of `group` must call. Raises RuntimeError where ZeRO 3 has cut a teacher otherwise than its student.
        """
        for parameter, student, _ in self._students.values():
            parameter.data = parameter.data.to(student.dtype)
        self.partitioned = optimizer.partitioned
        if any(hasattr(student, "ds_tensor") for _, student, _ in self._students.values()):
            self._shards = [_cut(teacher) for teacher in self.children()]
        self._plan(optimizer.pieces_of)
        if self.partitioned and group is not None and not self._shards:
            self._group = group
            self._exchanges = list(self._exchanged_parts())
        for averages, students, *shadow in self._moves:
            for copies in (averages, *shadow):
                torch._foreach_copy_(copies, students)
        self._put_together()

    @torch.no_grad()
    def update(self, step: int, skipped: torch.Tensor | None = None) -> None:
        """One move towards the students, with the momentum of step `step`; none where `skipped`, a bool scalar on the device; buffers stay.

        An update after step t stands before forward t + 1, so it is MoCo's, which updates at the head of each forward: there the very
        first one has no effect, because teacher and student are still equal.
        """
        if self._momentum is None:
            return
        momentum = self._momentum(step)
        if skipped is not None:
            momentum = torch.where(skipped, 1.0, torch.full((), momentum, dtype=torch.float64, device=skipped.device))
        for shards in self._shards:
            shards.partition_all_parameters()
        for averages, students, *shadow in self._moves:
            ema_update_(averages, students, momentum, shadow=shadow[0] if shadow else None)
        self._put_together()

    def _plan(self, pieces_of: dict[str, list[Piece]]) -> None:
        """What `update` moves: averages, the students' tensors that the optimizer updates and, for half weights, these as the shadow."""
        self.pieces_of: dict[str, list[Piece]] = {}
        wide, half = [], []
        for name, (parameter, _, student) in self._students.items():
            for piece in pieces_of.get(student, []):
                mine = _beside(piece, name, parameter)
                # whole tensors are taken as they are, so that they stay right when their data are exchanged
                whole = piece.holder is piece.parameter
                weights, source = (parameter, piece.holder) if whole else (mine.of(mine.holder), piece.of(piece.holder))
                if weights.dtype in (torch.float32, torch.float64):
                    wide.append((weights, source))
                else:
                    mine = mine._replace(holder=weights.float(), start=0)
                    half.append((mine.holder, source, weights))
                self.pieces_of.setdefault(name, []).append(mine)
        self._moves = [[list(tensors) for tensors in zip(*rows, strict=True)] for rows in (wide, half) if rows]

    def _exchanged_parts(self) -> Iterator[list[list[torch.Tensor]]]:
        """Views of the teachers' weights, per collective and rank: that rank's pieces, of one dtype and at most EXCHANGED elements."""
        own = [(name, piece.offset, piece.numel) for name, pieces in self.pieces_of.items() for piece in pieces]
        every = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(every, own, self._group)
        flat = {name: parameter.view(-1) for name, (parameter, _, _) in self._students.items()}
        for dtype in sorted({view.dtype for view in flat.values()}, key=str):
            parts = [[flat[name].narrow(0, at, n) for name, at, n in pieces if flat[name].dtype == dtype] for pieces in every]
            yield from map(list, zip_longest(*map(_in_turns, parts), fillvalue=[]))

    def _put_together(self) -> None:
        """Gives every rank the weights that the others have moved (ZeRO 1 and 2)."""
        for parts in self._exchanges:
            views = [view for part in parts for view in part]
            mine = torch.cat([views[0][:0], *parts[dist.get_rank(self._group)]])
            every, _ = gather_rows(mine, self._group, counts=[sum(view.numel() for view in part) for part in parts])
            torch._foreach_copy_(views, every.split([view.numel() for view in views]))


def _beside(piece: Piece, name: str, parameter: nn.Parameter) -> Piece:
    """The place in a teacher's `parameter` of what `piece` is of its student: the same elements."""
    if not hasattr(parameter, "ds_tensor"):
        return Piece(name, parameter, parameter, piece.offset, piece.offset, piece.numel)
    first = parameter.ds_tensor.numel() * dist.get_rank(parameter.ds_process_group)
    if piece.offset != first or piece.numel != min(max(shape_of(parameter).numel() - first, 0), parameter.ds_tensor.numel()):
        raise RuntimeError(
            f"teacher: ZeRO 3 has cut {name} at {first} and its student {piece.name} at {piece.offset}; this DeepSpeed differs from "
            "0.19.8, train with zero_stage=0"
        )
    return Piece(name, parameter, parameter.ds_tensor, 0, piece.offset, piece.numel)


def _in_turns(views: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The same elements in the same order, cut into lists of EXCHANGED elements; the last one has fewer."""
    turn, room = [], EXCHANGED
    for view in views:
        while view.numel():
            turn.append(view[:room])
            view, room = view[room:], room - turn[-1].numel()
            if not room:
                yield turn
                turn, room = [], EXCHANGED
    if turn:
        yield turn


def _cut(teacher: nn.Module):
    """Cuts a teacher into shards and has each of its modules gathered for its own forward, as DeepSpeed does with models it only runs."""
    import deepspeed
    from deepspeed.runtime.zero import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer

    deepspeed.zero.Init(module=teacher, mem_efficient_linear=False, dtype=torch.float32)
    return DeepSpeedZeRoOffload(teacher, NoopTimer(), None, param_persistence_threshold=0)


def _copy(student: nn.Module) -> nn.Module:
    """A deep copy that keeps talking to the same ranks: process groups cannot be copied."""
    values = [value for module in student.modules() for value in vars(module).values()]
    return copy.deepcopy(student, {id(value): value for value in values if isinstance(value, dist.ProcessGroup)})
