"""What does a person see of a run while it goes, and what is kept of it in the run folder?"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False)


def say(text: str) -> None:
    """One line to the person at the terminal."""
    console.print(text, markup=False, soft_wrap=True)


class RunLog:
    """metrics.jsonl, TensorBoard events and the progress line of one run; silent on every rank but the first.

    Device values become numbers here and nowhere else, so that the only host syncs are at log steps.
    """

    def __init__(self, folder: Path, *, first_rank: bool, start: int, total: int, images_per_step: int):
        self._on = first_rank
        self._images = images_per_step
        self._total = total
        self._started = self._since = time.perf_counter()
        self._first = self._since_step = start
        self._waited = 0.0
        if not first_rank:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = SummaryWriter(str(folder / "events"), purge_step=start or None)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("pretraining", total=total, completed=start, state="")
        if console.is_terminal:
            self._progress.start()

    def waited(self, seconds: float) -> None:
        """Counts time that the loop spent waiting for its next batch."""
        self._waited += seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside (an evaluation, a checkpoint) counts neither as training nor into img/s."""
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self._since += spent
        self._started += spent

    def advance(self, step: int) -> None:
        if self._on:
            self._progress.update(self._task, completed=step)

    def train(self, step: int, epoch: float, lr: float, values: dict[str, torch.Tensor]) -> dict:
        """Writes one train record for the steps since the last; `values` are tensors reduced over ranks, "loss" among them.

        Returns `values` as numbers on the first rank, nothing on the others.
        Raises RuntimeError when the loss is not finite: such a run cannot recover.
        """
        if not self._on:
            return {}
        numbers = {key: value.tolist() for key, value in values.items()}
        now = time.perf_counter()
        spent = now - self._since
        record = {
            "kind": "train",
            "step": step,
            "epoch": round(epoch, 4),
            "lr": lr,
            "images_per_second": round((step - self._since_step) * self._images / spent, 1),
            "data_wait_share": round(self._waited / spent, 4),
            "seconds": round(now - self._started, 2),
            **numbers,
        }
        self._since, self._since_step, self._waited = now, step, 0.0
        self._write(record)
        for key in ("loss", "lr", "images_per_second", "data_wait_share", *numbers):
            if isinstance(record[key], (int, float)):
                self._events.add_scalar(f"train/{key}", record[key], step)
        speed = f"{record['images_per_second']:.0f} img/s  data wait {record['data_wait_share']:.0%}"
        state = f"loss {record['loss']:.4f}  lr {lr:.4g}  {speed}"
        self._progress.update(self._task, completed=step, state=state)
        if not console.is_terminal:
            left = (self._total - step) * (now - self._started) / (step - self._first)
            say(f"step {step}/{self._total}  {state}  left {left:.0f} s")
        if not math.isfinite(record["loss"]):
            raise RuntimeError(f"the loss is {record['loss']} at step {step}; lower optim.lr or lengthen the warm-up, and start anew")
        return numbers

    def event(self, kind: str, step: int, **facts) -> None:
        """Writes a record of any other kind: knn, resume, broken, monitor."""
        if not self._on:
            return
        self._write({"kind": kind, "step": step, **facts})
        if kind == "knn":
            self._events.add_scalar("knn/accuracy", facts["accuracy"], step)

    def close(self) -> None:
        if self._on:
            self._progress.stop()
            self._file.close()
            self._events.close()

    def _write(self, record: dict) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()


class EpochBar:
    """A bar over the steps of an evaluation in a terminal, else one line per epoch."""

    def __init__(self, title: str, epochs: int, steps: int):
        self._epochs = epochs
        self._bar = Progress(*Progress.get_default_columns(), TextColumn("{task.fields[state]}"), console=console)
        self._task = self._bar.add_task(title, total=steps, state="")

    def __enter__(self) -> "EpochBar":
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def counted(self, batches: Iterator) -> Iterator:
        for batch in batches:
            self._bar.advance(self._task)
            yield batch

    def epoch(self, epoch: int, found: dict[str, tuple[float, float]]) -> None:
        """Says (loss, accuracy) by name at the end of an epoch, 1 first."""
        told = [f"{name.partition(',')[0]} {correct:.1%}, loss {loss:.4g}" for name, (loss, correct) in found.items()]
        self._bar.update(self._task, state=told[-1])
        if not console.is_terminal:
            say(f"epoch {epoch}/{self._epochs}  {'  '.join(told)}")
