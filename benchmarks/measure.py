"""How long does it take, how much memory does it use, and how far from the floor is that?"""

import ctypes
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fuseer.kernels import extension

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# What results depend on: a change elsewhere, as in the results themselves, does not make a commit "dirty".
SOURCES = ("kernels", "csrc", "engine", "setup.py", "benchmarks/*.py", "benchmarks/kernels", "benchmarks/engine")
# A spinning idle thread takes a core from the other program of a pair; one that sleeps at once pays a wake-up per operator.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "100000"}
MAX_SPREAD, ATTEMPTS = 2.0, 3
# Instructions of a float32 exponential: 2 to reduce the range, 5 for the polynomial, 1 to scale by the power of two.
MULTIPLY_ADDS_PER_EXP = 8
VIEWS = (
    "alias as_strided contiguous detach detach_ diagonal empty empty_like empty_strided expand expand_as lift_fresh narrow new_empty",
    "permute reshape resolve_conj resolve_neg result_type select slice split squeeze t to transpose unbind unfold unsqueeze view view_as",
    "_unsafe_view",
)
MOVE_NOTHING = {f"aten::{name}" for line in VIEWS for name in line.split()}


def settle_threads():
    """Start this process anew where OpenMP was not told how to wait: it reads that once, when torch loads."""
    if any(os.environ.get(name) != value for name, value in WAITING.items()):
        os.environ.update(WAITING)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Rejected(RuntimeError):
    """A run that the machine disturbed too much to be believed."""


@dataclass(frozen=True)
class Timing:
    """Seconds of every call of every program, taken in turns; the spread is that of the control loop between them."""

    seconds: dict[str, list[float]]
    spread: float
    attempts: int


@dataclass(frozen=True)
class Work:
    """What no implementation avoids: bytes read and written, exponentials, multiply-adds; apart, those of products of bfloat16 matrices."""

    bytes: int
    exponentials: int
    multiply_adds: int
    half_products: int = 0


def read_bytes(tensors):
    """Bytes of a list of tensors."""
    return sum(x.numel() * x.element_size() for x in tensors)


def timed(programs, control, *, repeats, seconds_of, attempts=ATTEMPTS):
    """The Timing of `repeats` calls of each program in turns, the control loop before, between and after the rounds.

    A run in which p90/p10 of the control exceeds MAX_SPREAD is thrown away and repeated; after `attempts` of them: Rejected.
    """
    names, spreads = list(programs), []
    for attempt in range(1, attempts + 1):
        seconds, controls = {name: [] for name in names}, [seconds_of(control)]
        for turn in range(repeats):
            # every program comes first in some round, and follows another one in the next
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(seconds_of(programs[name]))
            controls.append(seconds_of(control))
        spreads.append(spread(controls))
        if spreads[-1] <= MAX_SPREAD:
            return Timing(seconds, spreads[-1], attempt)
    told = ", ".join(f"{value:.1f}" for value in spreads)
    raise Rejected(f"the control loop's p90/p10 was {told} in {attempts} runs, above {MAX_SPREAD:g}: the machine is busy")


def spread(seconds):
    """p90/p10."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return tenths[8] / tenths[0]


def repeats_for(programs, seconds_of, *, warmup=3, budget=20.0, fewest=7, most=101):
    """Warms every program up; then as many rounds as fit into `budget` seconds, within fewest … most."""
    last = {}
    for name, program in programs.items():
        for _ in range(warmup):
            last[name] = seconds_of(program)
    return max(fewest, min(most, int(budget / sum(last.values()))))


def stopwatch(device):
    """seconds_of(program): wall clock on the CPU; on a GPU events around the call, the cache emptied before it."""
    if device == "cpu":

        def seconds_of(program):
            start = time.perf_counter()
            program()
            return time.perf_counter() - start

        return seconds_of
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)

    def seconds_of(program):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        program()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    return seconds_of


def control_loop(device):
    """The same arithmetic in cache and the same copy through memory, whatever is being measured."""
    small, out = torch.linspace(-3, 3, 2**18, device=device), torch.empty(2**18, device=device)
    large = torch.ones(2**22, device=device)
    target = torch.zeros_like(large)

    def program():
        for _ in range(4):
            torch.exp(small, out=out)
        target.copy_(large)

    return program


def copy_program(moved, device):
    """A copy that moves `moved` bytes, half read and half written: the floor under an op that must move as many."""
    source = torch.ones(max(1, moved // 8), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def rates(device):
    """Billions a second on this machine, best of several: bytes copied, multiply-adds of a matrix product (on a GPU in TF32, and of one in
    bfloat16), on the CPU exponentials in cache."""
    seconds_of = stopwatch(device)

    def best(program, repeats=25):
        return min(seconds_of(program) for _ in range(repeats))

    found = {"copy_gb_s": round(2**29 / best(copy_program(2**29, device)) / 1e9, 1)}
    size = 1024 if device == "cpu" else 8192
    a, c = torch.rand(size, size, device=device), torch.empty(size, size, device=device)
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    for name, dtype in (("fma_g_s", torch.float32), ("bf16_fma_g_s", torch.bfloat16)):
        a, c = a.to(dtype), c.to(dtype)
        found[name] = round(size**3 / best(functools.partial(torch.mm, a, a, out=c)) / 1e9, 1)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    if device == "cpu":
        x, y = torch.linspace(-3, 3, 2**17), torch.empty(2**17)
        found["exp_g_s"] = round(2**17 / best(lambda: torch.exp(x, out=y), 50) / 1e9, 2)
    return found


def arithmetic_seconds(work, found):
    """The multiply-adds of the work at the measured rate, an exponential counted as eight; None where no rate was measured."""
    if "fma_g_s" not in found:
        return None
    plain = (work.multiply_adds + MULTIPLY_ADDS_PER_EXP * work.exponentials) / found["fma_g_s"]
    return (plain + work.half_products / found.get("bf16_fma_g_s", found["fma_g_s"])) / 1e9


def extra_memory(program, device):
    """Peak bytes above what was held before the call, results included; None where the system does not tell.

    On a GPU from the allocator. On Linux the growth of the process itself, so that scratch memory of C++ counts too: every block of
    64 KiB or more is given back when freed, which slows programs down; nothing is timed afterwards in this process.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        program()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    libc = ctypes.CDLL(None)
    mmap_threshold = -3
    libc.mallopt(mmap_threshold, 2**16)
    program()
    found = []
    for _ in range(3):
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_resident()
        program()
        found.append(_peak_resident() - before)
    return min(found)


def too_large(needed, device):
    """Why a program that takes `needed` bytes is not started here, where it would be killed, in words; None where it fits, or nobody tells.

    A fifth of the free memory is left to what the estimate forgets and to the other processes.
    """
    free = _free_memory(device)
    if free is None or needed <= 0.8 * free:
        return None
    return f"needs {needed / 1e9:.2g} GB, {free / 1e9:.2g} GB are free"


def _free_memory(device):
    """Bytes that a program may still take: of the GPU, else what Linux calls available, and no more than the control group allows."""
    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    listing = Path("/proc/meminfo")
    if not listing.is_file():
        return None
    free = next(1024 * int(line.split()[1]) for line in listing.read_text().splitlines() if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _peak_resident():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status holds no VmHWM")


def operations(program, device):
    """Kernels started on a GPU; on the CPU operators that touch data. Views and allocations are not counted, fuseer's own ops are."""
    # the profiler's library reports each start and stop on stderr otherwise
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if device == "cpu":
        with torch.autograd.profiler.profile(use_kineto=False) as profiler:
            program()
        return sum(_works(event) for event in profiler.function_events)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        program()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def _works(event):
    if event.name.startswith("fuseer::"):
        return True
    # a matrix product does its own work, and only looks at its operands by this operator
    inner = any(child.name.startswith(("aten::", "fuseer::")) and child.name != "aten::resolve_conj" for child in event.cpu_children)
    return event.name.startswith("aten::") and not inner and event.name not in MOVE_NOTHING


def header(device="cpu"):
    """The machine, the versions, the commit and the moment that every result line carries."""
    info = extension.load().build_info() if extension.load() else {}
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") or "none",
        "dirty": bool(_git("status", "--porcelain", "--", *SOURCES)),
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "instruction_set": info.get("cpu_capability", "no extension"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "lightly")},
    }


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _git(*words):
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def processor():
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def quantiles(seconds):
    """p20, p50, p80 in milliseconds."""
    fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds * 4
    found = {"p20_ms": fifths[0], "p50_ms": statistics.median(seconds), "p80_ms": fifths[3]}
    return {name: float(f"{1e3 * value:.4g}") for name, value in found.items()}


def rows(op, case, timing, *, kinds, work, machine):
    """One result per program: times, `speedup` over the fastest eager or compiled program, and the share of the floor it reaches.

    kinds: {program: "eager", "compile", "third party", "ours", "bound" or "floor"}; the floor's program is a copy of the bytes that must
    move, and the bound is that copy or, where longer, the arithmetic. A program of kind "bound" is a part of the work that nobody
    avoids; `against` has the time of each other program over this one's, so against["two_gemms"] is the share of that bound reached.
    """
    medians = {name: statistics.median(seconds) for name, seconds in timing.seconds.items()}
    baseline = min((medians[name] for name in medians if kinds[name] in ("eager", "compile")), default=None)
    copied = medians[next(name for name in medians if kinds[name] == "floor")]
    arithmetic = arithmetic_seconds(work, machine) or 0.0
    floor, bound = max((copied, "memory"), (arithmetic, "arithmetic"))
    shared = {
        "floor_ms": float(f"{1e3 * floor:.4g}"),
        "bound": bound,
        "copy_ms": float(f"{1e3 * copied:.4g}"),
        "arithmetic_ms": float(f"{1e3 * arithmetic:.4g}"),
        "floor_bytes": work.bytes,
        "floor_exponentials": work.exponentials,
        "control_spread": round(timing.spread, 2),
        "attempts": timing.attempts,
        "repeats": len(next(iter(timing.seconds.values()))),
    }
    return [
        {
            "op": op,
            **case,
            "program": name,
            "kind": kinds[name],
            **quantiles(timing.seconds[name]),
            "speedup": None if baseline is None else float(f"{baseline / medians[name]:.3g}"),
            "against": {
                other: float(f"{medians[other] / medians[name]:.3g}") for other in medians if kinds[other] not in (kinds[name], "floor")
            },
            "of_floor": float(f"{floor / medians[name]:.3g}"),
            **shared,
            **machine,
        }
        for name in medians
        if kinds[name] != "floor"
    ]


def missing(op, case, name, kind, why, machine):
    """The result of a program that was not run, and why."""
    times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "speedup", "of_floor", "operations", "extra_mb"))
    return {"op": op, **case, "program": name, "kind": kind, "not_run": why, **times, "preferred": False, **machine}


def options(program, defaults, words):
    """`defaults` with every key=value of `words` in place. Raises ValueError that names `program` and what it takes."""
    given = dict(defaults)
    for word in words:
        key, _, value = word.partition("=")
        if key not in defaults or not value:
            raise ValueError(f"{program}: give {' '.join(f'{name}={default}' for name, default in defaults.items())}; got {word}")
        given[key] = value
    return given


def store(name, found, place=("op", "case", "device", "threads"), folder=None):
    """Put the rows into results/<name>.jsonl instead of those that agree with one of them in all of `place`; git keeps the history."""
    path = (folder or RESULTS) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {tuple(row[key] for key in place) for row in found}
    kept = [row for row in load(path) if tuple(row[key] for key in place) not in new]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *found]), encoding="utf-8")


def load(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
