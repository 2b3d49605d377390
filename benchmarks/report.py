"""How do measured results get into the README?

python benchmarks/report.py [demo=RUN_FOLDER] [demo-long=RUN_FOLDER]

The kernel table takes the newest run of every results/<op>.jsonl; a run folder named here is first condensed to results/<name>.json.
What stands between the markers in README.md is replaced and never typed by hand.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMOS = {"demo": "make demo", "demo-long": "make demo-long"}


def condense(name: str, run: Path) -> None:
    """results/<name>.json: the kNN rows of a run, its training seconds, and the machine."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = max(record["seconds"] for record in records if record["kind"] == "train")
    environment = json.loads((run / "env.json").read_text())
    kept = {key: environment[key] for key in ("started", "device", "ranks", "threads", "python", "packages")}
    kept["cores"] = environment["host"]["cores"]
    found = {**json.loads((run / "eval" / "knn.json").read_text()), "training_seconds": seconds, **kept}
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")


def demo_table() -> str:
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in DEMOS if (RESULTS / f"{name}.json").exists()}
    names = [row["name"] for row in next(iter(found.values()))["rows"]]
    lines = ["| weighted kNN, k = 20 | " + " | ".join(f"`{DEMOS[name]}`" for name in found) + " |", "|---|" + "---|" * len(found)]
    for number, row in enumerate(names):
        lines.append(f"| {row} | " + " | ".join(f"{run['rows'][number]['accuracy']:.2%}" for run in found.values()) + " |")
    facts = {
        "train / test images": [f"{run['train_images']:,} / {run['test_images']:,}" for run in found.values()],
        "training, seconds": [f"{run['training_seconds']:.0f}" for run in found.values()],
        "on": [f"{run['cores']} cores, {run['device']}, {run['started'][:10]}" for run in found.values()],
    }
    return "\n".join(lines + [f"| {what} | " + " | ".join(values) + " |" for what, values in facts.items()])


def kernel_table() -> str:
    lines = ["| op | case | program | median, ms | speed-up | share of the copy floor |", "|---|---|---|---|---|---|"]
    machine = ""
    for path in sorted(RESULTS.glob("*.jsonl")):
        newest: dict[tuple[str, str], dict] = {}
        for line in path.read_text().splitlines():
            row = json.loads(line)
            newest[row["case"], row["program"]] = row
        for row in newest.values():
            numbers = f"{row['p50_ms']:.2f} | {row['speedup']:.2f} | {row['of_floor']:.0%}"
            lines.append(f"| {row['op']} | {row['case']} | {row['program']} | {numbers} |")
            machine = f"{row['device']}, {row['instruction_set']}, {row['threads']} threads, torch {row['torch']}, {row['date']}"
    remark = f"Medians of interleaved calls in one run; {machine}. The floor is the time to copy the bytes that must move."
    return "\n".join([*lines, "", remark])


def fill(text: str, marker: str, content: str) -> str:
    before, _, rest = text.partition(f"<!-- {marker} -->")
    _, _, after = rest.partition(f"<!-- end {marker} -->")
    return f"{before}<!-- {marker} -->\n{content}\n<!-- end {marker} -->{after}"


def main() -> None:
    for word in sys.argv[1:]:
        name, _, run = word.partition("=")
        condense(name, Path(run))
    readme = ROOT / "README.md"
    text = fill(readme.read_text(), "demo", demo_table())
    readme.write_text(fill(text, "kernels", kernel_table()))


if __name__ == "__main__":
    main()
