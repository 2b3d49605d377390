"""Does a run that is killed again and again end in the very weights of one that never was?

python -m benchmarks.engine.faults [kills=30] [stops=8] [seed=0] [out=FOLDER] [store=true]

Two ranks train a tiny SwAV under ZeRO 1 on images of the demo set, on the CPU. At moments drawn from the seed, one rank drawn from it gets
SIGKILL, or SIGTERM, while it starts, steps or saves; then both are started again with resume=auto, up to the last step. Every repeated
loss and the last checkpoint are compared bitwise with a run without faults. The ranks are forked from a process that has imported
everything, which spares them the seconds that this takes; the deepspeed launcher is in tests/engine/test_launch.py.
"""

import contextlib
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    # forked processes cannot use a CUDA context, and two NCCL ranks no single GPU; read when torch loads
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import deepspeed  # noqa: F401  imported once for all ranks to come
import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import measure
from fuseer.engine import checkpoint, train
from fuseer.engine.cli import main
from fuseer.engine.data import dali  # noqa: F401  as above
from fuseer.engine.data.sources import open_source
from fuseer.engine.methods.swav import SwAV
from fuseer.engine.preemption import EXIT_STATUS

RANKS, EVERY, AHEAD = 2, 4, 7
PHASES = ("start", "step", "save")
PATIENCE_SECONDS = 120.0
SETTINGS = (
    "recipe=tiny_swav",
    "method.hidden_widths=[16]",
    "method.embedding_width=8",
    "method.prototypes=6",
    "method.queue_length=16",
    "model.name=anynet",
    'model.options={"depths": [1], "widths": [16], "group_widths": 8, "stem_width": 8, "stem_stride": 2}',
    "batch_size=8",
    "optim.name=lars",
    "optim.lr=0.5",
    "optim.warmup_steps=2",
    "log_every_steps=1",
    "knn.every_steps=0",
    "precision=fp32",
    "zero_stage=1",
    "data.threads=1",
    f"checkpoint_every_steps={EVERY}",
    "resume=auto",
)


class Failed(RuntimeError):
    """A promise that the run did not keep."""


@dataclass(frozen=True)
class Fault:
    """Which rank gets which signal, in which phase: that of the `ahead`-th step after the start, and how far into it (0…1)."""

    name: str
    rank: int
    phase: str
    ahead: int
    into: float


def drawn(kills: int, stops: int, seed: int) -> list[Fault]:
    """All faults in a random order: of the kills 2 in 5 fall into a save, 2 into a step, 1 into the start; stops into steps and saves."""
    draw = random.Random(seed)
    phases = [("SIGKILL", ("save", "step", "save", "step", "start")[i % 5]) for i in range(kills)]
    phases += [("SIGTERM", ("step", "save")[i % 2]) for i in range(stops)]
    draw.shuffle(phases)
    return [Fault(name, draw.randrange(RANKS), phase, draw.randrange(AHEAD), draw.random()) for name, phase in phases]


class Board:
    """What every rank tells of itself in shared memory: phase, step, last step that was saved, nanoseconds of the last save and step."""

    PHASE, STEP, SAVED, SAVE_NS, STEP_NS = range(5)

    def __init__(self):
        self._cells = np.frombuffer(mmap.mmap(-1, RANKS * 5 * 8), np.int64).reshape(RANKS, 5)

    def clear(self) -> None:
        self._cells[:] = 0

    def told(self, rank: int, what: int) -> int:
        return int(self._cells[rank, what])

    def highest(self, what: int) -> int:
        return int(self._cells[:, what].max())

    def watch(self, rank: int) -> None:
        """In the rank itself: marks where each step and each save of the loop begin."""
        own, save, after_step, began = self._cells[rank], train.save, SwAV.after_step, time.monotonic_ns()

        def told_save(run, out, step):
            before, own[self.PHASE] = time.monotonic_ns(), PHASES.index("save")
            save(run, out, step)
            own[self.SAVED], own[self.SAVE_NS], own[self.PHASE] = step, time.monotonic_ns() - before, PHASES.index("step")

        def told_step(method, step):
            nonlocal began
            after_step(method, step)
            now = time.monotonic_ns()
            own[self.STEP], own[self.STEP_NS], began = step, now - began, now
            own[self.PHASE] = max(own[self.PHASE], PHASES.index("step"))

        train.save, SwAV.after_step = told_save, told_step


def attempt(words: list[str], board: Board, folder: Path) -> list[int]:
    """Process ids of the ranks of one start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    board.clear()
    found = []
    for rank in range(RANKS):
        child = os.fork()
        if not child:
            status = 1
            try:
                log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1), os.dup2(log, 2)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                board.watch(rank)
                status = main(["pretrain", *words])
            finally:
                # a child must never go on as its parent
                if sys.exc_info()[0]:
                    traceback.print_exc()
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(status)
        found.append(child)
    return found


def ended(ranks: list[int], patience: float = PATIENCE_SECONDS) -> dict[int, int]:
    """{rank: exit status, minus the signal where one killed it} once all have ended; those that do not in time are killed, and it is told.

    As a launcher does, sends SIGTERM to the others a second after one has failed.
    """
    found, until, failed = {}, time.monotonic() + patience, None
    while len(found) < len(ranks):
        for rank, process in enumerate(ranks):
            if rank not in found and (done := os.waitpid(process, os.WNOHANG))[0]:
                found[rank] = os.waitstatus_to_exitcode(done[1])
        now = time.monotonic()
        if failed is None and any(found.values()):
            failed = now
        elif failed is not None and now > failed + 1:
            failed = float("inf")
            for rank, process in enumerate(ranks):
                if rank not in found:
                    os.kill(process, signal.SIGTERM)
        if now > until:
            for rank, process in enumerate(ranks):
                if rank not in found:
                    os.kill(process, signal.SIGKILL), os.waitpid(process, 0)
            raise Failed(f"rank {', '.join(str(rank) for rank in range(len(ranks)) if rank not in found)} hung for {patience:g} s")
        time.sleep(0.002)
    return found


def wait_for(fault: Fault, ranks: list[int], board: Board, seconds: dict[str, float], first: int) -> None:
    """Returns at the moment of the fault. Raises Failed where it does not come."""
    rank, began = fault.rank, time.monotonic()

    def reached() -> bool:
        if fault.phase == "start":
            return True
        if fault.phase == "step":
            return board.told(rank, Board.PHASE) > 0 and board.told(rank, Board.STEP) >= first + fault.ahead
        later = board.told(rank, Board.STEP) >= first + EVERY * (1 + fault.ahead % 2)
        return later and PHASES[board.told(rank, Board.PHASE)] == "save"

    for attempts in range(3):
        while not reached():
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise Failed(f"{fault} was not reached in {PATIENCE_SECONDS:g} s")
            if any(os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) for process in ranks):
                raise Failed(f"a rank ended by itself before {fault}")
            time.sleep(0.0005)
        moment = time.monotonic() + fault.into * seconds[fault.phase] / 2**attempts
        while time.monotonic() < moment and PHASES[board.told(rank, Board.PHASE)] == fault.phase:
            time.sleep(0.0002)
        # a save, or a start, may take less time than the one that was measured: then the next save
        if fault.phase == "start" or PHASES[board.told(rank, Board.PHASE)] == fault.phase:
            return


def suffer(number: int, fault: Fault, words: list[str], board: Board, place: tuple[Path, Path], seconds: dict[str, float]) -> dict:
    """One start, one fault, and what was left: a row of the table. Raises Failed where more was lost than may be."""
    folder, out = place
    first, logs = newest(out), [folder / f"rank{rank}.log" for rank in range(RANKS)]
    said = [log.stat().st_size for log in logs]
    ranks = attempt(words, board, folder)
    try:
        wait_for(fault, ranks, board, seconds, first)
        phase, now = PHASES[board.told(fault.rank, Board.PHASE)], time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[fault.rank], getattr(signal, fault.name))
        statuses = ended(ranks)
    except BaseException:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL), os.waitpid(process, 0)
        raise
    took, kept, step = time.monotonic() - now, newest(out), max(board.highest(Board.STEP), first)
    survivor, words = statuses[1 - fault.rank], logs[1 - fault.rank].read_bytes()[said[1 - fault.rank] :]
    if kept < board.highest(Board.SAVED):
        raise Failed(f"fault {number}: step {board.highest(Board.SAVED)} was saved, and {kept} is the newest complete checkpoint")
    if fault.name == "SIGKILL" and not (statuses[fault.rank] == -signal.SIGKILL and survivor not in (0, EXIT_STATUS)):
        raise Failed(f"fault {number}: a rank was killed and the ranks ended with {statuses}")
    if fault.name == "SIGKILL" and phase != "start" and b"lost another rank and ends" not in words:
        raise Failed(f"fault {number}: the other rank did not say why it ended: {words[-300:]!r}")
    if fault.name == "SIGTERM" and set(statuses.values()) != {EXIT_STATUS}:
        raise Failed(f"fault {number}: SIGTERM to rank {fault.rank} ended the ranks with {statuses}, not all with {EXIT_STATUS}")
    lost = max(0, step - kept)
    if lost > (EVERY if fault.name == "SIGKILL" else 0):
        raise Failed(f"fault {number}: {lost} steps were lost, and a checkpoint is written every {EVERY}")
    row = {"op": "faults", "case": fault.name, "rank": fault.rank, "phase": phase, "step": step, "resumed": kept, "lost": lost}
    return row | {"number": number, "others_ended_s": round(took, 2)}


def newest(out: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    found = checkpoint.complete(out / "ckpt") if (out / "ckpt").is_dir() else []
    return checkpoint.read_meta(found[-1])["step"] if found else 0


def to_the_end(words: list[str], board: Board, folder: Path) -> None:
    statuses = ended(attempt(words, board, folder), patience=10 * PATIENCE_SECONDS)
    if set(statuses.values()) != {0}:
        raise Failed(f"a run without faults ended with {statuses}; its words are in {folder}")


def losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of every train record, repeated steps included."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records if record["kind"] == "train"]


def differences(ours: Path, theirs: Path) -> list[str]:
    """What is not bitwise equal in two run folders: losses of any repetition of any step, tensors of the last checkpoints."""
    expected = dict(losses(theirs))
    found = [f"loss of step {step}" for step, loss in losses(ours) if expected[step] != loss]
    if {step for step, _ in losses(ours)} != expected.keys():
        found.append("steps without a record")
    last = [checkpoint.latest(out / "ckpt") for out in (ours, theirs)]
    files = [{path.name: load_file(path) for path in place.glob("*.safetensors")} for place in last]
    if last[0].name != last[1].name or files[0].keys() != files[1].keys():
        return [*found, f"{last[0]} holds other files than {last[1]}"]
    for name, tensors in files[0].items():
        there = files[1][name]
        if tensors.keys() != there.keys():
            found.append(f"names in {name}")
        bits = {key: (tensors[key].numpy().tobytes(), there[key].numpy().tobytes()) for key in tensors.keys() & there.keys()}
        found += [f"{key} in {name}" for key, (own, other) in bits.items() if own != other]
    return found


def photographs(folder: Path) -> Path:
    """59 images of the demo set, flat: seven steps an epoch."""
    folder.mkdir()
    for number, path in enumerate(open_source("demo", split="train").paths[:59]):
        shutil.copy(path, folder / f"{number:02d}.png")
    return folder


def campaign(kills: int, stops: int, seed: int, folder: Path) -> tuple[list[dict], dict]:
    """(a row per fault, the facts of the whole). Raises Failed."""
    board, faults, before = Board(), drawn(kills, stops, seed), leaked()
    # up to two checkpoints, and another two where saves were missed, before each fault
    steps = 4 * EVERY * (len(faults) + 1)
    words = [*SETTINGS, f"data={photographs(folder / 'images')}", f"steps={steps}"]
    clean, out, began = folder / "clean", folder / "run", time.monotonic()
    to_the_end([*words, f"out={clean}"], board, folder)
    whole = time.monotonic() - began
    seconds = {"save": 1e-9 * board.highest(Board.SAVE_NS), "step": 1e-9 * board.highest(Board.STEP_NS)}
    # of the first start, which is the slowest, the first half
    seconds["start"] = max(0.25, (whole - steps * seconds["step"] - steps / EVERY * seconds["save"]) / 2)
    measure.say(f"without faults: {steps} steps, {whole:.0f} s; start {2 * seconds['start']:.1f} s, step and save {seconds['step']:.3f} s")
    found = []
    for number, fault in enumerate(faults, 1):
        row = suffer(number, fault, [*words, f"out={out}"], board, (folder, out), seconds)
        measure.say(f"{number:3d} {row['case']} rank {row['rank']} in {row['phase']:<5} at step {row['step']:4d}, lost {row['lost']}")
        found.append(row)
    to_the_end([*words, f"out={out}"], board, folder)
    unequal = differences(out, clean)
    if unequal:
        raise Failed(f"not bitwise the run without faults: {', '.join(unequal[:5])} and so on, {len(unequal)} in all")
    strays = [path.name for path in (out / "ckpt").iterdir() if path not in checkpoint.complete(out / "ckpt") and path.name != "latest"]
    if leaked() - before or strays:
        raise Failed(f"left behind: {sorted(leaked() - before)} {strays}")
    repeated = len(losses(out)) - len(dict(losses(out)))
    spent = round(time.monotonic() - began)
    return found, {"seed": seed, "steps": steps, "every": EVERY, "steps_repeated": repeated, "seconds": spent}


def leaked() -> set[str]:
    """Files in /dev/shm that no process has mapped: they take memory until the machine starts anew."""
    mapped = []
    for process in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped.append(process.read_text())
    return {str(path) for path in Path("/dev/shm").glob("*") if not any(str(path) in maps for maps in mapped)}


def run(words: list[str]) -> None:
    options = {"kills": "30", "stops": "8", "seed": "0", "out": "", "store": "true"}
    for word in words:
        name, _, value = word.partition("=")
        if name not in options or not value or (name in ("kills", "stops", "seed") and not value.isdecimal()):
            raise ValueError(f"faults: give {', '.join(f'{name}=…' for name in options)}; got {word}")
        options[name] = value
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = Path(options["out"] or stack.enter_context(tempfile.TemporaryDirectory(prefix="fuseer-faults-"))).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        rows, facts = campaign(int(options["kills"]), int(options["stops"]), int(options["seed"]), folder)
    again = f"{facts['steps_repeated']} of {facts['steps']} steps were done again"
    measure.say(f"bitwise equal after {len(rows)} faults: {again}; {facts['seconds']} s")
    if options["store"] == "true":
        machine = measure.header()
        measure.store("faults", [{**row, **facts, **machine} for row in rows])


if __name__ == "__main__":
    run(sys.argv[1:])
