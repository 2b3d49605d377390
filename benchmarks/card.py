"""What did `fuseer bench device=cuda` print on a card, in a table of docs/gpu.md? python -m benchmarks.card fills it.

For runs on lent cards of which only the printed lines came back: benchmarks/results/h100.txt and h100_tiles.txt.
"""

import re
import sys
from pathlib import Path

from benchmarks.measure import RESULTS, ROOT
from benchmarks.report import fill

LINE = re.compile(r"(\S+) (\S+) (.+) p50 ([\d.]+) p20 [\d.]+ p80 [\d.]+ ms ×\S+ ([\d.]+)% of the (\w+) floor")
OURS, EAGER, COMPILED = ("triton", "cuda"), ("official", "foreach_lerp", "foreach_mul_add"), ("compile", "reduce-overhead")


def printed(path: Path) -> dict[tuple, dict[str, tuple]]:
    """{(op, case): {program: (ms, share of the floor, what bounds)}}."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := LINE.fullmatch(line):
            op, case, program, ms, share, bound = match.groups()
            found.setdefault((op, case), {})[program] = (float(ms), float(share), bound)
    return found


def fastest(programs: dict[str, tuple], names: tuple) -> tuple | None:
    """(ms, program) of the fastest of those names, called one by one or as a graph."""
    return min(((ms, name) for name, (ms, *_) in programs.items() if name.removesuffix(" graph") in names), default=None)


def table(root: Path = ROOT) -> str:
    """One line per case, eager's programs and ours as CUDA graphs where they can be, compiled ones as calls."""
    lines = ["| op | case | ours | eager | torch.compile | third party | speed-up | of the floor |", "|---" * 8 + "|"]
    for (op, case), programs in printed(root / "benchmarks" / "results" / "h100.txt").items():
        ours, eager, compiled = (fastest(programs, names) for names in (OURS, EAGER, COMPILED))
        third = fastest(programs, ("lightly",))
        cells = ["–" if one is None else f"{one[0]:.3g} ({one[1]})" for one in (ours, eager, compiled, third)]
        speedup = min(one[0] for one in (eager, compiled) if one) / ours[0]
        _, share, bound = programs[ours[1]]
        lines.append(f"| `{op}` | {case} | {' | '.join(cells)} | **{speedup:.2g}×** | {share:.0f}%, {bound} |")
    return "\n".join(lines)


def tiles(root: Path = ROOT) -> str:
    """Of each case the five fastest tiles that multiply as exactly as float32, and what there was before."""
    found = {}
    for line in (root / "benchmarks" / "results" / "h100_tiles.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            case, precision, tile, ms = line.split()
            found.setdefault(case, {}).setdefault((tile, precision), []).append(float(ms))
    lines = ["| case | before, ms | ms, rows x columns x depth x warps x stages, precision |||||", "|---" * 7 + "|"]
    for case, tried in found.items():
        exact = sorted((min(ms), *which) for which, ms in tried.items() if which[1] != "tf32")
        told = [f"{ms:.3f} {tile} {precision}" for ms, tile, precision in exact if tile != "None"][:5]
        lines.append(f"| {case} | {min(tried['None', 'tf32x3']):.3f} | {' | '.join(told)} |")
    return "\n".join(lines)


def write(root: Path = ROOT) -> None:
    page = root / "docs" / "gpu.md"
    text = fill(page.read_text(encoding="utf-8"), "card", table(root))
    page.write_text(fill(text, "tiles", tiles(root)), encoding="utf-8")


if __name__ == "__main__":
    write()
    sys.stdout.write(f"docs/gpu.md: {RESULTS / 'h100.txt'}\n")
