"""Does a run go on exactly where it stopped, start under the real launcher, and refuse what it cannot do in one sentence?"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fuseer.engine import distributed
from fuseer.engine.cli import main
from fuseer.engine.config import apply_overrides
from fuseer.engine.data.sources import open_source
from fuseer.engine.evaluate.probe import evaluate_run
from fuseer.engine.methods.method import Loss
from fuseer.engine.methods.swav import SwAV
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.engine.train import train

STEPS_PER_EPOCH, TOTAL = 4, 32
SMALL = {
    "method.hidden_widths": "[16]",
    "method.embedding_width": "8",
    "method.prototypes": "6",
    "method.freeze_prototypes_steps": "3",
    "method.queue_length": "16",
    "model.name": "anynet",
    "model.options": '{"depths": [1], "widths": [16], "group_widths": 8, "stem_width": 8, "stem_stride": 2}',
    "batch_size": "8",
    "optim.warmup_steps": "2",
    "log_every_steps": "1",
    "knn.every_steps": "0",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """35 real photographs in two class folders: four batches of 8 an epoch, three images left over."""
    folder = tmp_path_factory.mktemp("images")
    paths = open_source("demo", split="train").paths
    for number, path in enumerate([*paths[:20], *paths[-15:]]):
        place = folder / Path(path).parent.name
        place.mkdir(exist_ok=True)
        shutil.copy(path, place / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module", autouse=True)
def leave_the_world():
    yield
    distributed.stop()


def small(images: Path, **more):
    given = {**SMALL, "data.path": str(images), "epochs": "0", "steps": str(TOTAL), **more}
    return apply_overrides(load_recipe("tiny_swav").config(), given)


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


@pytest.fixture(scope="module", params=["dali", "torchvision"])
def whole(request, images, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "run"
    # of the two runs one writes its checkpoints while it trains
    kept = {"checkpoint_every_steps": "1", "keep_checkpoints": str(TOTAL), "checkpoint_async": str(request.param == "torchvision").lower()}
    config = small(images, **{"data.pipeline": request.param, **kept})
    train(config, out)
    return config, out


@pytest.mark.parametrize("stop", [2, STEPS_PER_EPOCH * 3, 10], ids=["queue filling", "end of an epoch", "mid-epoch"])
def test_resume_is_bitwise(whole, stop, tmp_path):
    config, out = whole
    again = tmp_path / "run"
    (again / "ckpt").mkdir(parents=True)
    shutil.copy(out / "config.json", again)
    shutil.copytree(out / "ckpt" / f"step_{stop:08d}", again / "ckpt" / f"step_{stop:08d}")
    train(config, again, resume=True)
    expected = losses(out)
    resumed = losses(again)
    assert list(resumed) == list(range(stop + 1, TOTAL + 1)) and len(resumed) >= 20
    assert {step: expected[step] for step in resumed} == resumed
    assert len(set(resumed.values())) > 15, "the losses differ from step to step"


def test_the_run_folder_is_complete(whole):
    _, out = whole
    assert {path.name for path in out.iterdir()} == {"config.json", "env.json", "metrics.jsonl", "events", "ckpt", "crops.png"}
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    wanted = {"kind", "step", "epoch", "loss", "lr", "images_per_second", "data_wait_share", "seconds"}
    wanted |= {"crops_per_second", "step_seconds"}
    assert set(first["step_seconds"]) == {"data", "forward", "backward", "update"}
    assert wanted | {"prototype_entropy", "prototypes_used", "prototype_usage"} <= first.keys()


def test_resume_refuses_what_would_not_go_on(whole, images, tmp_path):
    config, out = whole
    with pytest.raises(ValueError, match="already holds a run; add resume=true"):
        train(config, out)
    with pytest.raises(ValueError, match="holds no run"):
        train(config, tmp_path / "none", resume=True)
    with pytest.raises(ValueError, match="batch_size was 8 .* now 4"):
        train(config.model_copy(update={"batch_size": 4}), out, resume=True)
    with pytest.raises(ValueError, match="already at step 32 of 32"):
        train(config, out, resume=True)
    twin = config.data.model_copy(update={"pipeline": {"dali": "torchvision", "torchvision": "dali"}[config.data.pipeline]})
    with pytest.raises(ValueError, match=f'data was .*"pipeline": "{config.data.pipeline}".* and is now .*"pipeline": "{twin.pipeline}"'):
        train(config.model_copy(update={"data": twin}), out, resume=True)
    other = tmp_path / "other"
    shutil.copytree(images, other)
    next(other.rglob("*.png")).unlink()
    moved = config.model_copy(update={"data": config.data.model_copy(update={"path": str(other)})})
    with pytest.raises(ValueError, match="images have changed .*35 then, 34 now"):
        train(moved, out, resume=True)


@pytest.mark.parametrize("stage", ["0", "3"])
def test_knn_of_the_saved_run_is_that_of_the_live_one(images, tmp_path, monkeypatch, stage):
    """The probe during training sees the network itself, `eval knn` the checkpoint: the same number, beside the initialisation's."""
    cut_every_parameter(monkeypatch)
    folder = tmp_path / "split"
    for split in ("train", "test"):
        shutil.copytree(images, folder / split)
    out = tmp_path / "run"
    optim = {"optim.name": "lars", "optim.lr": "0.5", "zero_stage": stage}
    train(small(folder, **{"steps": "4", "knn.every_steps": "4", "knn.k": "3", **optim}), out)
    (live,) = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if '"knn"' in line]
    found = evaluate_run(out)
    rows = {row["name"]: row["accuracy"] for row in found["rows"]}
    assert list(rows) == ["raw pixels", "initialisation", "initialisation, BatchNorm calibrated", "pretrained"]
    assert rows["pretrained"] == live["accuracy"] and found["step"] == 4
    assert rows["raw pixels"] > 0.5, "every test image is among the train images"
    assert json.loads((out / "eval" / "knn.json").read_text()) == found


def cut_every_parameter(monkeypatch) -> None:
    """Leaves no parameter whole under ZeRO 3, however small."""
    made = distributed.deepspeed_config

    def cut(config, world_size):
        tree = made(config, world_size)
        tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return tree

    monkeypatch.setattr(distributed, "deepspeed_config", cut)


def test_a_resumed_run_goes_on_where_steps_were_skipped(images, tmp_path, monkeypatch):
    """Every step takes its own batch and rate, applied or not."""
    calls, poisoned = iter(range(10**6)), {2, 3}
    forward = SwAV.forward

    def poison(self, batch):
        loss = forward(self, batch)
        return loss._replace(total=loss.total * float("inf")) if next(calls) in poisoned else loss

    monkeypatch.setattr(SwAV, "forward", poison)
    config = small(images, **{"steps": "6", "zero_stage": "1", "checkpoint_every_steps": "4", "optim.name": "lars", "optim.lr": "0.5"})
    out, again, clean = tmp_path / "out", tmp_path / "again", tmp_path / "clean"
    train(config, out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "skipped"] == [3, 4] and list(losses(out)) == [1, 2, 5, 6]
    shutil.copytree(out, again)
    shutil.rmtree(again / "ckpt" / "step_00000006")
    (again / "metrics.jsonl").write_text("")
    train(config, again, resume=True)
    assert losses(again) == {step: losses(out)[step] for step in (5, 6)}
    poisoned.clear()
    train(config, clean)
    rates = [
        {record["step"]: record["lr"] for record in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "lr" in record}
        for run in (out, clean)
    ]
    assert len(rates[1]) == 6 and rates[0] == {step: rates[1][step] for step in losses(out)}
    assert losses(clean)[2] == losses(out)[2] and losses(clean)[5] != losses(out)[5]


def test_a_run_that_only_skips_ends(images, tmp_path, monkeypatch):
    forward = SwAV.forward
    monkeypatch.setattr(SwAV, "forward", lambda self, batch: Loss(forward(self, batch).total * float("inf"), {}))
    with pytest.raises(RuntimeError, match="3 steps in a row up to step 3 had a loss or gradients that are not finite, .* lower optim.lr"):
        train(small(images, **{"steps": "6", "zero_stage": "1", "max_skipped_steps": "3"}), tmp_path / "out")


def arguments(images: Path, out: Path, **more) -> list[str]:
    options = {**SMALL, "steps": "2", "data": str(images), "out": str(out), "recipe": "tiny_swav", **more}
    return ["pretrain", *(f"{key}={value}" for key, value in options.items())]


def refused(capsys, words: list[str]) -> str:
    assert main(words) == 2
    captured = capsys.readouterr().err.strip()
    assert captured.startswith("fuseer: ") and "\n" not in captured and "Traceback" not in captured
    return captured


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"data": "/no/such/folder"}, "/no/such/folder does not exist"),
        ({"batch_size": "36"}, "36 .*35 images"),
        ({"method.prototypes": "0"}, "method.prototypes"),
        ({"method.protoypes": "5"}, "unknown key method.protoypes; did you mean prototypes"),
        ({"recipe": "tiny_swavv"}, "did you mean tiny_swav"),
        ({"model.options": '{"depths": [1], "depht": 2}'}, "depht"),
        ({"model.name": "regnety_600m"}, "regnety_600mf"),
        ({"resume": "yes"}, "resume must be true or false"),
    ],
)
def test_bad_input_is_one_sentence(images, tmp_path, capsys, more, words):
    assert re.search(words, refused(capsys, arguments(images, tmp_path / "out", **more)))
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_odd_images_train_and_broken_ones_are_named(images, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(images, folder)
    photograph = Image.open(next(images.rglob("*.png")))
    photograph.convert("CMYK").save(folder / "cmyk.jpg")
    photograph.convert("RGBA").save(folder / "rgba.png")
    photograph.convert("P").save(folder / "palette.png")
    photograph.convert("I").point(lambda x: x * 257).convert("I;16").save(folder / "sixteen.png")
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    (folder / "text.jpg").write_text("no image")
    whole_jpeg = folder / "truncated.jpg"
    photograph.convert("RGB").resize((200, 200)).save(whole_jpeg)
    whole_jpeg.write_bytes(whole_jpeg.read_bytes()[:1500])
    fuseer = [str(Path(sys.executable).parent / "fuseer")]
    out = tmp_path / "out"
    lenient = arguments(folder, out, steps="10", **{"data.max_broken_share": "0.2"})
    done = subprocess.run([*fuseer, *lenient], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    broken = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if '"broken"' in line]
    assert {Path(record["file"]).name for record in broken} == {"text.jpg", "truncated.jpg"}
    assert done.stdout.count("skipped a broken image") == 2
    strict = arguments(folder, tmp_path / "strict", steps="10", **{"data.max_broken_share": "0"})
    done = subprocess.run([*fuseer, *strict], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "broken" in done.stderr and ("text.jpg" in done.stderr or "truncated.jpg" in done.stderr)


def test_the_real_launcher_trains_three_ranks(images, tmp_path):
    out = tmp_path / "run"
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "3", "--module", "fuseer.engine.train"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = str(Path(sys.executable).parent)  # neither compiler nor ninja: DeepSpeed must not want to build anything
    more = {"optim.name": "lars", "zero_stage": "3", "model.sync_norm_ranks": "3", "precision": "bf16-autocast", "accumulation_steps": "2"}
    more |= {"batch_size": "12", "method.queue_length": "24"}
    done = subprocess.run(
        [*command, *arguments(images, out, **more)[1:]], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(losses(out)) == [1, 2]
    assert json.loads((out / "env.json").read_text())["ranks"] == 3
    assert (out / "report.html").exists() and (out / "ckpt" / "step_00000002" / "meta.json").exists()
