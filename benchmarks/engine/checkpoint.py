"""How long do a checkpoint and its resumption take, beside writing and reading the same bytes and no more?

python -m benchmarks.engine.checkpoint [parameters=1e9] [repeats=3] [background=true] [folder=FOLDER] [store=true]

One process, fp32 weights and SGD's momentum: 8 bytes a parameter, so that 1e9 take 8 GB of memory and 24 GB of disk while it runs (the
checkpoint, its successor, the raw file), with background=true 16 GB of memory. Raw is a plain file of the same tensors from the same
memory, with the same fsync; read, it is neither summed nor looked at. Before each reading the system is told to forget the files, so
that the disk is read and not its cache. Programs take turns in one process.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks import measure
from fuseer.engine import checkpoint
from fuseer.engine.config import OptimConfig
from fuseer.engine.distributed import Ranks
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import layout
from fuseer.engine.tensor_file import CHUNK

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
OPTIONS = {"parameters": "1e9", "repeats": "3", "background": "true", "folder": "", "store": "true"}
# elements of a tensor; the largest of RegNetY-256GF, 10444 · 10444, has 1.6 times as many
LARGEST = 2**26


class Weights(nn.Module):
    """So many fp32 parameters, in tensors of at most LARGEST."""

    sharded: dict[str, int] = {}

    def __init__(self, count: int):
        super().__init__()
        sizes = [LARGEST] * (count // LARGEST) + [count % LARGEST] * bool(count % LARGEST)
        self.layers = nn.ParameterList(nn.Parameter(torch.empty(size).uniform_(-1, 1)) for size in sizes)

    def counters(self) -> dict[str, int]:
        return {}

    def load_counters(self, counters: dict[str, int], same_world: bool) -> None:
        pass


class Bench:
    """The programs, each of which returns its seconds, over one model and one folder."""

    def __init__(self, count: int, folder: Path):
        self.method = Weights(count)
        self.optimizer = build_optimizer(self.method, OptimConfig(name="sgd", lr=0.1))
        self.optimizer.bind(layout(self.method, None), None, partitioned=False)
        self.folder, self.raw, self.step = folder / "ckpt", folder / "raw", 0
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        self.tensors = [tensor.detach() for tensor in (*self.method.parameters(), *momenta)]
        self.bytes = measure.read_bytes(self.tensors)

    def raw_write(self) -> float:
        began = time.perf_counter()
        with self.raw.open("wb", buffering=0) as file:
            for tensor in self.tensors:
                data = tensor.view(torch.uint8).numpy().data
                for begin in range(0, len(data), CHUNK):
                    file.write(data[begin : begin + CHUNK])
            os.fsync(file.fileno())
        return time.perf_counter() - began

    def raw_read(self) -> float:
        forget([self.raw])
        began, offset = time.perf_counter(), 0
        with self.raw.open("rb", buffering=0) as file:
            for tensor in self.tensors:
                data = tensor.view(torch.uint8).numpy().data
                for begin in range(0, len(data), CHUNK):
                    offset += file.readinto(data[begin : begin + CHUNK])
        assert offset == self.bytes
        return time.perf_counter() - began

    def save(self) -> float:
        began = time.perf_counter()
        self._save(checkpoint.Writer(ALONE))
        return time.perf_counter() - began

    def background(self) -> tuple[float, float]:
        """Seconds for which training is held up, and until the checkpoint is complete."""
        writer, began = checkpoint.Writer(ALONE, background=True), time.perf_counter()
        self._save(writer)
        held = time.perf_counter() - began
        writer.finish()
        return held, writer.seconds

    def _save(self, writer: checkpoint.Writer) -> None:
        self.step += 1
        writer.save(self.folder, self.step, method=self.method, optimizer=self.optimizer, meta={}, keep=1)

    def resume(self) -> float:
        """Checksums and loading, as resume=true does."""
        place = checkpoint.latest(self.folder)
        forget(place.iterdir())
        began = time.perf_counter()
        sound = checkpoint.newest_sound(self.folder, ALONE)
        checkpoint.load(sound, method=self.method, optimizer=self.optimizer, ranks=ALONE, checked=True)
        return time.perf_counter() - began


def forget(paths) -> None:
    """Has the system read the files from the disk next time, where it lets itself be told."""
    for path in paths if hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(bench: Bench, repeats: int, with_background: bool) -> dict[str, list[float]]:
    """{program: seconds of every turn}."""
    found: dict[str, list[float]] = {}
    for turn in range(repeats):
        # who writes first meets an emptier queue of the disk
        writers = [("raw write", bench.raw_write), ("save", bench.save)]
        for name, program in writers if turn % 2 == 0 else writers[::-1]:
            found.setdefault(name, []).append(program())
        if with_background:
            held, complete = bench.background()
            found.setdefault("save in the background, held up", []).append(held)
            found.setdefault("save in the background, complete", []).append(complete)
        readers = [("raw read", bench.raw_read), ("resume", bench.resume)]
        for name, program in readers if turn % 2 == 0 else readers[::-1]:
            found.setdefault(name, []).append(program())
    return found


def rows(bench: Bench, seconds: dict[str, list[float]], machine: dict) -> list[dict]:
    """One result per program; `ratio` over the raw program that moves the same bytes the same way."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    count = sum(p.numel() for p in bench.method.parameters())
    return [
        {
            "op": "checkpoint",
            "case": f"{count / 1e9:g} B parameters",
            "program": name,
            "seconds": float(f"{median:.4g}"),
            "fastest": float(f"{min(seconds[name]):.4g}"),
            "slowest": float(f"{max(seconds[name]):.4g}"),
            "bytes": bench.bytes,
            "gb_s": float(f"{bench.bytes / median / 1e9:.3g}"),
            "ratio": float(f"{median / medians['raw read' if name in ('raw read', 'resume') else 'raw write']:.3g}"),
            "repeats": len(seconds[name]),
            **machine,
        }
        for name, median in medians.items()
    ]


def table(found: list[dict]) -> str:
    """The results as docs/benchmarks.md has them."""
    lines = ["| of 8 bytes a parameter | program | seconds (fastest, slowest) | GB/s | over raw |", "|---|---|---|---|---|"]
    for row in found:
        times = f"{row['seconds']:.3g} ({row['fastest']:.3g}, {row['slowest']:.3g})"
        lines.append(f"| {row['case']}, {row['bytes'] / 1e9:.3g} GB | {row['program']} | {times} | {row['gb_s']:g} | {row['ratio']:.2f} |")
    return "\n".join(lines) if found else ""


def main(words: list[str]) -> None:
    options = measure.options("checkpoint", OPTIONS, words)
    count, with_background = int(float(options["parameters"])), options["background"] == "true"
    why = measure.too_large(8 * count * (2 if with_background else 1), "cpu")
    if why:
        raise SystemExit(f"checkpoint: {why}; give fewer parameters or background=false")
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=options["folder"] or None))
    try:
        free = shutil.disk_usage(folder).free
        if free < 3.2 * 8 * count:
            raise SystemExit(f"checkpoint: needs {25.6e-9 * count:.3g} GB of disk, {folder} has {free / 1e9:.3g}; give another folder=")
        bench = Bench(count, folder)
        found = rows(bench, measured(bench, int(options["repeats"]), with_background), measure.header())
    finally:
        shutil.rmtree(folder)
    measure.say(table(found))
    if options["store"] == "true":
        measure.store("checkpoint", found)


if __name__ == "__main__":
    measure.settle_threads()
    main(sys.argv[1:])
