"""Does the command line say what it can do, and what a mistake was?"""

import json
import re
import shutil
import sys

import pytest

from fuseer.engine import cli, doctor
from fuseer.engine.cli import main
from fuseer.engine.recipes.recipe import load_recipe, recipe_names


def test_alone_it_lists_its_commands(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("demo", "doctor", "recipes", "pretrain", "eval knn", "eval linear", "report", "deepspeed"))


def test_recipes_shows_command_and_result(capsys):
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in recipe_names())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pretrian", "recipe=tiny_swav"], "did you mean pretrain?"),
        (["eval", "kn"], "did you mean eval knn?"),
        (["report", "rum=x"], "unknown option rum; did you mean run"),
        (["report"], "run=… is missing"),
        (["pretrain", "recipe=tiny_swav"], "out=… is missing"),
        (["eval", "knn", "run=/no/such/run"], "/no/such/run holds no config.json"),
        (["eval", "knn", "protocol=moco"], "unknown option protocol"),
        (["eval", "liner", "run=x"], "did you mean eval linear?"),
        (["eval", "linear"], "run=… is missing"),
        (["eval", "linear", "run=x", "epoch=3"], "unknown option epoch; did you mean epochs?"),
        (["eval", "linear", "run=/no/such/run"], "/no/such/run holds no config.json"),
        (["report", "run=/no/such/run"], "/no/such/run"),
        (["demo", "recipe=tiny_swaw"], "did you mean tiny_swav"),
    ],
)
def test_mistakes_are_one_sentence(words, expected, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and said.startswith("fuseer: ") and "\n" not in said


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("epochs=0", "linear.epochs: Input should be greater than or equal to 1 (got 0)"),
        ("batch_size=-4", "linear.batch_size: Input should be greater than or equal to 1 (got -4)"),
        ("lr=fast", "linear.lr: Input should be a valid number"),
        ("protocol=mocco", "there is no protocol mocco; did you mean moco"),
        ("protocol=simclr", "{folder} holds no complete one"),
    ],
)
def test_mistakes_of_the_linear_evaluation_are_one_sentence(tmp_path, option, expected, capsys):
    (tmp_path / "config.json").write_text(load_recipe("tiny_swav").config().to_json())
    assert main(["eval", "linear", f"run={tmp_path}", option]) == 2
    said = capsys.readouterr().err.strip()
    assert expected.format(folder=tmp_path / "ckpt") in said and said.startswith("fuseer: ") and "\n" not in said


def test_both_evaluations_print_their_rows_and_fill_the_report(small_run, tmp_path, capsys):
    run = shutil.copytree(small_run, tmp_path / "run")
    assert main(["eval", "knn", f"run={run}"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"weighted kNN \(k=20, T=0.07\), 160 train, 40 test images\n  raw pixels +\d", said), said
    assert re.search(r"gain over the better initialisation +[+-]\d", said)
    assert main(["eval", "linear", f"run={run}", "protocol=moco", "epochs=2", "batch_size=40", "lr=0.5", "image_size=14"]) == 0
    said = capsys.readouterr().out
    assert "epochs 2 instead of 100, batch_size 40 instead of 256, lr 0.5 instead of 30" in said and "\nepoch 2/2  raw pixels" in said
    assert "linear classifier (moco, 2 epochs), 160 train, 40 test images of 14 px" in said
    rows = {row["name"]: row for row in json.loads((run / "eval" / "linear.json").read_text())["rows"]}
    for name, row in rows.items():
        assert re.search(rf"\n  {name} +{row['accuracy']:.2%} +top-5 +{row['top5']:.2%}\n", said), name
    assert re.search(r"gain over the initialisation +[+-]\d", said)
    page = (run / "report.html").read_text()
    assert "Nearest neighbours" in page and "Linear classifier" in page and f"{rows['pretrained']['accuracy']:.1%}" in page


def test_doctor_reports_every_part(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("torch", "GPU", "fuseer._C", "deepspeed", "DALI", "apex", "g++", "nvcc", "chromium"))


def test_doctor_recognises_the_other_apex(tmp_path, monkeypatch):
    """PyPI's apex, as its wheel installs it: a package of that name without apex/optimizers."""
    place = tmp_path / "apex-0.9.10.dev0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10.dev0\n")
    (place / "RECORD").write_text("apex/__init__.py,,\napex/lib/libapex.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = next(row for row in doctor.findings() if row[0] == "apex")
    assert row[1] == "wrong one" and "pip uninstall apex" in row[2]
    (place / "RECORD").write_text("apex/__init__.py,,\napex/optimizers/__init__.py,,\n")
    assert next(row for row in doctor.findings() if row[0] == "apex")[1] == "0.9.10.dev0"
    assert "apex" not in sys.modules, "it is looked at, never imported"


def test_bench_refuses_an_unknown_op_in_one_sentence(capfd):
    assert main(["bench", "sinkhron"]) == 2
    said = capfd.readouterr().err.strip()
    assert said.startswith("fuseer: bench: choose one of") and said.endswith("got sinkhron") and "\n" not in said


def test_bench_says_that_an_installation_has_no_benchmarks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fuseer" / "engine" / "cli.py"))
    assert main(["bench"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("fuseer: bench: the benchmarks are not part of an installation") and "\n" not in said
