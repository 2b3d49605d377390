"""How do numbers over steps become a chart: its points, its lines, its round ticks?"""

import itertools
import json
import math
import statistics
from typing import Any

BINS = 200

Points = list[tuple[float, float]]


def finite(points: Points) -> list[float]:
    return [value for _, value in points if math.isfinite(value)]


def line_chart(title: str, points: Points, *, lines: dict[str, float] | None = None, marks=(), floor=math.inf, dots=False) -> dict | None:
    """One series over steps with named horizontal `lines` and vertical `marks`; gaps where it is not finite, None where it never is."""
    values = finite(points)
    if not values:
        return None
    (points, means), lines = thinned(points), lines or {}
    first, last = points[0][0], points[-1][0]
    span = (first, last) if first < last else (first - 1, last + 1)
    low, high = min([*values, *lines.values()]), max([*values, *lines.values()])
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    pieces = [list(piece) for drawn, piece in itertools.groupby(points, key=lambda point: math.isfinite(point[1])) if drawn]
    return {
        "title": title, "at": "step", "points": _rounded(points), "pieces": pieces, "means": means, "bar": 0,
        "dots": dots or len(values) == 1, "lines": lines, "marks": [mark for mark in marks if span[0] <= mark <= span[1]],
        "x": _axis(*span, 6), "y": _axis(floor if floor <= low else low - pad, high + pad, 5),
    }


def bar_chart(title: str, shares: list[float], even: dict[str, float]) -> dict[str, Any]:
    """Bars of `shares`, which fall, by rank, with named horizontal lines `even`; at most BINS of them, each the mean of its ranks."""
    ranks = math.ceil(len(shares) / BINS)
    bars = [(first + 1, statistics.fmean(shares[first : first + ranks])) for first in range(0, len(shares), ranks)]
    return {
        "title": title, "at": "rank", "points": _rounded(bars), "pieces": [bars], "means": [], "bar": ranks, "dots": False, "marks": [],
        "x": _axis(0.5, bars[-1][0] + ranks - 0.5, 6), "y": _axis(0, 1.06 * max(bars[0][1], *even.values()), 5), "lines": even,
    }


def thinned(points: Points) -> tuple[Points, Points]:
    """(about 3 · BINS of the points, the mean of each bin), or (all, none) where they are few.

    Each bin keeps its lowest, its highest and one that is not finite, so that no spike or gap is lost.
    """
    if len(points) <= 3 * BINS:
        return points, []
    kept, means = {0, len(points) - 1}, []
    for number in range(BINS):
        indices = range(number * len(points) // BINS, (number + 1) * len(points) // BINS)
        real = [index for index in indices if math.isfinite(points[index][1])]
        if real:
            kept |= {min(real, key=lambda index: points[index][1]), max(real, key=lambda index: points[index][1])}
            means.append((points[real[len(real) // 2]][0], statistics.fmean(points[index][1] for index in real)))
        if len(real) < len(indices):
            kept.add(next(index for index in indices if not math.isfinite(points[index][1])))
    return [points[index] for index in sorted(kept)], means


def _axis(low: float, high: float, most: int) -> dict[str, Any]:
    """low, high and about `most` round ticks (value, label) between them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.8 * rough)
    values = [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return {"low": low, "high": high, "ticks": [(value, _tick(value, step)) for value in values]}


def _tick(value: float, step: float) -> str:
    if step < 1e-4 and abs(value) < 1000 * step:
        return f"{value:.4g}"
    digits = -math.floor(math.log10(step) + 1e-9)
    for power, letter in ((6, "M"), (3, "k")):
        if digits + power <= 3 and abs(value) >= 10**power * (1 if digits <= -power else 10):
            return f"{value / 10**power:.{max(0, digits + power)}f}{letter}"
    return f"{value:.{max(0, digits)}f}"


def _rounded(points: Points) -> str:
    """JSON for the read-out under the pointer; null where a value is not finite."""
    return json.dumps([[x, float(f"{y:.5g}") if math.isfinite(y) else None] for x, y in points], separators=(",", ":"))
