"""What does a person see of a run while it goes, and what is kept of it in the run folder?"""

import json
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False)


def say(text: str) -> None:
    """One line to the person at the terminal."""
    console.print(text, markup=False, soft_wrap=True)


def show(parts: Iterable) -> None:
    """Tables and sentences, one below the other."""
    for part in parts:
        console.print(part, markup=False)
        console.print()


def _appended(path: Path) -> TextIO:
    """The file, to write whole lines after those that are whole: a killed process may have left half a line at its end."""
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    return path.open("a", encoding="utf-8")


class Laps:
    """Seconds that the parts of a step take, without a sync: on a GPU those between events in its stream, whatever the host does."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple] = []

    def begin(self) -> None:
        self._at = self._now()

    def end(self, part: str) -> None:
        """What went on since the last `begin` or `end` was `part`."""
        now = self._now()
        self._spans.append((part, self._at, now))
        self._at = now

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last reading; on a GPU to be asked once the device has been waited for."""
        seconds: dict[str, float] = {}
        for part, since, until in self._spans:
            seconds[part] = seconds.get(part, 0.0) + (since.elapsed_time(until) / 1e3 if self._cuda else until - since)
        self._spans.clear()
        return seconds

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def peak_memory(device: torch.device) -> int | None:
    """The most bytes so far: of tensors on a GPU, of the process on Linux, elsewhere unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    listing = Path("/proc/self/status")
    lines = listing.read_text().splitlines() if listing.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)


class RunLog:
    """metrics.jsonl, TensorBoard events and the progress line of one run; silent on every rank but the first.

    Device values become numbers here and nowhere else, so that the only host syncs are at log steps. `mfu_of_an_image` is the share of all
    GPUs' peak that one image a second takes; None where no peak is known.
    """

    def __init__(
        self,
        folder: Path,
        *,
        first_rank: bool,
        start: int,
        total: int,
        images_per_step: int,
        device: torch.device | None = None,
        crops_per_image: int = 1,
        mfu_of_an_image: float | None = None,
    ):
        self._on = first_rank
        self._device, self._crops, self._mfu = device or torch.device("cpu"), crops_per_image, mfu_of_an_image
        self._laps = Laps(self._device)
        self._images = images_per_step
        self._total = total
        self._started = self._since = time.perf_counter()
        self._first = self._since_step = start
        self._waited = 0.0
        if not first_rank:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._file = _appended(folder / "metrics.jsonl")
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

    def awaited(self, batches: Iterator):
        """The next batch, the time until it comes being counted as waiting; a step begins."""
        asked = time.perf_counter()
        if self._on:
            self._laps.begin()
        batch = next(batches)
        self._waited += time.perf_counter() - asked
        self.end("data")
        return batch

    def end(self, part: str) -> None:
        """The part of a step that is called `part` ends, and the next begins."""
        if self._on:
            self._laps.end(part)

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

        Returns `values` as numbers on the first rank, nothing on the others. A step whose loss is not finite was skipped, and gets a
        record `skipped` of what counts such steps instead.
        """
        if not self._on:
            return {}
        numbers = {key: value.tolist() for key, value in values.items()}
        if not math.isfinite(numbers["loss"]):
            self.event("skipped", step, **{key: number for key, number in numbers.items() if key.startswith("skipped")})
            say(f"step {step}: its loss is not finite, so it was not applied; {numbers['skipped']} such so far, see docs/symptoms.md")
            return numbers
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
            **self._rates(step, spent),
            **numbers,
        }
        self._since, self._since_step, self._waited = now, step, 0.0
        self._write(record)
        apart = {f"step_seconds/{part}": seconds for part, seconds in record["step_seconds"].items()}
        for key, value in {**record, **apart}.items():
            if isinstance(value, (int, float)) and key not in ("step", "epoch", "seconds"):
                self._events.add_scalar(f"train/{key}", value, step)
        speed = f"{record['images_per_second']:.0f} img/s  data wait {record['data_wait_share']:.0%}"
        speed += f"  mfu {record['mfu']:.1%}" if "mfu" in record else ""
        state = f"loss {record['loss']:.4f}  lr {lr:.4g}  {speed}"
        self._progress.update(self._task, completed=step, state=state)
        if not console.is_terminal:
            left = (self._total - step) * (now - self._started) / (step - self._first)
            say(f"step {step}/{self._total}  {state}  left {left:.0f} s")
        return numbers

    def _rates(self, step: int, spent: float) -> dict:
        """Of the steps since the last record: crops a second, share of the peak, memory, and the seconds of a step's parts."""
        steps, memory = step - self._since_step, peak_memory(self._device)
        images = steps * self._images / spent
        return {
            "crops_per_second": round(images * self._crops, 1),
            **({} if self._mfu is None else {"mfu": round(images * self._mfu, 4)}),
            **({} if memory is None else {"peak_memory_gib": round(memory / 2**30, 3)}),
            "step_seconds": {part: round(seconds / steps, 6) for part, seconds in self._laps.read().items()},
        }

    def event(self, kind: str, step: int, **facts) -> None:
        """Writes a record of any other kind: knn, resume, broken, monitor."""
        if not self._on:
            return
        self._write({"kind": kind, "step": step, **facts})
        if kind == "knn":
            self._events.add_scalar("knn/accuracy", facts["accuracy"], step)

    def back_to(self, step: int) -> None:
        """Counts from an earlier step on again."""
        self._since, self._since_step, self._first, self._waited = time.perf_counter(), step, min(self._first, step), 0.0
        self.advance(step)

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
