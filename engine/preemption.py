"""Must this run stop before its end, at which step, and is there time to save first?"""

import os
import signal
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from fuseer.engine.distributed import Ranks
from fuseer.engine.log import say

# launchers and batch systems send the first two; the third is what Slurm's --signal=USR1 and many job scripts send
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# "try again": neither the 0 of a run that is complete nor the 143 of one that died of SIGTERM
EXIT_STATUS = os.EX_TEMPFAIL
# one Ctrl-C reaches a rank from the terminal and again from its launcher; a person's second one comes later than this
SAME_REQUEST_SECONDS = 1.0


class Stopped(Exception):
    """All ranks have left the loop at one step because they were asked to; the text says what was saved."""


class Preemption:
    """Turns a signal to any rank into one step at which all ranks leave the loop.

    Use as a context around the loop: inside, SIGTERM, SIGINT and SIGUSR1 only leave a mark, which `agreed` carries to all ranks over a
    gloo group of its own every `check_every_steps` calls, without waiting for the device or for the network: what was sent at one check is
    read at the next, so that a run stops at most 2·check_every_steps steps after the signal. A repeated SIGTERM or SIGUSR1 is the same
    request, for launchers pass on what a rank has already got; a second SIGINT, a second or more after the first, ends the process at once.
    Signals are left alone where this is not the main thread.

    grace_seconds: from a signal until SIGKILL follows; 30 of deepspeed's launcher, torchrun, Slurm's KillWait and Kubernetes; 0 = no limit.
    Every rank must make it and call `agreed` and `leave` alike.
    """

    def __init__(self, ranks: Ranks, *, check_every_steps: int = 1, grace_seconds: float = 30.0):
        self._ranks, self._every, self._grace = ranks, check_every_steps, grace_seconds
        self._group = dist.new_group(backend="gloo") if ranks.world_size > 1 else None
        self._calls, self._in_flight = 0, None
        self._signal, self._asked_at = None, None
        self._handlers = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._mark) for number in SIGNALS}
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None:
            self._arrived()

    def asked(self) -> bool:
        """Whether this very rank was sent a signal; the others may not know yet."""
        return self._asked_at is not None

    def agreed(self) -> bool:
        """Whether to stop here: the same answer on all ranks at the same call."""
        if self._group is None:
            return self.asked()
        self._calls += 1
        if self._calls % self._every:
            return False
        stop = self._arrived()
        flag = torch.tensor(float(self.asked()))
        self._in_flight = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return stop

    def leave(self, step: int, *, saved: int, writer, save: Callable[[], None]) -> None:
        """Ends an agreed stop at `step` on all ranks: calls `save` where the time allows it, and raises `Stopped`.

        saved: step of the newest checkpoint, `step` itself where nothing was done since. writer: `checkpoint.Writer`, which first completes
        what it writes in the background and knows how long the last one took.
        """
        why = signal.Signals(self._signal).name if self._signal else "a signal to another rank"
        stopped = f"stopped after step {step} by {why}"
        writer.finish()
        since = time.monotonic() - self._asked_at if self.asked() else 0.0
        times = torch.tensor([since, writer.seconds or 0.0], dtype=torch.float64)
        if self._group is not None:
            dist.all_reduce(times, dist.ReduceOp.MAX, group=self._group)
        since, needed = times.tolist()
        if saved == step:
            raise Stopped(f"{stopped}; {'that step is saved; go on with resume=true' if step else 'there was nothing to save'}")
        if self._grace and since + needed > self._grace:
            raise Stopped(
                f"{stopped} without saving: the last save took {needed:.1f} s, and of stop_grace_seconds={self._grace:g} only "
                f"{max(0.0, self._grace - since):.1f} s are left; "
                + (f"resume=true goes on from step {saved}" if saved else "no step is kept")
            )
        if self._ranks.is_first:
            say(f"{stopped}: saving")
        save()
        writer.finish()
        raise Stopped(f"{stopped}; saved in {writer.seconds:.1f} s; go on with resume=true")

    def _arrived(self) -> bool:
        """The answer of the check before; the ranks have long exchanged it while the step ran."""
        if self._in_flight is None:
            return False
        (flag, work), self._in_flight = self._in_flight, None
        work.wait()
        return bool(flag)

    def _mark(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._signal, self._asked_at = number, now
        elif number == signal.SIGINT and now - self._asked_at > SAME_REQUEST_SECONDS:
            raise KeyboardInterrupt
