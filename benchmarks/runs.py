"""What did a pretraining run reach, in what time and where, and how does a table of runs say it?"""

import json
from pathlib import Path

from fuseer.engine.recipes.recipe import load_recipe

DEMOS = {"demo": "make demo", "demo-long": "make demo-long"}
BASELINES = ("raw pixels", "initialisation, BatchNorm calibrated")


def condense(name: str, run: Path, results: Path) -> None:
    """results/<name>.json: the kNN rows of a run, its training seconds, and the machine."""
    found = {**_read(run / "eval" / "knn.json"), **_origin(run)}
    (results / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")


def condense_methods(runs: list[Path], results: Path) -> None:
    """results/methods.json: kNN, linear classifier, training seconds and machine of each run, in place of an earlier run of its recipe.

    Raises ValueError for a run that was resumed, whose clock began again, is not evaluated at its end, or whose recipe is given twice.
    """
    found = [_method(run) for run in runs]
    names = [run["recipe"] for run in found]
    if len(set(names)) < len(names):
        raise ValueError(f"report: give one run per recipe; got {', '.join(names)}")
    stored = _read(results / "methods.json")["runs"] if (results / "methods.json").exists() else []
    new = dict(zip(names, found, strict=True))
    kept = [new.pop(run["recipe"], run) for run in stored]
    (results / "methods.json").write_text(json.dumps({"runs": [*kept, *new.values()]}, indent=2) + "\n")


def _method(run: Path) -> dict:
    for name in ("knn", "linear"):
        if not (run / "eval" / f"{name}.json").is_file():
            raise ValueError(f"report: {run} has no eval/{name}.json; run fuseer eval {name} run={run} first")
    config, knn, linear = _read(run / "config.json"), _read(run / "eval" / "knn.json"), _read(run / "eval" / "linear.json")
    records = _records(run)
    if any(record["kind"] == "resume" for record in records):
        raise ValueError(f"report: {run} was resumed, and its training time is not in one piece; give a run that was not")
    last = max(record["step"] for record in records if record["kind"] == "train")
    if not knn["step"] == linear["step"] == last:
        raise ValueError(f"report: {run} was trained to step {last}, its kNN is of {knn['step']} and its linear of {linear['step']}")
    recipe = config["recipe"]
    # a recipe's docstring begins with its method
    method = load_recipe(recipe).__doc__.partition(",")[0]
    return {"recipe": recipe, "method": method, "seed": config["seed"], "steps": last, "knn": knn, "linear": linear, **_origin(run)}


def condense_finetune(run: Path, results: Path) -> None:
    """results/finetune.json: the network of a run fine-tuned from its initialisation and as pretrained, and where the run came from.

    Raises ValueError where one of the two is missing or the pretrained one is not that of the run's end.
    """
    if not (run / "eval" / "finetune.json").is_file():
        raise ValueError(f"report: {run} has no eval/finetune.json; run fuseer eval finetune run={run}, with scratch=true and without")
    config, tuned = _read(run / "config.json"), _read(run / "eval" / "finetune.json")
    names = [row["name"] for row in tuned["rows"]]
    if names != ["initialisation", "pretrained"]:
        raise ValueError(f"report: {run} was fine-tuned as {names}; run fuseer eval finetune run={run}, with scratch=true and without")
    last = max(record["step"] for record in _records(run) if record["kind"] == "train")
    if tuned["rows"][1]["step"] != last:
        raise ValueError(f"report: {run} was trained to step {last}, and fine-tuned from step {tuned['rows'][1]['step']}")
    recipe = config["recipe"]
    method = load_recipe(recipe).__doc__.partition(",")[0]
    found = {"recipe": recipe, "method": method, "seed": config["seed"], "steps": last, "finetune": tuned, **_origin(run)}
    (results / "finetune.json").write_text(json.dumps(found, indent=2) + "\n")


def _origin(run: Path) -> dict:
    environment = _read(run / "env.json")
    seconds = max(record["seconds"] for record in _records(run) if record["kind"] == "train")
    kept = {key: environment[key] for key in ("started", "device", "ranks", "threads", "python", "packages")}
    return {"training_seconds": seconds, **kept, "cores": environment["host"]["cores"]}


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def demo_table(results: Path) -> str:
    found = {name: _read(results / f"{name}.json") for name in DEMOS if (results / f"{name}.json").exists()}
    if not found:
        return ""
    names = [row["name"] for row in next(iter(found.values()))["rows"]]
    lines = ["| weighted kNN, k = 20 | " + " | ".join(f"`{DEMOS[name]}`" for name in found) + " |", "|---|" + "---|" * len(found)]
    for number, row in enumerate(names):
        lines.append(f"| {row} | " + " | ".join(f"{run['rows'][number]['accuracy']:.2%}" for run in found.values()) + " |")
    facts = {
        "train / test images": [f"{run['train_images']:,} / {run['test_images']:,}" for run in found.values()],
        "training, seconds": [f"{run['training_seconds']:.0f}" for run in found.values()],
        "on": [_machine(run) for run in found.values()],
    }
    return "\n".join(lines + [f"| {what} | " + " | ".join(values) + " |" for what, values in facts.items()])


def method_table(results: Path) -> str:
    """One row per method below what there is without training, and what was run, how and where."""
    if not (results / "methods.json").exists():
        return ""
    runs = _read(results / "methods.json")["runs"]
    lines = ["| method | training, minutes | kNN | linear |", "|---|---|---|---|"]
    for name in BASELINES:
        values: dict[tuple[str, str], list[str]] = {}
        for run in runs:
            values.setdefault((_share(run["knn"], name), _share(run["linear"], name)), []).append(f"`{run['recipe']}`")
        for (knn, linear), recipes in values.items():
            of = f", of {', '.join(recipes)}" if len(values) > 1 else ""
            lines.append(f"| {name}{of} | – | {knn} | {linear} |")
    for run in runs:
        minutes = f"{run['training_seconds'] / 60:.1f}"
        pretrained = [_share(run[kind], "pretrained") for kind in ("knn", "linear")]
        lines.append(f"| {run['method']} (`{run['recipe']}`) | {minutes} | {' | '.join(pretrained)} |")
    remarks = dict.fromkeys(_remark(run) for run in runs)
    return "\n".join([*lines, "", " ".join(remarks)])


def finetune_table(results: Path) -> str:
    """One row from scratch, one pretrained, and the budget that both had."""
    if not (results / "finetune.json").exists():
        return ""
    run = _read(results / "finetune.json")
    tuned, starts = run["finetune"], {"initialisation": "from scratch", "pretrained": f"after {run['method']} (`{run['recipe']}`)"}
    lines = ["| all weights trained with labels | top-1 | top-5 | layer decay |", "|---|---|---|---|"]
    for row in tuned["rows"]:
        top5 = f"{row['top5']:.2%}" if "top5" in row else "–"
        lines.append(f"| {starts[row['name']]} | {row['accuracy']:.2%} | {top5} | {row['layer_decay']:g} |")
    images = f"{tuned['train_images']:,} labelled images to train on, {tuned['test_images']:,} to test on"
    pretraining = f"{run['steps']:,} steps of pretraining on the same images without labels, {run['training_seconds'] / 60:.1f} minutes"
    seed = f"seed {tuned['budget']['seed']}; {_machine(run)}, torch {run['packages']['torch']}"
    return "\n".join([*lines, "", f"{images}; {tuned['words']}; {pretraining}; {seed}."])


def _share(tested: dict, name: str) -> str:
    found = [row["accuracy"] for row in tested["rows"] if row["name"].startswith(name)]
    return f"{found[0]:.2%}" if found else "–"


def _remark(run: dict) -> str:
    knn = run["knn"]
    return (
        f"{knn['train_images']:,} images to train on, {knn['test_images']:,} to test on; weighted kNN, k = {knn['k']}; linear classifier: "
        f"{run['linear']['words']}. Seed {run['seed']}; {_machine(run)}, torch {run['packages']['torch']}."
    )


def _machine(run: dict) -> str:
    return f"{run['cores']} cores, {run['device']}, {run['started'][:10]}"
