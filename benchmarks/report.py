"""How do measured results get into README.md and docs?

python -m benchmarks.report [demo=RUN_FOLDER] [demo-long=RUN_FOLDER] [methods=RUN_FOLDER …] [finetune=RUN_FOLDER]

A run folder named here is first condensed to results/<name>.json, those of methods=… into one. What stands between the markers of
README.md and docs/benchmarks.md is replaced and never typed by hand; docs/speed.png is drawn from results/sweep.jsonl.
"""

import sys
from pathlib import Path

from benchmarks import measure
from benchmarks.engine import checkpoint, loader, saliency, seer_step, startup
from benchmarks.run import OPS, part
from benchmarks.runs import DEMOS, condense, condense_finetune, condense_methods, demo_table, finetune_table, method_table

ROOT = measure.ROOT
COLUMNS = ("ours", "eager", "compile", "third party")


def kernel_rows(results: Path) -> list[dict]:
    """The stored rows of the production cases that exist today, in the order of cases.py."""
    found = []
    for op in OPS:
        stored = measure.load(results / f"{op}.jsonl")
        for case in (case.name for case in part(op, "cases").CASES if case.production):
            found += [row for row in stored if row["case"] == case]
    return found


def grouped(rows: list[dict], *keys: str) -> list[list[dict]]:
    """The rows in groups that agree in `keys`, groups and rows in order of appearance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


def fastest(rows: list[dict], kind: str) -> dict | None:
    """The preferred program among ours, the fastest of the other kinds, one that was not run where none was; None where there is none."""
    found = [row for row in rows if row["kind"] == kind and (kind != "ours" or row["preferred"])]
    return min(found, key=lambda row: ("not_run" in row, row["p50_ms"] or 0), default=None)


def kernel_table(rows: list[dict]) -> str:
    """One line per case and one table per machine: what dispatch runs, beside what it has to beat."""
    parts = []
    for machine in grouped(rows, "device", "threads"):
        lines = [
            "| op | case | shape | dtype | ours, ms | eager, ms | compile, ms | third party, ms | speed-up | extra memory, MB (eager) "
            "| of the floor | bound by |",
            "|---" * 12 + "|",
        ]
        for case in grouped(machine, "op", "case"):
            ours, eager, compiled, third = (fastest(case, kind) for kind in COLUMNS)
            memory = " ".join((_megabytes(ours), f"({_megabytes(eager)})"))
            speedup = "–" if ours["speedup"] is None else f"**{ours['speedup']:.2g}×**"
            cells = [_time(ours), *(_time(row, ours) for row in (eager, compiled, third)), speedup, memory]
            start = [f"`{ours['op']}`", ours["case"], ours["shape"], ours["dtype"]]
            lines.append("| " + " | ".join([*start, *cells, _of_floor(ours, case), ours["bound"]]) + " |")
        parts.append("\n".join([*lines, "", _remark(machine)]))
    return "\n\n".join(parts)


def _time(row: dict | None, ours: dict | None = None) -> str:
    """Median and name; for a third party also how many times that is what ours takes."""
    if row is None:
        return "–"
    if "not_run" in row:
        return f"– (not run: {row['not_run']})"
    if row["kind"] not in ("ours", "third party"):
        return _three_digits(row["p50_ms"])
    times = ours.get("against", {}).get(row["program"]) if ours else None
    return f"{_three_digits(row['p50_ms'])} ({row['program']}{'' if times is None else f', {times:.2g}×'})"


def _of_floor(ours: dict, case: list[dict]) -> str:
    """The share of the floor, and of each bound that was timed in the same run."""
    bounds = [row["program"] for row in case if row["kind"] == "bound"]
    return ", ".join([f"{ours['of_floor']:.0%}", *(f"{ours['against'][name]:.0%} of {name}" for name in bounds)])


def _megabytes(row: dict | None) -> str:
    return "–" if row is None or row["extra_mb"] is None else _three_digits(row["extra_mb"])


def _three_digits(number: float) -> str:
    """Three significant digits, no fewer than stand before the point: 0.0646, 11.8, 1,060."""
    return f"{number:.3g}" if number < 999.5 else f"{float(f'{number:.3g}'):,.0f}"


def on_machine(rows: list[dict]) -> str:
    """Machine, versions, commits and dates of the rows, in one line."""
    commits = sorted({row["commit"] + ("+changes" if row["dirty"] else "") for row in rows})
    dates = sorted({row["date"][:10] for row in rows})
    row = rows[-1]
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "triton", "lightly") if row[name] != "absent")
    cores = ", ".join(f"{row[name]} {name if row[name] > 1 else name[:-1]}" for name in ("cores", "threads"))
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"{row['device']}, {row['instruction_set']}, {cores}; {versions}; commit {', '.join(commits)}; {days}"


def _remark(rows: list[dict]) -> str:
    row = rows[-1]
    speeds = f"{row['copy_gb_s']:g} GB/s copied"
    if "fma_g_s" in row:
        speeds += f", {row['fma_g_s']:g} G multiply-adds/s"
    return (
        "Medians of calls that take turns in one process; losses with their backward pass; speed-up over the faster of eager and "
        "compile, and beside a third party's name over that one; extra memory is the peak above the inputs, results included; the floor "
        "is the longer of a copy of the bytes that "
        f"must move and the arithmetic that must be done. {on_machine(rows)}; {speeds}. [How it is measured](docs/benchmarks.md)."
    )


def all_programs(rows: list[dict]) -> str:
    """Every program of every case, with quantiles and operator counts."""
    parts = []
    for machine in grouped(rows, "device", "threads"):
        head = "| op | case | program | p20 | p50 | p80, ms | speed-up | extra memory, MB | operations | of the floor | control p90/p10 |"
        lines = [head, "|---" * 11 + "|"]
        for row in machine:
            start = f"| {row['op']} | {row['case']} | {row['program']} |"
            if "not_run" in row:
                lines.append(f"{start} – | not run: {row['not_run']} |" + " – |" * 6)
                continue
            times = " | ".join(_three_digits(row[f"{name}_ms"]) for name in ("p20", "p50", "p80"))
            counted = "–" if row["operations"] is None else row["operations"]
            speedup = "–" if row["speedup"] is None else f"{row['speedup']:.2g}"
            tail = f"{speedup} | {_megabytes(row)} | {counted} | {row['of_floor']:.0%} | {row['control_spread']:.2f}"
            lines.append(f"{start} {times} | {tail} |")
        parts.append("\n".join([*lines, "", on_machine(machine) + "."]))
    return "\n\n".join(parts)


def step_table(rows: list[dict]) -> str:
    parts = []
    for machine in grouped(rows, "device", "threads"):
        lines = ["| training step | scores | loss by | step, ms | its loss alone, ms | share of the loss | step against official |"]
        lines.append("|---" * 7 + "|")
        for row in machine:
            numbers = f"{row['p50_ms']:.4g} | {row['loss_ms']:.3g} | {row['loss_share']:.1%} | {row['ratio']:.3f}"
            lines.append(f"| {row['case']}: {row['told']} | {row['shape']} | {row['program']} | {numbers} |")
        parts.append("\n".join([*lines, "", on_machine(machine) + "."]))
    return "\n\n".join(parts)


def fault_table(rows: list[dict]) -> str:
    """One line per fault: which signal, where, and how many steps had to be done again."""
    if not rows:
        return ""
    rows = sorted(grouped(rows, "device", "threads")[-1], key=lambda row: row["number"])
    lines = ["| fault | signal | to rank | while it | at step | went on from | steps lost |", "|---" * 7 + "|"]
    while_it = {"start": "started", "step": "stepped", "save": "saved"}
    for row in rows:
        cells = (row["number"], row["case"], row["rank"], while_it[row["phase"]], row["step"], row["resumed"], row["lost"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    row, kills = rows[-1], [row for row in rows if row["case"] == "SIGKILL"]
    saving = sum(row["phase"] == "save" for row in kills)
    stops, spent = len(rows) - len(kills), f"seed {row['seed']}, {row['seconds']} s"
    budget = f"{row['steps']} steps on two ranks, saved every {row['every']}; {spent}"
    told = (
        f"{len(kills)} × SIGKILL, {saving} of them during a save, and {stops} × SIGTERM in a run of {budget}. Losses of every repetition "
        f"and the last checkpoint are bitwise those of the run without faults. {on_machine(rows)}."
    )
    return "\n".join([*lines, "", told])


def startup_table(rows: list[dict]) -> str:
    return "\n\n".join(f"{startup.table(machine)}\n\n{on_machine(machine)}." for machine in grouped(rows, "device"))


def checkpoint_table(rows: list[dict]) -> str:
    return "\n\n".join(f"{checkpoint.table(machine)}\n\n{on_machine(machine)}." for machine in grouped(rows, "device", "threads"))


def loader_table(speeds: list[dict], memory: list[dict]) -> str:
    parts = [f"{loader.table(machine)}\n\n{on_machine(machine)}." for machine in grouped(speeds, "device")]
    for row in memory:
        after = ", ".join(f"{megabytes:.0f}" for megabytes in row["megabytes"])
        told = f"{row['case']} of {row['images']} images, {row['program']}: {after} MB resident after every tenth of them"
        parts.append(f"{told}; grown by {row['grown']:g} MB (median of the last three over that of the second to fourth).")
    return "\n\n".join(parts)


def seer_table(rows: list[dict]) -> str:
    return "\n\n".join(f"{seer_step.table(machine)}\n\n{on_machine(machine)}." for machine in grouped(rows, "device", "threads"))


def saliency_table(rows: list[dict]) -> str:
    return "\n\n".join(f"{saliency.table(machine)}\n\n{on_machine(machine)}." for machine in grouped(rows, "device"))


def fill(text: str, marker: str, content: str) -> str:
    """`text` with what stands between <!-- marker --> and <!-- end marker --> replaced; as it was where there is nothing to say."""
    if not content:
        return text
    before, begin, rest = text.partition(f"<!-- {marker} -->")
    _, end, after = rest.partition(f"<!-- end {marker} -->")
    if not (begin and end):
        raise ValueError(f"report: the text holds no <!-- {marker} --> … <!-- end {marker} -->")
    return f"{before}{begin}\n{content}\n{end}{after}"


def write(root: Path = ROOT) -> None:
    """README.md, docs/benchmarks.md and docs/speed.png of the checkout `root` from its benchmarks/results."""
    results, readme, details = root / "benchmarks" / "results", root / "README.md", root / "docs" / "benchmarks.md"
    rows = kernel_rows(results)
    swept = measure.load(results / "sweep.jsonl")
    if swept:
        # matplotlib is an extra, and whoever only fills a text does not need it
        from benchmarks.plot import draw

        draw(grouped(swept, "device", "threads")[-1], root / "docs" / "speed.png", on_machine)
    picture = "\n\n![Time against the number of prototypes and of rows](docs/speed.png)" if (root / "docs" / "speed.png").exists() else ""
    text = fill(readme.read_text(encoding="utf-8"), "demo", demo_table(results))
    text = fill(text, "methods", method_table(results))
    text = fill(text, "finetune", finetune_table(results))
    readme.write_text(fill(text, "kernels", kernel_table(rows) + picture if rows else ""), encoding="utf-8")
    text = fill(details.read_text(encoding="utf-8"), "programs", all_programs(rows))
    text = fill(text, "startup", startup_table(measure.load(results / "startup.jsonl")))
    text = fill(text, "checkpoints", checkpoint_table(measure.load(results / "checkpoint.jsonl")))
    text = fill(text, "faults", fault_table(measure.load(results / "faults.jsonl")))
    text = fill(text, "loader", loader_table(measure.load(results / "loader.jsonl"), measure.load(results / "loader_memory.jsonl")))
    text = fill(text, "seer", seer_table(measure.load(results / "seer_step.jsonl")))
    text = fill(text, "saliency", saliency_table(measure.load(results / "saliency.jsonl")))
    details.write_text(fill(text, "steps", step_table(measure.load(results / "step.jsonl"))), encoding="utf-8")


def main(words: list[str]) -> None:
    methods = []
    for word in words:
        name, _, run = word.partition("=")
        known = (*DEMOS, "finetune", "methods")
        if name not in known or not run:
            raise ValueError(f"report: give {' or '.join(f'{name}=RUN_FOLDER' for name in known)}; got {word}")
        if name == "methods":
            methods.append(Path(run))
        elif name == "finetune":
            condense_finetune(Path(run), measure.RESULTS)
        else:
            condense(name, Path(run), measure.RESULTS)
    if methods:
        condense_methods(methods, measure.RESULTS)
    write()


if __name__ == "__main__":
    main(sys.argv[1:])
