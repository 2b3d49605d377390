"""How long does it take, on which machine, and how far from the floor is that?"""

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from fuseer.kernels import extension

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(programs, *, repeats=9, warmup=2, device="cpu"):
    """{name: seconds of each of `repeats` calls}; the programs take turns, so that a busy machine is busy for all of them."""
    for program in programs.values():
        for _ in range(warmup):
            program()
    seconds = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            seconds[name].append(_seconds(program, device))
    return seconds


def _seconds(program, device):
    if device != "cpu":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    program()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def copy_bandwidth(megabytes=256, device="cpu"):
    """Bytes per second that a large copy reads and writes: the floor under every op that is limited by memory."""
    source = torch.empty(megabytes * 2**18, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, repeats=5, device=device)["copy"]
    return 2 * source.numel() * 4 / min(seconds)


def header(device="cpu"):
    """The machine, the versions and the commit that every result line carries."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    info = extension.load().build_info() if extension.load() else {}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "none",
        "device": _processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "instruction_set": info.get("cpu_capability", "no extension"),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor():
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def rows(op, case, seconds, *, baseline, floor_s, machine):
    """One result per program: p20, p50, p80 in milliseconds, speed-up over `baseline`, and floor_s (bytes / copy bandwidth) over p50."""
    found = []
    for name, times in seconds.items():
        fifths = statistics.quantiles(times, n=5)
        p20, p50, p80 = (1e3 * q for q in (fifths[0], statistics.median(times), fifths[3]))
        found.append(
            {
                "op": op,
                "case": case,
                "program": name,
                "p20_ms": round(p20, 4),
                "p50_ms": round(p50, 4),
                "p80_ms": round(p80, 4),
                "speedup": round(statistics.median(seconds[baseline]) / statistics.median(times), 2),
                "of_floor": round(floor_s / statistics.median(times), 3),
                **machine,
            }
        )
    return found


def write(name, found):
    """Append the rows to results/<name>.jsonl and show them."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as lines:
        for row in found:
            lines.write(json.dumps(row) + "\n")
    for row in found:
        sys.stdout.write(
            f"{row['op']} {row['case']:14} {row['program']:10} p50 {row['p50_ms']:9.3f} ms"
            f"  p20 {row['p20_ms']:9.3f}  p80 {row['p80_ms']:9.3f}"
            f"  x{row['speedup']:<6} {100 * row['of_floor']:.1f} % of the copy floor\n"
        )
