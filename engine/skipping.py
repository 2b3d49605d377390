"""What does a step leave behind whose loss or gradients are not finite?"""

import torch

from fuseer.engine.distributed import loss_scale


class Skipping:
    """Nothing: such a step moves neither weights nor optimizer state, teachers or buffers, and its batch is not met again. It is counted.

    The flag is made and used on the device, so that nobody waits for it: a loss that is not finite makes every gradient so (`guarded`),
    which travels to all ranks with the gradients; the optimizer throws such a step away, or under ZeRO and with half weights DeepSpeed,
    which reads a flag of its own on the host once a step; `settle` counts it and puts buffers back (BatchNorm statistics, queues).
    `skipped` counts such steps of the whole run, `in_a_row` those up to now, int64 scalars on the device.
    """

    def __init__(self, engine, optimizer, method: torch.nn.Module, teachers: torch.nn.Module):
        self._engine, self._optimizer = engine, optimizer
        self._modules = method, teachers
        self._applied, self._thrown = torch.zeros((), device=engine.device).bool(), torch.ones((), device=engine.device).bool()
        self.skipped, self.in_a_row = (torch.zeros((), dtype=torch.int64, device=engine.device) for _ in range(2))

    @torch.no_grad()
    def begin(self, skipped: int) -> None:
        """Notes what stands in the buffers, and that `skipped` steps of this run were skipped so far; before the first step and whenever a
        checkpoint has been taken back."""
        self.skipped.fill_(skipped)
        self.in_a_row.zero_()
        kinds: dict[torch.dtype, list[torch.Tensor]] = {}
        for module in self._modules:
            for buffer in module.buffers():
                kinds.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(kinds.values())
        self._kept = [_flat(buffers) for buffers in self._buffers]

    def guarded(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` for engine.backward: itself, or NaN with nothing but NaN behind it."""
        # finite · 1 is exact; and DeepSpeed 0.19.8 divides by the loss scale at stage 0, but multiplies by it only at the others
        return loss * torch.where(loss.detach().isfinite(), loss_scale(self._engine), torch.nan)

    def counts(self) -> dict[str, torch.Tensor]:
        """What a log step reads."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.in_a_row}

    @torch.no_grad()
    def settle(self) -> torch.Tensor:
        """After engine.step() of the last micro-batch: counts the step, puts buffers back where it was thrown away, and tells, as a bool
        scalar on the device."""
        thrown = self._thrown
        if self._engine.was_step_applied():
            thrown = self._applied if self._optimizer.thrown is None else self._optimizer.thrown
        self.skipped.add_(thrown)
        self.in_a_row.add_(1).mul_(thrown)
        for place, buffers in enumerate(self._buffers):
            self._kept[place] = torch.where(thrown, self._kept[place], _flat(buffers))
            parts = self._kept[place].split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
        return thrown


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
