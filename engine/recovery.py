"""What does a run do that has gone wrong: stop in words, or go back to its last checkpoint and on with other images?"""

from pathlib import Path

import torch
import torch.distributed as dist

from fuseer.engine.log import RunLog, say
from fuseer.engine.monitor import COLLAPSE, Monitor
from fuseer.engine.resume import take_back
from fuseer.engine.run import Run

ADVICE = "lower optim.lr or lengthen the warm-up, and go on from an earlier checkpoint"


class Diverged(RuntimeError):
    """Raised on all ranks at one step; the text says what has happened, `policy` what the configuration wants done: stop or rollback."""

    def __init__(self, step: int, policy: str, reason: str):
        super().__init__(reason)
        self.step, self.policy = step, policy


def judge(run: Run, log: RunLog, monitor: Monitor, step: int, numbers: dict[str, float]) -> None:
    """At a log step: says what the monitor sees, and raises Diverged where that, or the steps skipped in a row, are not to be suffered.

    `numbers` are those of the log, on the first rank; it decides for all, and every rank must call.
    """
    verdict = None
    for sign in monitor.observe(step, numbers):
        say(f"step {step}: {sign.text}")
        log.event("monitor", step, **sign._asdict())
        if sign.sign in COLLAPSE and not sign.over and run.config.on_collapse != "warn":
            verdict = run.config.on_collapse, f"step {step}: {sign.text}"
    row = numbers.get("skipped_in_a_row", 0)
    if row >= run.config.max_skipped_steps:
        reason = f"{row} steps in a row up to step {step} had a loss or gradients that are not finite, and were not applied"
        verdict = run.config.on_divergence, reason
    decided = [verdict]
    if run.ranks.group is not None:
        dist.broadcast_object_list(decided, device=torch.device("cpu"))
    if decided[0]:
        raise Diverged(step, *decided[0])


def refuse_broken_weights(run: Run, step: int) -> None:
    """Before a save: raises Diverged on all ranks where a weight is not finite, so that no checkpoint is one to which none can go back."""
    weights = [piece.of(piece.holder.detach()) for piece in run.optimizer.pieces]
    broken = torch.zeros((), device=run.ranks.device)
    if weights:
        broken += torch.stack(torch._foreach_norm(weights, torch.inf)).isfinite().logical_not().any()
    if run.ranks.group is not None:
        dist.all_reduce(broken, dist.ReduceOp.MAX)
    if broken.item():
        raise Diverged(step, run.config.on_divergence, f"after step {step} a weight is not finite; nothing was saved")


def recover(run: Run, out: Path, log: RunLog, trouble: Diverged) -> int:
    """Goes back to the newest complete checkpoint, past all images met since; returns its step. Every rank must call.

    Raises RuntimeError with the reason where the configuration says stop, max_rollbacks are used up, or there is no checkpoint.
    """
    step, limit = trouble.step, run.config.max_rollbacks
    log.event("diverged", step, reason=str(trouble), policy=trouble.policy)
    if trouble.policy == "stop":
        raise RuntimeError(f"{trouble}; {ADVICE}") from trouble
    if run.rollbacks >= limit:
        raise RuntimeError(f"{trouble}; the run went back max_rollbacks={limit} times and on with other images: {ADVICE}") from trouble
    passed_over, rollbacks, skipped = run.passed_over, run.rollbacks, int(run.skipping.skipped)
    try:
        first = take_back(run, out)
    except ValueError as error:
        raise RuntimeError(f"{trouble}; the run cannot go back: {error}") from trouble
    # the batch that comes next is the one that would have come
    run.passed_over, run.rollbacks, run.skipped_steps = passed_over + step - first, rollbacks + 1, skipped
    log.back_to(first)
    log.event("rollback", first, left_at=step, rollbacks=run.rollbacks)
    log.event("resume", first)
    if run.ranks.is_first:
        say(f"{trouble}; back to step {first}, and on with images not met yet (rollback {run.rollbacks} of {limit})")
    return first
