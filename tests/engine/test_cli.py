"""Does the command line say what it can do, and what a mistake was?"""

import sys

import pytest

from fuseer.engine import cli, doctor
from fuseer.engine.cli import main
from fuseer.engine.recipes.recipe import recipe_names


def test_alone_it_lists_its_commands(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("demo", "doctor", "recipes", "pretrain", "eval knn", "report", "deepspeed"))


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
        (["report", "run=/no/such/run"], "/no/such/run"),
        (["demo", "recipe=tiny"], "did you mean tiny_swav"),
    ],
)
def test_mistakes_are_one_sentence(words, expected, capsys):
    assert main(words) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and said.startswith("fuseer: ") and "\n" not in said


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
