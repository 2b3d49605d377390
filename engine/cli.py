"""What can be asked for at the command line? `fuseer` alone lists it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

USAGE = """\
fuseer: self-supervised pretraining of vision models

  fuseer demo [out=FOLDER] [recipe=tiny_swav]     pretrain on the bundled photographs, evaluate, write a report
  fuseer doctor                                   what was found on this machine, what is switched off and why
  fuseer recipes                                  the recipes, with what each expects
  fuseer plan recipe=NAME gpus=N gpu=h100|a100|v100|… [images=N] [key.path=value …]
                                                  memory, messages and hours before a run: does it fit, under which ZeRO stage?
  fuseer pretrain recipe=NAME out=FOLDER [data=FOLDER] [resume=true|auto] [key.path=value …]
  fuseer eval knn run=FOLDER                      weighted kNN of a run's backbone, beside its initialisation and raw pixels
  fuseer eval linear run=FOLDER [protocol=NAME] [epochs=N] [batch_size=N] [lr=X]
                                                  a linear classifier on the frozen backbone, beside the same two
  fuseer eval finetune run=FOLDER [scratch=true] [protocol=NAME] [data=FOLDER] [epochs=N] [batch_size=N] [lr=X] …
                                                  all weights trained with labels, or those of the initialisation, then tested
  fuseer import mae file=FILE.pth out=FOLDER [data=FOLDER] [heads=N]
  fuseer import swav file=FILE.pth.tar out=FOLDER [data=FOLDER]
  fuseer import seer file=FILE.torch out=FOLDER [data=FOLDER] [bgr=true]
                                                  an official checkpoint becomes a run to evaluate, fine-tune and export
  fuseer export run=FOLDER out=FILE.safetensors [finetuned=true] [image_size=N]
                                                  the backbone under timm's keys; tried on timm's model before it is written
  fuseer data index path=PATH [split=train|test|val]
                                                  index a folder, tar shards or a list file anew; images, classes, bytes
  fuseer data check path=PATH [pipeline=dali|torchvision] [threads=N] [report=broken.tsv] [list=FILE] [split=…]
                                                  decode every image, name the broken; list=: a list file of the sound
  fuseer data pack path=PATH out=FOLDER [shard_size=256MB] [max_broken_share=0.01] [split=…]
                                                  copy images and labels into tar shards with index
  fuseer data preview recipe=NAME [data=PATH] [out=views.png] [images=8] [key.path=value …]
                                                  a sheet of the views that the recipe makes of the first images
  fuseer report run=FOLDER                        write FOLDER/report.html
  fuseer bench [OP|sweep|step|report] [device=cpu|cuda] [repeats=N] [threads=N] [case=NAME]
                                                  time the ops beside what they have to beat (in a checkout only)

On several accelerators or processes:
  deepspeed --num_accelerators 2 --module fuseer.engine.train recipe=NAME out=FOLDER …
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; a mistake of the caller's is one sentence on stderr and exit status 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _settle_threads()
    try:
        return _dispatch(arguments)
    except (ValueError, TypeError, RuntimeError, FileNotFoundError, PermissionError) as error:
        if "FUSEER_TRACEBACK" in os.environ:
            raise
        print(f"fuseer: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        said = "interrupted; what was written stands, and pretraining goes on from its last checkpoint with resume=true"
        print(f"fuseer: {said}", file=sys.stderr)
        return 130


def _settle_threads() -> None:
    """Idle OpenMP threads must not spin for long: two spinning ranks on two cores are ten times slower. Read once, when torch loads.

    Nor may they sleep at once: a process alone on two cores then pays a wake-up per operator, which on small images makes two threads
    slower than one. A bounded spin gave 1.5 times the images per second of none.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")


def _dispatch(arguments: list[str]) -> int:
    words = [word for word in arguments if "=" not in word and not word.startswith("--local_rank")]
    options = dict(word.split("=", 1) for word in arguments if "=" in word and not word.startswith("--local_rank"))
    if not words or words[0] in ("help", "-h", "--help"):
        print(USAGE)
        return 0
    if words[0] == "bench":
        return _bench(arguments[arguments.index("bench") + 1 :])
    commands = {
        "demo": _demo,
        "doctor": _doctor,
        "recipes": _recipes,
        "plan": _plan,
        "pretrain": _pretrain,
        "eval knn": _eval_knn,
        "eval linear": _eval_linear,
        "eval finetune": _eval_finetune,
        "import mae": _import_mae,
        "import swav": _import_swav,
        "import seer": _import_seer,
        "data index": _data_index,
        "data check": _data_check,
        "data pack": _data_pack,
        "data preview": _data_preview,
        "export": _export,
        "report": _report,
    }
    name = " ".join(words)
    if name not in commands:
        raise ValueError(f"unknown command {name}{_nearest(name, commands)}")
    return commands[name](options)


def _nearest(word: str, choices) -> str:
    from fuseer.engine.config import nearest

    return nearest(word, choices)


def _only(options: dict[str, str], command: str, known: tuple[str, ...], needed: tuple[str, ...] = ()) -> None:
    for key in options:
        if key not in known:
            raise ValueError(f"{command}: unknown option {key}{_nearest(key, known)}")
    for key in needed:
        if key not in options:
            raise ValueError(f"{command}: {key}=… is missing")


def _configure(options: dict[str, str]):
    from fuseer.engine.config import apply_overrides
    from fuseer.engine.recipes.recipe import load_recipe

    overrides = {key: value for key, value in options.items() if key not in ("recipe", "out", "resume", "data")}
    if "data" in options:
        overrides["data.path"] = options["data"]
    if "steps" in overrides and "epochs" not in overrides:
        overrides["epochs"] = "0"
    if "epochs" in overrides and "steps" not in overrides:
        overrides["steps"] = "0"
    return apply_overrides(load_recipe(options["recipe"]).config(), overrides)


def _truth(options: dict[str, str], key: str) -> bool:
    value = options.get(key, "false").lower()
    if value not in ("true", "false"):
        raise ValueError(f"{key} must be true or false; got {options[key]}")
    return value == "true"


def _plan(options: dict[str, str]) -> int:
    from fuseer.engine.plan import show_plan

    return show_plan(options, _configure)


def _pretrain(options: dict[str, str]) -> int:
    for key in ("recipe", "out"):
        if key not in options:
            raise ValueError(f"pretrain: {key}=… is missing; see `fuseer recipes`")
    resume = "auto" if options.get("resume") == "auto" else _truth(options, "resume")
    config = _configure(options)
    from fuseer.engine import distributed
    from fuseer.engine.launch import loss_of_a_peer_in_words, take_ranks_from_slurm
    from fuseer.engine.log import say
    from fuseer.engine.preemption import EXIT_STATUS, Stopped
    from fuseer.engine.report import write_report
    from fuseer.engine.run import resolved
    from fuseer.engine.train import train

    try:
        out = Path(options["out"]).resolve()
        take_ranks_from_slurm()
        first = distributed.start().is_first
        if first:
            say(f"config\n{resolved(config).to_json()}\n")
        with loss_of_a_peer_in_words():
            train(config, out, resume=resume)
        if first:
            _draw(out)
            say(f"report {write_report(out)}")
    except Stopped as stopped:
        print(f"fuseer: {stopped}", file=sys.stderr)
        return EXIT_STATUS
    finally:
        distributed.stop()
    return 0


def _demo(options: dict[str, str]) -> int:
    _only(options, "demo", ("out", "recipe"))
    recipe = options.get("recipe", "tiny_swav")
    out = Path(options["out"]).resolve() if "out" in options else _fresh(Path.cwd() / "runs", "demo" if recipe == "tiny_swav" else recipe)
    started = time.perf_counter()
    if status := _pretrain({"recipe": recipe, "out": str(out)}):
        return status
    _eval_knn({"run": str(out)})
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    training = max(record["seconds"] for record in records if record["kind"] == "train")
    print(f"training      {training:.0f} s of {time.perf_counter() - started:.0f} s in all")
    print(f"linear probe  fuseer eval linear run={options.get('out', os.path.relpath(out))}")
    print(f"report        {out / 'report.html'}\ncrop sheet    {out / 'crops.png'}")
    return 0


def _fresh(parent: Path, name: str) -> Path:
    """The first of name, name-2, name-3, … that does not exist."""
    return next(path for n in range(1, 10**6) if not (path := parent / (name if n == 1 else f"{name}-{n}")).exists())


def _eval_knn(options: dict[str, str]) -> int:
    run, config = _evaluated("eval knn", options, {"image_size": "knn.image_size"})
    from fuseer.engine.evaluate.probe import evaluate_run

    result = evaluate_run(run, config)
    images = f"{result['train_images']} train, {result['test_images']} test images"
    _tell(f"weighted kNN (k={result['k']}, T={result['temperature']}), {images}", result["rows"], run)
    return 0


def _eval_linear(options: dict[str, str]) -> int:
    keys = {key: f"linear.{key}" for key in ("protocol", "epochs", "batch_size", "lr")}
    run, config = _evaluated("eval linear", options, {**keys, "image_size": "knn.image_size"})
    from fuseer.engine.evaluate.linear import evaluate_linear

    result = evaluate_linear(run, config)
    images = f"{result['train_images']} train, {result['test_images']} test images of {result['image_size']} px"
    _tell(f"linear classifier ({result['protocol']}, {result['epochs']} epochs), {images}, {result['seconds']:.0f} s", result["rows"], run)
    return 0


def _eval_finetune(options: dict[str, str]) -> int:
    settings = ("protocol", "epochs", "batch_size", "micro_batch", "lr", "layer_decay", "drop_path")
    keys = {**{key: f"finetune.{key}" for key in settings}, "image_size": "knn.image_size", "data": "data.path", "seed": "seed"}
    scratch = _truth(options, "scratch")
    run, config = _evaluated("eval finetune", {key: value for key, value in options.items() if key != "scratch"}, keys)
    from fuseer.engine.evaluate.finetune import evaluate_finetune

    result = evaluate_finetune(run, config, scratch=scratch)
    images = f"{result['train_images']} train, {result['test_images']} test images of {result['image_size']} px"
    _tell(f"fine-tuned ({result['protocol']}, {result['epochs']} epochs), {images}", result["rows"], run)
    return 0


def _evaluated(command: str, options: dict[str, str], keys: dict[str, str]):
    """The run folder and its saved settings, with the options that stand in `keys` instead of theirs."""
    _only(options, command, ("run", *keys), needed=("run",))
    from fuseer.engine.config import apply_overrides
    from fuseer.engine.recipes.recipe import saved_config

    run = Path(options["run"]).resolve()
    return run, apply_overrides(saved_config(run), {path: options[key] for key, path in keys.items() if key in options})


def _tell(title: str, rows: list[dict], run: Path) -> None:
    """The table of an evaluation, and its report."""
    from fuseer.engine.report import write_report

    print(f"\n{title}")
    for row in rows:
        print(f"  {row['name']:<36} {row['accuracy']:7.2%}" + (f"   top-5 {row['top5']:7.2%}" if "top5" in row else ""))
    starts = [row["accuracy"] for row in rows if row["name"].startswith("initialisation")]
    better = "better " if len(starts) > 1 else ""
    if starts and rows[-1]["name"] == "pretrained":
        print(f"  {f'gain over the {better}initialisation':<36} {100 * (rows[-1]['accuracy'] - max(starts)):+6.2f} points")
    write_report(run)


def _import_mae(options: dict[str, str]) -> int:
    _only(options, "import mae", ("file", "out", "data", "heads"), needed=("file", "out"))
    from fuseer.engine.imports.mae import import_mae

    return _imported(import_mae, options, heads=_count(options, "heads"))


def _import_swav(options: dict[str, str]) -> int:
    _only(options, "import swav", ("file", "out", "data"), needed=("file", "out"))
    from fuseer.engine.imports.swav import import_swav

    return _imported(import_swav, options)


def _import_seer(options: dict[str, str]) -> int:
    _only(options, "import seer", ("file", "out", "data", "bgr"), needed=("file", "out"))
    from fuseer.engine.imports.swav import import_seer

    return _imported(import_seer, options, bgr=_truth(options, "bgr"))


def _imported(importer, options: dict[str, str], **how) -> int:
    out = Path(options["out"]).resolve()
    found = importer(Path(options["file"]).resolve(), out, data=options.get("data"), **how)
    classifier = f", classifier of {found['classes']} classes" if found["classes"] else ""
    print(f"{found['kind']}: {found['model']}{classifier}")
    if found["difference"] is not None:
        print(f"features differ from timm's by {found['difference']:.1e} of the largest")
    for remark in found.get("remarks", ()):
        print(remark)
    print(f"run {out}")
    return 0


def _data_index(options: dict[str, str]) -> int:
    _only(options, "data index", ("path", "split"), needed=("path",))
    from fuseer.engine.curate import index_images

    return index_images(options["path"], options.get("split"))


def _data_check(options: dict[str, str]) -> int:
    _only(options, "data check", ("path", "split", "pipeline", "threads", "report", "list"), needed=("path",))
    from fuseer.engine.curate import check_images

    report, clean = Path(options.get("report", "broken.tsv")).resolve(), Path(options["list"]).resolve() if "list" in options else None
    how = {"pipeline": options.get("pipeline", "auto"), "threads": _count(options, "threads")}
    return check_images(options["path"], options.get("split"), report=report, clean=clean, **how)


def _data_pack(options: dict[str, str]) -> int:
    _only(options, "data pack", ("path", "out", "split", "shard_size", "max_broken_share"), needed=("path", "out"))
    from fuseer.engine.curate import pack_images

    limits = {"shard_size": options.get("shard_size", "256MB"), "max_broken_share": options.get("max_broken_share", "0.01")}
    return pack_images(options["path"], options.get("split"), Path(options["out"]).resolve(), **limits)


def _data_preview(options: dict[str, str]) -> int:
    if "recipe" not in options:
        raise ValueError("data preview: recipe=… is missing; see `fuseer recipes`")
    config = _configure({key: value for key, value in options.items() if key != "images"})
    from fuseer.engine.preview import preview

    out = Path(options.get("out", "views.png")).resolve()
    found = preview(config, out, _count({"images": "8", **options}, "images"))
    print(f"{out}: {found['views']} views of {found['images']} images, through {found['pipeline']}")
    return 0


def _export(options: dict[str, str]) -> int:
    _only(options, "export", ("run", "out", "finetuned", "image_size"), needed=("run", "out"))
    from fuseer.engine.export import export

    size, out = _count(options, "image_size"), Path(options["out"]).resolve()
    found = export(Path(options["run"]).resolve(), out, finetuned=_truth(options, "finetuned"), image_size=size)
    print(f"{out}: {found['keys']} tensors under timm's keys")
    if found["difference"] is None:
        print("timm has no model of this shape; engine/models/regnet.py from_timm takes the keys back")
    else:
        print(f"{found['model']}.load_state_dict(…, strict=True)\noutputs differ by {found['difference']:.1e} of the largest")
    return 0


def _count(options: dict[str, str], key: str) -> int:
    value = options.get(key, "0")
    if not value.isdecimal():
        raise ValueError(f"{key} must be a whole number; got {value}")
    return int(value)


def _report(options: dict[str, str]) -> int:
    _only(options, "report", ("run",), needed=("run",))
    from fuseer.engine.report import write_report

    run = Path(options["run"]).resolve()
    if (run / "ckpt").is_dir():
        _draw(run)
    print(write_report(run))
    return 0


def _draw(run: Path) -> None:
    """The pictures of the run's ViT, where it has one; a report does without them."""
    from fuseer.engine.evaluate.pictures import draw_pictures

    try:
        draw_pictures(run)
    except (ValueError, OSError) as error:
        print(f"pictures      none: {error}")


def _bench(arguments: list[str]) -> int:
    """Hands the words, `key=value` or `--key value`, to benchmarks/run.py, which stands beside engine/ in a checkout and in no wheel."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "run.py").is_file():
        raise RuntimeError("bench: the benchmarks are not part of an installation; clone the repository and run make bench there")
    return subprocess.run([sys.executable, "-m", "benchmarks.run", *arguments], cwd=checkout, check=False).returncode


def _recipes(options: dict[str, str]) -> int:
    _only(options, "recipes", ())
    from fuseer.engine.recipes.recipe import load_recipe, recipe_names

    for name in recipe_names():
        print(f"{name}\n    " + load_recipe(name).__doc__.strip().replace("\n", "\n    ") + "\n")
    return 0


def _doctor(options: dict[str, str]) -> int:
    _only(options, "doctor", ())
    from fuseer.engine.doctor import findings

    for name, state, remark in findings():
        print(f"{name:<14} {state:<12} {remark}")
    return 0
