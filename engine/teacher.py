"""How does a method get its momentum teachers, and how do they follow their students?"""

import copy

import torch
import torch.distributed as dist
from torch import nn


class Teachers(nn.Module):
    """teacher ← m · teacher + (1 - m) · student after every applied step, for each teacher that `method.teacher_of` names.

    A teacher begins as a copy of its student and is handed to the method as a plain attribute, outside the method's module tree: it is
    no part of its parameters() or state_dict(), DeepSpeed and the optimizer never see it. Its parameters require no gradient and have
    the student's dtype (fp32 in training); its buffers, BatchNorm statistics among them, are its own and move with its own forwards.
    Build it after `deepspeed.initialize`. ZeRO 0, 1 and 2 keep every weight whole and in fp32 on every rank, so that an update needs
    no communication and ranks stay equal. The state_dict of this module is that of all teachers, keyed "teacher.parameter".
    """

    def __init__(self, method: nn.Module):
        super().__init__()
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._momentum = method.teacher_momentum if method.teacher_of else None
        for name, student in method.teacher_of.items():
            teacher = _copy(method.get_submodule(student)).requires_grad_(False)
            self._pairs += zip(teacher.parameters(), method.get_submodule(student).parameters(), strict=True)
            self.add_module(name, teacher)
            method.__dict__[name] = teacher
        self.train(method.training)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """One move towards the students, with the momentum of applied step `step`; buffers stay.

        An update after step t stands before forward t + 1, so it is MoCo's, which updates at the head of each forward: there the very
        first one has no effect, because teacher and student are still equal.
        """
        if self._pairs:
            teachers, students = zip(*self._pairs, strict=True)
            torch._foreach_lerp_(teachers, students, 1 - self._momentum(step))


def _copy(student: nn.Module) -> nn.Module:
    """A deep copy that keeps talking to the same ranks: process groups cannot be copied."""
    values = [value for module in student.modules() for value in vars(module).values()]
    return copy.deepcopy(student, {id(value): value for value in values if isinstance(value, dist.ProcessGroup)})
