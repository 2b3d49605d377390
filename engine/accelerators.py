"""What do the makers' data sheets promise of a GPU: memory, and multiplications without sparsity?"""

from pathlib import Path
from typing import NamedTuple

import torch


class Accelerator(NamedTuple):
    """`memory` in bytes; `half` and `full` are the dense peaks in FLOP/s of fp16 (and bf16, where it has that) and of fp32 without TF32.

    `marks` are the words by which torch's name of the device is known. None where a number is not known.
    """

    memory: int
    half: float | None
    full: float | None
    marks: tuple[str, ...] = ()

    def peak(self, precision: str) -> float | None:
        return self.full if precision == "fp32" else self.half


GIB = 2**30
# the first whose marks all stand in torch's name of the device is meant
ACCELERATORS = {
    "h200": Accelerator(140 * GIB, 989e12, 67e12, ("H200",)),
    "h100": Accelerator(79 * GIB, 989e12, 67e12, ("H100", "HBM3")),
    "a100-40": Accelerator(39 * GIB, 312e12, 19.5e12, ("A100", "40GB")),
    "a100": Accelerator(79 * GIB, 312e12, 19.5e12, ("A100",)),
    "v100-16": Accelerator(15 * GIB, 125e12, 15.7e12, ("V100", "16GB")),
    "v100": Accelerator(31 * GIB, 125e12, 15.7e12, ("V100",)),
    "rtx4090": Accelerator(23 * GIB, 165e12, 82.6e12, ("RTX 4090",)),
}


def accelerator(name: str) -> Accelerator:
    """The one called `name`; "cpu" is this machine, with the memory that is free. Raises ValueError for a name that is not known."""
    if name == "cpu":
        return Accelerator(_free_memory(), None, None)
    if name not in ACCELERATORS:
        raise ValueError(f"gpu must be cpu or one of {', '.join(sorted(ACCELERATORS))}; got {name}")
    return ACCELERATORS[name]


def peak_here(precision: str) -> float | None:
    """FLOP/s that the data sheet of this process's GPU promises; None on a processor and for a GPU that is not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((known.peak(precision) for known in ACCELERATORS.values() if all(mark in name for mark in known.marks)), None)


def _free_memory() -> int:
    """Bytes that Linux calls available, and no more than the control group leaves."""
    listing, folder = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if not listing.is_file():
        raise RuntimeError("gpu=cpu asks Linux's /proc/meminfo for the free memory, which this system has not; name a GPU")
    free = next(1024 * int(line.split()[1]) for line in listing.read_text().splitlines() if line.startswith("MemAvailable"))
    limit, used = folder / "memory.max", folder / "memory.current"
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
