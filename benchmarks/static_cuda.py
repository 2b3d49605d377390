"""What did nvcc make of the CUDA C++ kernels, for each architecture in the built library? Told without a GPU.

python benchmarks/static_cuda.py

Reads fuseer.kernels._C_cuda and writes the table in docs/gpu.md.
"""

import re
import sys
from pathlib import Path

import triton

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine_code import instructions, tool
from benchmarks.report import fill
from fuseer.kernels import cuda_library

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu.md"


def kernels(library=cuda_library.PATH):
    """One row for every kernel and architecture: registers, stack, shared memory, and what its instructions are."""
    usage = _by_kernel(tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", library), r"Function (\w+):")
    listing = _by_kernel(tool(triton.knobs.nvidia.cuobjdump.path, "-sass", library), r"Function : (\w+)")
    rows = []
    for (arch, kernel), told in usage.items():
        registers, stack, shared = (int(re.search(rf"\b{word}:(\d+)", told).group(1)) for word in ("REG", "STACK", "SHARED"))
        facts = {"kernel": kernel, "arch": arch, "registers": registers, "stack": stack, "shared": shared}
        rows.append(facts | instructions(listing[arch, kernel]))
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def _by_kernel(text, function):
    """{(architecture, kernel's name without its mangling): what is told of it}."""
    found, arch = {}, None
    parts = re.split(rf"arch = sm_(\d+)|{function}", text)
    for arch_found, name, told in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        arch = arch if arch_found is None else int(arch_found)
        if name is not None:
            found[arch, plain(name)] = told
    return found


def plain(mangled):
    """ema_update of _ZN…10ema_updateE…: the last name before the arguments."""
    names, place = [], re.match(r"_ZN(?:\d+_GLOBAL__N)?", mangled).end()
    while (length := re.match(r"\d+", mangled[place:])) is not None:
        begin = place + length.end()
        place = begin + int(length.group())
        names.append(mangled[begin:place])
    return names[-1]


def table(rows):
    head = ("kernel", "sm", "registers", "stack, B", "spills", "shared, B", "128-bit loads", "128-bit stores", "instructions")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        numbers = [row[name] for name in ("arch", "registers", "stack", "spills", "shared")]
        cells = (f"`{row['kernel']}`", *numbers, row["loads"].get(128, 0), row["stores"].get(128, 0), row["instructions"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if cuda_library.LIBRARY is None:
        sys.exit(cuda_library.REASON)
    text = fill(PAGE.read_text(encoding="utf-8"), "cuda", table(kernels()))
    PAGE.write_text(text, encoding="utf-8")
