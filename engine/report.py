"""How did a run go, on one page that opens offline?"""

import base64
import itertools
import json
import math
import os
import statistics
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from fuseer.engine.chart import Points, bar_chart, finite, line_chart

NO_CHART_OF_ITS_OWN = {"kind", "step", "epoch", "loss", "lr", "images_per_second", "data_wait_share", "seconds"} | {
    "prototype_entropy", "prototypes_used", "prototype_usage", "skipped", "skipped_in_a_row"
}
IMAGES = {"train_images": "{:,} training images", "test_images": "{:,} test images"}
SHEET = {"file": "crops.png", "title": "What the network sees", "words": ""} | {
    "seen": "One row per image, one column per view, as augmented for training"
}
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


@dataclass
class Run:
    """What a run folder holds: JSON as read, records by kind in step order, what could not be read in words."""

    folder: Path
    config: dict[str, Any]
    env: dict[str, Any]
    knn: dict[str, Any]
    linear: dict[str, Any]
    finetuned: dict[str, Any]
    pictures: list[dict[str, str]]
    records: dict[str, list[dict[str, Any]]]
    unreadable: list[str]

    @property
    def prototypes(self) -> int:
        """K of the method, 0 where it has none."""
        count = self.config.get("method", {}).get("prototypes")
        return count if type(count) is int and count > 1 else 0

    @property
    def chance(self) -> dict[str, float]:
        """The loss of a network that tells nothing apart, by what the page calls it; empty where none is known."""
        if self.prototypes:
            return {f"chance, ln {self.prototypes}": math.log(self.prototypes)}
        loss = _number(self.env, "chance_loss")
        return {"chance": loss} if math.isfinite(loss) else {}

    @property
    def progress(self) -> float:
        """Share of the planned steps or epochs that has been logged, 1 when the next record would lie beyond the end."""
        if not self.records["train"]:
            return 0.0
        last, config = self.records["train"][-1], self.config
        step, epoch = last["step"], _number(last, "epoch")
        log_every = config.get("log_every_steps", 1)
        if config.get("steps"):
            return 1.0 if step + log_every > config["steps"] else step / config["steps"]
        if config.get("epochs") and math.isfinite(epoch) and step > 0:
            return 1.0 if (step + log_every) * epoch / step > config["epochs"] else epoch / config["epochs"]
        return 1.0

    def series(self, key: str, scale: float = 1.0, kind: str = "train") -> Points:
        """(step, value · scale) of every record of `kind` that has `key`; NaN and infinities included."""
        return [(record["step"], _number(record, key) * scale) for record in self.records[kind] if key in record]


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into `run_folder` from what the run has left there so far, and return its path.

    Reads config.json and metrics.jsonl (both needed), env.json, eval/{knn,linear,finetune,pictures}.json, crops.png and the pictures that
    eval/pictures.json names (each optional). The run may be going on or have been killed: unreadable lines and files are skipped and named
    on the page; after a resume, records of later steps that were written before it are dropped. The page is one file without links to
    anything outside it, replaced in one move. Call it on one rank.
    Raises ValueError where config.json or metrics.jsonl is missing, or config.json cannot be read.
    """
    run = read_run(Path(run_folder))
    pages = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = pages.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8"))
    html = template.render(
        title=run.config.get("recipe", run.folder.name), subtitle=_subtitle(run), troubles=troubles(run),
        numbers=key_numbers(run),
        charts=charts(run), resumed=[record["step"] for record in run.records["resume"]],
        tables=[table for table in _tables(run) if table["rows"]],
        pictures=run.pictures,
        broken=_broken(run),
        config=list(_flat(run.config)), env=list(_flat(run.env)),
        unreadable=run.unreadable,
    )
    path = run.folder / "report.html"
    part = path.with_name("report.html.part")
    # file names that are not UTF-8 arrive as lone surrogates
    part.write_bytes(html.encode("utf-8", "backslashreplace"))
    os.replace(part, path)
    return path


def read_run(folder: Path) -> Run:
    """What `folder` holds of a run; raises ValueError as `write_report` says."""
    missing = " and no ".join(name for name in ("config.json", "metrics.jsonl") if not (folder / name).is_file())
    if missing:
        raise ValueError(f"report: {folder} has no {missing}; give the run folder that `fuseer pretrain` wrote (out=…)")
    unreadable: list[str] = []
    config = _json(folder, "config.json", unreadable)
    if unreadable:
        raise ValueError(f"report: {folder / 'config.json'} is not a JSON object; it is cut off or was edited: restore it from the recipe")
    records = _records(folder / "metrics.jsonl", unreadable)
    told = [_json(folder, name, unreadable) for name in ("env.json", "eval/knn.json", "eval/linear.json", "eval/finetune.json")]
    return Run(folder, config, *told, _pictures(folder, unreadable), records, unreadable)


def _pictures(folder: Path, unreadable: list[str]) -> list[dict[str, str]]:
    """Heading, alternative text, words and address of every picture there is: the crop sheet, and those that pictures.json names."""
    found = []
    for told in (SHEET, *_json(folder, "eval/pictures.json", unreadable).get("pictures", [])):
        data = (folder / told["file"]).read_bytes() if (folder / told["file"]).is_file() else b""
        if data.startswith(PNG_START) and data.endswith(PNG_END):
            found.append({**told, "address": f"data:image/png;base64,{base64.b64encode(data).decode()}"})
        elif data:
            unreadable.append(f"{told['file']} is cut off")
    return found


def _json(folder: Path, name: str, unreadable: list[str]) -> dict[str, Any]:
    if not (folder / name).is_file():
        return {}
    value = _object((folder / name).read_bytes())
    if value is None:
        unreadable.append(f"{name} is not a JSON object")
    return value or {}


def _object(text: bytes) -> dict[str, Any] | None:
    """The JSON object that `text` is, None where it is cut off or something else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _records(path: Path, unreadable: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Records by kind, by step: the last one of each step, none that a later resume threw away; every broken file; no unknown kind."""
    lost = 0
    kept: dict[str, dict[Any, dict[str, Any]]] = {"train": {}, "knn": {}, "monitor": {}, "broken": {}, "resume": {}}
    for line in filter(bytes.strip, path.read_bytes().splitlines()):
        record = _object(line)
        if record is None or type(record.get("step")) is not int or not isinstance(record.get("kind"), str):
            lost += 1
            continue
        kind, step = record["kind"], record["step"]
        if kind == "resume":
            for other in ("train", "knn", "monitor"):
                kept[other] = {at: earlier for at, earlier in kept[other].items() if earlier["step"] <= step}
        if kind in kept:
            kept[kind][len(kept["broken"]) if kind == "broken" else (step, str(record.get("sign")))] = record
    if lost:
        unreadable.append(f"metrics.jsonl: {lost} line{'s' * (lost > 1)} skipped, cut off or not a record")
    return {kind: sorted(records.values(), key=lambda record: record["step"]) for kind, records in kept.items()}


def _number(record: dict[str, Any], key: str) -> float:
    """record[key] as a float, NaN where it is missing or no number."""
    value = record.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def troubles(run: Run) -> list[str]:
    """Every sign of trouble in the numbers of `run`, in words, with the remedy."""
    signs = _signs(run) | {sign: text for sign, text in (("chance", _at_chance(run)), ("prototypes", _few_prototypes(run))) if text}
    return [text for text in (_non_finite(run), *signs.values(), _starved(run), _nothing_learnt(run)) if text]


def _signs(run: Run) -> dict[str, str]:
    """What the monitor said last of each sign of trouble that it has not seen pass."""
    last = {str(record.get("sign")): record for record in run.records["monitor"]}
    return {sign: f"Since step {record['step']}: {record.get('text')}." for sign, record in last.items() if not record.get("over")}


def _non_finite(run: Run) -> str:
    bad = [step for step, loss in run.series("loss") if not math.isfinite(loss)]
    if not bad:
        return ""
    return (
        f"The loss is not finite in {len(bad)} of {len(run.records['train'])} records, first at step {bad[0]}. "
        "Lower the learning rate or lengthen its warm-up; embeddings and prototypes must both be L2-normalised."
    )


def _at_chance(run: Run) -> str:
    """A loss of ln K after half the run: every sample is assigned alike."""
    losses = finite(run.series("loss"))
    if not run.prototypes or not losses or run.progress < 0.5:
        return ""
    chance = math.log(run.prototypes)
    recent = statistics.fmean(losses[-max(1, len(losses) // 10) :])
    if recent < 0.98 * chance:
        return ""
    return (
        f"At chance: likely collapse. The loss is {recent:.3f}, and ln {run.prototypes} = {chance:.3f} is where a network stays that "
        "tells no two images apart. Try, in this order: a lower epsilon (0.03), prototypes frozen for longer, a head without BatchNorm, "
        "milder augmentation or fewer crops. If the loss jumped when a queue started, start the queue later or make it shorter."
    )


def _few_prototypes(run: Run) -> str:
    used = finite(run.series("prototypes_used"))
    if not run.prototypes or not used:
        return ""
    # a batch cannot use more prototypes than it has images
    if used[-1] >= 0.1 * min(run.prototypes, run.config.get("batch_size", run.prototypes)):
        return ""
    return (
        f"Only {used[-1]:.0f} of {run.prototypes} prototypes are used. Try a lower epsilon (0.03), fewer prototypes (about three for each "
        "class you expect), or, where the batch is much smaller than their number, a queue."
    )


def _starved(run: Run) -> str:
    waits = finite(run.series("data_wait_share"))
    if not waits or statistics.median(waits) <= 0.3:
        return ""
    return (
        f"The model waits for images during {statistics.median(waits):.0%} of the time. Raise data.threads or data.prefetch_batches, "
        "use data.pipeline=dali, or move the images to a faster disk."
    )


def _nothing_learnt(run: Run) -> str:
    gain, rows = _gain(run.knn), _rows(run.knn)
    if not math.isfinite(gain) or gain > 0:
        return ""
    return (
        f"Pretraining has not helped: kNN is {rows['pretrained']:.1%}, and {rows['pretrained'] - gain:.1%} with the network as "
        "initialised. Look at the loss and at the crop sheet first: crops may be too harsh, or the run too short."
    )


def _subtitle(run: Run) -> str:
    """Date · folder · how far the run got."""
    written = datetime.fromtimestamp((run.folder / "config.json").stat().st_mtime).isoformat()
    started = str(run.env.get("started", written))[:16].replace("T", " ")
    train, how_far = run.records["train"], "no training record yet"
    if train:
        planned = f"{run.config['steps']:,} steps" if run.config.get("steps") else f"{run.config.get('epochs', '?')} epochs"
        so_far = f"going on, or stopped: step {train[-1]['step']:,}, {run.progress:.0%} of {planned}"
        how_far = f"finished: {planned}" if run.progress >= 1 else so_far
    return f"{started} · {run.folder.resolve().name} · {how_far}"


def key_numbers(run: Run) -> list[tuple[str, str, str]]:
    """(name, value, what to hold it against) of the numbers that matter most; '–' where the run has none yet."""
    losses = run.series("loss")
    speeds, waits, used = (finite(run.series(key)) for key in ("images_per_second", "data_wait_share", "prototypes_used"))
    speed, wait = statistics.median(speeds or [0.0]), f"data wait {statistics.median(waits):.1%}" if waits else ""
    chance = "".join(f"{name} = {loss:.3f}".replace("chance, ", "chance: ") for name, loss in run.chance.items())
    numbers = [
        ("Loss, last record", f"{losses[-1][1]:.4g}" if losses else "–", chance),
        ("Images a second", f"{speed:,.{1 if speed < 1000 else 0}f}" if speeds else "–", wait),
        ("Time", *_elapsed(run)),
        ("kNN", *_last_knn(run)),
    ]
    for name, tested in (("Linear classifier", run.linear), ("Fine-tuned", run.finetuned)):
        if "pretrained" in _rows(tested):
            numbers.append((name, f"{_rows(tested)['pretrained']:.1%}", _gain_in_words(tested)))
    if used:
        numbers.append(("Prototypes used", f"{used[-1]:,.0f}", f"of {run.prototypes:,}" if run.prototypes else ""))
    broken = len(_broken(run))
    return [*numbers, ("Broken files", str(broken), "skipped, named below" if broken else "")]


def _elapsed(run: Run) -> tuple[str, str]:
    """(duration, seconds in words): the clock starts again at a resume, so its rises are added up."""
    clock, marks = [point for point in run.series("seconds") if math.isfinite(point[1])], run.records["resume"]
    total = 0.0
    for (earlier, before), (later, after) in itertools.pairwise([(-1, 0.0), *clock]):
        again = after < before or any(earlier <= mark["step"] < later for mark in marks)
        total += after if again else after - before
    hours, minutes, seconds = int(total // 3600), int(total // 60 % 60), int(total % 60)
    duration = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{total:.1f} s"
    return (duration, f"{total:,.1f} seconds, {clock[-1][0]:,} steps") if clock else ("–", "")


def _rows(tested: dict[str, Any]) -> dict[str, float]:
    """Accuracy by name as in eval/knn.json and eval/linear.json."""
    return {str(row["name"]): row["accuracy"] for row in tested.get("rows", []) if math.isfinite(_number(row, "accuracy"))}


def _gain(tested: dict[str, Any]) -> float:
    """How much more the pretrained network reaches than the better of its initialisations; NaN where one of them is missing."""
    rows = _rows(tested)
    starts = [accuracy for name, accuracy in rows.items() if name.startswith("initialisation")]
    return rows["pretrained"] - max(starts) if "pretrained" in rows and starts else math.nan


def _gain_in_words(tested: dict[str, Any]) -> str:
    starts = sum(name.startswith("initialisation") for name in _rows(tested))
    gain = f"{100 * _gain(tested):+.1f} points on the {'better ' if starts > 1 else ''}initialisation".replace("-", "−")
    return gain if math.isfinite(_gain(tested)) else ""


def _last_knn(run: Run) -> tuple[str, str]:
    rows, during = _rows(run.knn), finite(run.series("accuracy", kind="knn"))
    if "pretrained" in rows:
        return f"{rows['pretrained']:.1%}", _gain_in_words(run.knn)
    return (f"{during[-1]:.1%}", f"at step {run.records['knn'][-1]['step']:,}") if during else ("–", "")


def _knn_table(run: Run) -> dict[str, Any]:
    """Heading, rows (name, percent, remark) and caption; no rows without eval/knn.json."""
    told = {"k": "k = {}", "temperature": "T = {}", **IMAGES}
    caption = ", ".join(text.format(run.knn[key]) for key, text in told.items() if isinstance(run.knn.get(key), (int, float)))
    rows = [(name, 100 * accuracy, "") for name, accuracy in _rows(run.knn).items()]
    return {"title": "Nearest neighbours", "rows": rows, "caption": f"Weighted kNN: {caption}" if caption else ""}


def _classifier_table(tested: dict[str, Any], title: str, how: str) -> dict[str, Any]:
    """The same of eval/linear.json or eval/finetune.json; the remark is the top-5 accuracy where there is one."""
    images = ", ".join(text.format(tested[key]) for key, text in IMAGES.items() if isinstance(tested.get(key), int))
    caption = "; ".join(text for text in (tested.get("words"), images) if text)
    top5 = {str(row["name"]): f"top-5 {row['top5']:.1%}" for row in tested.get("rows", []) if math.isfinite(_number(row, "top5"))}
    rows = [(name, 100 * accuracy, top5.get(name, "")) for name, accuracy in _rows(tested).items()]
    return {"title": title, "rows": rows, "caption": f"{how}: {caption}" if caption else ""}


def _tables(run: Run) -> list[dict[str, Any]]:
    return [
        _knn_table(run),
        _classifier_table(run.linear, "Linear classifier", "On frozen features"),
        _classifier_table(run.finetuned, "Fine-tuned", "All weights trained with the labels"),
    ]


def _broken(run: Run) -> dict[str, str]:
    """Reason by file, each file once however often it was met."""
    return {str(record.get("file", "?")): str(record.get("reason", "?")) for record in run.records["broken"]}


def _flat(value: Any, path: str = ""):
    """(key.path, value) of every leaf of nested dicts and lists of dicts."""
    if isinstance(value, dict) and value:
        pairs = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        pairs = enumerate(value)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)
        return
    for key, item in pairs:
        yield from _flat(item, f"{path}.{key}".lstrip("."))


def charts(run: Run) -> list[dict[str, Any]]:
    """What the page draws, most telling first: every chart the run has numbers for."""
    count, marks = run.prototypes, [record["step"] for record in run.records["resume"]]
    whole = f"of ln {count}, %" if count else "in nats"
    accuracies = {name: 100 * accuracy for name, accuracy in _rows(run.knn).items()}
    drawn = [
        line_chart("Loss", run.series("loss"), lines=run.chance, marks=marks),
        line_chart("Accuracy of kNN, %", run.series("accuracy", 100, kind="knn"), lines=accuracies, marks=marks, dots=True),
        line_chart("Learning rate", run.series("lr"), marks=marks, floor=0),
        line_chart("Prototypes used", run.series("prototypes_used"), lines={"all": count} if count else {}, marks=marks, floor=0),
        line_chart(
            f"Entropy of the mean softmax, {whole}", run.series("prototype_entropy", 100 / math.log(count) if count else 1), marks=marks,
            lines={"all prototypes alike": 100} if count else {},
        ),
        usage_chart(run),
        line_chart("Images a second", run.series("images_per_second"), marks=marks, floor=0),
        line_chart("Time spent waiting for data, %", run.series("data_wait_share", 100), marks=marks, floor=0),
    ]
    others = dict.fromkeys(key for record in run.records["train"] for key in record if key not in NO_CHART_OF_ITS_OWN)
    drawn += [line_chart(key.replace("_", " "), run.series(key), marks=marks) for key in others]
    return [chart for chart in drawn if chart]


def usage_chart(run: Run) -> dict[str, Any] | None:
    """Bars of the shares in the last record, of all prototypes or the most used."""
    usage = next((record["prototype_usage"] for record in reversed(run.records["train"]) if record.get("prototype_usage")), [])
    shares = sorted((100 * share for share in usage if isinstance(share, (int, float)) and math.isfinite(share)), reverse=True)
    if not shares:
        return None
    count = max(run.prototypes, len(shares))
    title = f"Share of the {len(shares):,} most used prototypes, %" if len(shares) < count else "Share of each prototype, %"
    return bar_chart(title, shares, {f"even, 1/{count}": 100 / count})
