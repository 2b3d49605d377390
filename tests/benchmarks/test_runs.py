"""Does the table of methods say what the runs say, and does it refuse runs whose numbers do not belong together?"""

import json
import shutil

import pytest

from benchmarks import measure, report, runs
from fuseer.engine.cli import main


@pytest.fixture(scope="module")
def evaluated(small_run, tmp_path_factory):
    """A real run with both of its evaluations."""
    run = shutil.copytree(small_run, tmp_path_factory.mktemp("runs") / "run")
    assert main(["eval", "knn", f"run={run}"]) == main(["eval", "linear", f"run={run}", "epochs=2"]) == 0
    return run


def changed(run, place, name, change):
    """A copy of the run in which `change` has been made to the JSON of the file `name`."""
    shutil.copytree(run, place)
    content = json.loads((place / name).read_text())
    change(content)
    (place / name).write_text(json.dumps(content))
    return place


def accuracies(run, kind):
    return {row["name"]: f"{row['accuracy']:.2%}" for row in json.loads((run / "eval" / f"{kind}.json").read_text())["rows"]}


def logged(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_table_of_methods_is_made_from_the_runs(evaluated, tmp_path):
    other = changed(evaluated, tmp_path / "other", "config.json", lambda config: config.update(recipe="tiny_swav_long"))
    runs.condense_methods([evaluated, other], tmp_path)
    table = runs.method_table(tmp_path)
    knn, linear = accuracies(evaluated, "knn"), accuracies(evaluated, "linear")
    minutes = f"{max(record['seconds'] for record in logged(evaluated) if record['kind'] == 'train') / 60:.1f}"
    lines = table.splitlines()
    assert lines[0] == "| method | training, minutes | kNN | linear |"
    assert lines[2:6] == [
        f"| raw pixels | – | {knn['raw pixels']} | {linear['raw pixels']} |",
        *(f"| {name} | – | {knn[name]} | {linear[name]} |" for name in ["initialisation, BatchNorm calibrated"]),
        *(f"| SwAV (`{name}`) | {minutes} | {knn['pretrained']} | {linear['pretrained']} |" for name in ("tiny_swav", "tiny_swav_long")),
    ]
    assert len(lines) == 8 and lines[7].count("160 images to train on, 40 to test on; weighted kNN, k = 20") == 1
    environment = json.loads((evaluated / "env.json").read_text())
    origin = f"{environment['host']['cores']} cores, {environment['device']}, {environment['started'][:10]}"
    assert "changed: epochs 2 instead of 30" in lines[7] and f"Seed 0; {origin}, torch {environment['packages']['torch']}." in lines[7]


def test_a_run_replaces_that_of_its_recipe_and_other_baselines_get_a_row_of_their_own(evaluated, tmp_path):
    other = changed(evaluated, tmp_path / "other", "config.json", lambda config: config.update(recipe="tiny_swav_long"))
    runs.condense_methods([other, evaluated], tmp_path)
    better = changed(other, tmp_path / "better", "eval/linear.json", lambda tested: tested["rows"][0].update(accuracy=0.987))
    runs.condense_methods([better], tmp_path)
    assert [run["recipe"] for run in json.loads((tmp_path / "methods.json").read_text())["runs"]] == ["tiny_swav_long", "tiny_swav"]
    table = runs.method_table(tmp_path)
    first = accuracies(evaluated, "knn")["raw pixels"]
    assert f"| raw pixels, of `tiny_swav_long` | – | {first} | 98.70% |" in table and "| raw pixels, of `tiny_swav` | – |" in table
    assert "| initialisation, BatchNorm calibrated | – |" in table


def test_the_readme_gets_the_table_between_its_markers(evaluated, tmp_path, monkeypatch):
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "benchmarks.md").write_text("nothing measured")
    (tmp_path / "README.md").write_text("before\n<!-- methods -->\nold\n<!-- end methods -->\nafter\n")
    monkeypatch.setattr(measure, "RESULTS", results)
    monkeypatch.setattr(report, "write", lambda write=report.write: write(tmp_path))
    report.main([f"methods={evaluated}"])
    readme = (tmp_path / "README.md").read_text()
    assert readme == f"before\n<!-- methods -->\n{runs.method_table(results)}\n<!-- end methods -->\nafter\n"
    assert "SwAV (`tiny_swav`)" in readme
    report.main([])
    assert (tmp_path / "README.md").read_text() == readme
    with pytest.raises(ValueError, match=r"methods=RUN_FOLDER; got method=x"):
        report.main(["method=x"])


def test_the_demo_is_condensed_with_its_machine(evaluated, tmp_path):
    runs.condense("demo", evaluated, tmp_path)
    table = runs.demo_table(tmp_path)
    assert f"| raw pixels | {accuracies(evaluated, 'knn')['raw pixels']} |" in table and "| train / test images | 160 / 40 |" in table


def test_the_table_of_fine_tuning_needs_both_rows_of_the_runs_end(evaluated, tmp_path):
    run, results = shutil.copytree(evaluated, tmp_path / "run"), tmp_path / "results"
    results.mkdir()
    assert runs.finetune_table(results) == ""
    with pytest.raises(ValueError, match=r"no eval/finetune.json; run fuseer eval finetune run="):
        runs.condense_finetune(run, results)
    words = ["eval", "finetune", f"run={run}", "epochs=1", "batch_size=32"]
    assert main(words) == 0
    with pytest.raises(ValueError, match=r"fine-tuned as \['pretrained'\]; run .* with scratch=true and without"):
        runs.condense_finetune(run, results)
    assert main([*words, "scratch=true"]) == 0
    runs.condense_finetune(run, results)
    table, found = runs.finetune_table(results), accuracies(run, "finetune")
    assert f"| from scratch | {found['initialisation']} |" in table and f"| after SwAV (`tiny_swav`) | {found['pretrained']} |" in table
    assert "160 labelled images to train on, 40 to test on; protocol tiny" in table and "6 steps of pretraining" in table
    older = changed(run, tmp_path / "older", "eval/finetune.json", lambda tuned: tuned["rows"][1].update(step=5))
    with pytest.raises(ValueError, match="trained to step 6, and fine-tuned from step 5"):
        runs.condense_finetune(older, results)


def without(kind):
    return lambda run: (run / "eval" / f"{kind}.json").unlink()


def resumed(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "resume", "step": 3}\n')


def with_an_older_knn(run):
    tested = run / "eval" / "knn.json"
    tested.write_text(tested.read_text().replace('"step": 6', '"step": 5'))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("linear"), "no eval/linear.json; run fuseer eval linear run="),
        (without("knn"), "no eval/knn.json; run fuseer eval knn run="),
        (resumed, "was resumed"),
        (with_an_older_knn, "trained to step 6, its kNN is of 5 and its linear of 6"),
    ],
)
def test_runs_whose_numbers_do_not_belong_together_are_refused(evaluated, tmp_path, change, words):
    run = shutil.copytree(evaluated, tmp_path / "run")
    change(run)
    with pytest.raises(ValueError, match=words):
        runs.condense_methods([run], tmp_path)
    assert not (tmp_path / "methods.json").exists()


def test_two_runs_of_one_recipe_are_refused(evaluated, tmp_path):
    with pytest.raises(ValueError, match="one run per recipe; got tiny_swav, tiny_swav"):
        runs.condense_methods([evaluated, evaluated], tmp_path)
