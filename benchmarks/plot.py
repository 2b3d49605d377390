"""How does time grow with the number of prototypes and of rows? Draws docs/speed.png."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

INK, FAINT, PAPER = "#1f2933", "#9aa5b1", "#fcfcfa"
# kind: (colour, line width, dashes, what it is called)
STYLES = {
    "ours": ("#c2410c", 2.8, "-", "fuseer"),
    "eager": ("#52606d", 1.6, "-", "official, eager"),
    "compile": ("#2563a8", 1.6, "-", "official, compiled"),
    "third party": ("#8a6fb0", 1.6, "-", "lightly"),
}
TITLES = {
    ("sinkhorn", "K"): ("sinkhorn", "K prototypes, 512 rows"),
    ("sinkhorn", "N"): ("sinkhorn", "N rows, 3000 prototypes"),
    ("swapped_prediction", "K"): ("swapped_prediction, forward + backward", "K prototypes, 8 crops of 64 images"),
    ("swapped_prediction", "B"): ("swapped_prediction, forward + backward", "B images, 8 crops, 3000 prototypes"),
    ("nt_xent", "N"): ("nt_xent, forward + backward", "2N rows of width 128"),
    ("nt_xent", "D"): ("nt_xent, forward + backward", "width D, 2,048 rows"),
    ("info_nce", "Q"): ("info_nce, forward + backward", "Q keys of width 128, 256 queries"),
    ("info_nce", "N"): ("info_nce, forward + backward", "N queries, 65,536 keys of width 128"),
}


def draw(rows: list[dict], path: Path, caption) -> None:
    """One log-log panel per op and letter of the sweep; `caption(rows)` names the machine and the date."""
    panels = list(dict.fromkeys((row["op"], row["sweep"]) for row in rows))
    columns = 2
    lines = -(-len(panels) // columns)
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK})
    figure, axes = plt.subplots(lines, columns, figsize=(10.5, 3.9 * lines + 0.4), dpi=160, facecolor=PAPER, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        _panel(axis, panel, [row for row in rows if (row["op"], row["sweep"]) == panel])
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout(rect=(0.005, 0.045, 0.995, 0.995), h_pad=2.2, w_pad=2.5)
    figure.text(0.012, 0.012, f"Medians. {caption(rows)}", fontsize=7.2, color=FAINT, va="bottom")
    figure.savefig(path, facecolor=PAPER)
    plt.close(figure)


def _panel(axis, panel, rows):
    title, label = TITLES.get(panel, (panel[0], panel[1]))
    ends = []
    for kind, (colour, width, dashes, name) in STYLES.items():
        drawn = (row for row in rows if row["kind"] == kind and "not_run" not in row and (kind != "ours" or row["preferred"]))
        points = sorted((row["size"], row["p50_ms"]) for row in drawn)
        if not points:
            continue
        sizes, times = zip(*points, strict=True)
        front = 5 if kind == "ours" else 3
        axis.plot(sizes, times, dashes, color=colour, lw=width, marker="o", ms=width + 2.2, mec=PAPER, mew=0.9, zorder=front)
        ends.append((times[-1], sizes[-1], name, colour, kind))
    axis.set_xscale("log")
    axis.set_yscale("log")
    sizes = sorted({row["size"] for row in rows})
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8.5)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.tick_params(length=0, colors=INK, labelsize=8.5)
    axis.set_facecolor(PAPER)
    axis.grid(axis="y", color="#e4e7eb", lw=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(FAINT)
    axis.set_xlabel(label, fontsize=9.5, labelpad=5)
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=20)
    axis.text(0, 1.035, "milliseconds", transform=axis.transAxes, fontsize=8.5, color=FAINT)
    axis.set_xlim(sizes[0] / 1.25, sizes[-1] * (sizes[-1] / sizes[0]) ** 0.34)
    _labels(axis, ends)


def _labels(axis, ends):
    """Each line's name at its right end; names that would touch are stacked around their middle."""
    low, high = (math.log(limit) for limit in axis.get_ylim())
    gap = (high - low) * 0.062
    stacks = []
    for time, *label in sorted(ends):
        stacks.append(([math.log(time)], [label]))
        while len(stacks) > 1 and _foot(stacks[-1], gap) - _foot(stacks[-2], gap) < len(stacks[-2][1]) * gap:
            times, labels = stacks.pop()
            stacks[-1] = (stacks[-1][0] + times, stacks[-1][1] + labels)
    for stack in stacks:
        for place, (size, name, colour, kind) in enumerate(stack[1]):
            where, weight = (size, math.exp(_foot(stack, gap) + place * gap)), "bold" if kind == "ours" else "normal"
            style = {"va": "center", "fontsize": 9, "color": colour, "fontweight": weight, "annotation_clip": False}
            axis.annotate(name, where, (8, 0), textcoords="offset points", **style)


def _foot(stack, gap):
    """The height of the lowest name of a stack."""
    return sum(stack[0]) / len(stack[0]) - gap * (len(stack[0]) - 1) / 2
