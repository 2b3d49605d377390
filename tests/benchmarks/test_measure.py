"""Would the benchmarks time a wrong result, believe a busy machine, or publish a number without its origin?"""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import measure, report, run
from benchmarks.kernels import sinkhorn as sinkhorn_programs
from benchmarks.kernels import swapped_prediction as swapped_programs
from fuseer.kernels import functional

MACHINE = {
    **{"date": "2026-01-02T03:04:05+00:00", "commit": "abc1234", "dirty": False, "device": "A Processor", "instruction_set": "AVX512"},
    **{"cores": 2, "threads": 2, "python": "3.11", "torch": "2.14", "triton": "3.8", "lightly": "absent"},
    **{"copy_gb_s": 20.0, "fma_g_s": 50.0},
}
CALM = [1.0, 1.1, 1.2, 1.0, 1.1]
KINDS = {"official": "eager", "compile": "compile", "cpu": "ours", "reference": "ours", "copy": "floor"}


def small(op):
    return next(case for case in run.part(op, "cases").CASES if not case.production)


@pytest.fixture
def quick(monkeypatch):
    """No lightly, no minutes of rates, and a machine that passes for calm: whether it is has tests of its own."""
    monkeypatch.setitem(sys.modules, "lightly", None)
    monkeypatch.setattr(measure, "rates", lambda device: {"copy_gb_s": 20.0, "fma_g_s": 50.0})
    monkeypatch.setattr(measure, "MAX_SPREAD", float("inf"))


@pytest.mark.parametrize("op", run.OPS)
def test_every_op_is_benchmarked_on_every_backend(op, quick):
    case = small(op)
    found, rejected = run.bench(op, [case], repeats=3, with_compile=False, with_memory=False)
    assert not rejected
    arguments = run.inputs(case, case.dtype)
    assert {row["program"] for row in found} == {"official", *run.backends(op, arguments)}
    assert [row["program"] for row in found if row["preferred"]] == [run.backends(op, arguments)[0]]
    for row in found:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["operations"] >= 1 and row["repeats"] == 3
        assert row["floor_bytes"] > 0 and row["floor_ms"] == max(row["copy_ms"], row["arithmetic_ms"])


def test_every_op_of_the_public_list_has_a_benchmark():
    assert set(run.OPS) == set(functional.__all__)


def test_a_wrong_backend_gets_no_speed(quick, monkeypatch):
    timed = []
    right = functional.sinkhorn
    monkeypatch.setattr(functional, "sinkhorn", lambda scores, **options: right(scores, **options) * (1 + 1e-4))
    monkeypatch.setattr(measure, "timed", lambda *arguments, **options: timed.append(arguments))
    with pytest.raises(run.Wrong, match=r"sinkhorn small: backend \w+ is wrong, so nothing is timed: out max\|error\|"):
        run.bench("sinkhorn", [small("sinkhorn")], repeats=3, with_compile=False, with_memory=False)
    assert not timed


@pytest.mark.parametrize(("op", "module"), [("sinkhorn", sinkhorn_programs), ("swapped_prediction", swapped_programs)])
def test_a_baseline_that_is_another_function_is_refused(op, module, quick, monkeypatch):
    right = module.official
    monkeypatch.setattr(module, "official", lambda **given: right(**{**given, "iterations": given["iterations"] + 3}))
    with pytest.raises(run.Wrong, match=f"{op} .*: official is another function than {op}"):
        run.bench(op, [small(op)], repeats=3, with_compile=False, with_memory=False)


def planted(controls):
    """seconds_of that gives the control loop these numbers in turn and every program 0.5."""
    numbers = itertools.chain(*controls)
    return lambda program: next(numbers) if program == "control" else 0.5


def test_a_disturbed_run_is_thrown_away_and_repeated():
    disturbed = [1.0, 1.0, 2.9, 2.9, 2.9]
    timing = measure.timed({"a": "a"}, "control", repeats=4, seconds_of=planted([disturbed, CALM]))
    assert timing.attempts == 2 and timing.spread == measure.spread(CALM) < 2 and timing.seconds == {"a": [0.5] * 4}
    with pytest.raises(measure.Rejected, match=r"p90/p10 was 2\.9, 2\.9, 2\.9 in 3 runs, above 2"):
        measure.timed({"a": "a"}, "control", repeats=4, seconds_of=planted([disturbed] * 3))


def test_a_rejected_case_leaves_no_row(quick, monkeypatch):
    def refuse(*arguments, **options):
        raise measure.Rejected("busy")

    monkeypatch.setattr(measure, "timed", refuse)
    found, rejected = run.bench("sinkhorn", [small("sinkhorn")], repeats=3, with_compile=False, with_memory=False)
    assert found == [] and rejected == ["sinkhorn small: rejected: busy"]


def test_spread_is_the_ninth_tenth_over_the_first():
    assert measure.spread([float(x) for x in range(10, 111)]) == pytest.approx(100 / 20)


def test_programs_take_turns_between_controls():
    calls = []
    measure.timed({name: name for name in "abc"}, "control", repeats=3, seconds_of=lambda program: calls.append(program) or 1.0)
    assert calls == ["control", *"abc", "control", *"bca", "control", *"cab", "control"]


def some_rows(case="swav_64", **times):
    """Rows of one case whose programs took these milliseconds every time."""
    times = {"official": 4.0, "compile": 2.0, "cpu": 0.5, "reference": 8.0, "copy": 0.25, **times}
    timing = measure.Timing({name: [ms / 1e3] * 5 for name, ms in times.items()}, 1.25, 1)
    work = measure.Work(bytes=1000, exponentials=10**6, multiply_adds=2 * 10**6)
    shape = {"case": case, "shape": "64×3000", "dtype": "float32"}
    found = measure.rows("sinkhorn", shape, timing, kinds=KINDS, work=work, machine=MACHINE)
    for row in found:
        row.update(preferred=row["program"] == "cpu", operations=3, extra_mb=1.5)
    return found


def test_speedup_is_over_the_faster_baseline_and_the_floor_names_its_bound():
    found = {row["program"]: row for row in some_rows()}
    assert "copy" not in found
    assert (found["cpu"]["speedup"], found["official"]["speedup"], found["compile"]["speedup"]) == (4.0, 0.5, 1.0)
    # (2 + 8 · 1) million multiply-adds at 50 G/s take 0.2 ms, the copy 0.25 ms
    assert (found["cpu"]["bound"], found["cpu"]["floor_ms"], found["cpu"]["of_floor"]) == ("memory", 0.25, 0.5)
    bound = {row["program"]: row for row in some_rows(copy=0.1)}["cpu"]
    assert (bound["bound"], bound["floor_ms"], bound["of_floor"]) == ("arithmetic", 0.2, 0.4)


def test_rows_say_where_they_come_from():
    for row in some_rows():
        assert row.items() >= MACHINE.items()
    found = measure.header()
    assert set(found) | {"copy_gb_s", "fma_g_s"} == set(MACHINE)
    assert found["date"][:2] == "20" and found["device"] and found["torch"] == torch.__version__ and isinstance(found["dirty"], bool)


def test_a_new_run_replaces_its_case_alone(tmp_path):
    measure.store("sinkhorn", some_rows("a") + some_rows("b"), folder=tmp_path)
    measure.store("sinkhorn", some_rows("b", cpu=0.4)[:3], folder=tmp_path)
    kept = measure.load(tmp_path / "sinkhorn.jsonl")
    assert [row["case"] for row in kept] == ["a"] * 4 + ["b"] * 3
    assert {row["p50_ms"] for row in kept if row["case"] == "b" and row["program"] == "cpu"} == {0.4}


def test_operations_count_work_and_not_views():
    x = torch.rand(5, 4)
    assert measure.operations(lambda: (x.t() + 1)[1:].exp().unsqueeze(0), "cpu") == 2
    assert measure.operations(lambda: functional.sinkhorn(x, backend="cpu"), "cpu") == 1
    assert measure.operations(lambda: functional.sinkhorn(x, backend="reference"), "cpu") > 10


MEMORY = """
import torch
from benchmarks.measure import extra_memory
kept = torch.ones(2_500_000)
programs = (lambda: None, lambda: kept + 1, lambda: (kept + 1).exp().sum(), lambda: (kept + 1).exp() + kept.exp())
print([extra_memory(program, "cpu") / 1e7 for program in programs])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_extra_memory_is_the_peak_above_the_inputs():
    """In a process of its own: measuring it changes how the allocator behaves. Tensors of 10 MB."""
    told = subprocess.run([sys.executable, "-c", MEMORY], cwd=measure.ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == pytest.approx([0, 1, 2, 3], abs=0.1)


def checkout(folder, rows):
    measure.store("sinkhorn", rows, folder=folder / "benchmarks" / "results")
    swept = [{**row, "sweep": "K", "size": size, "case": str(size)} for size in (256, 1024) for row in rows]
    measure.store("sweep", swept, folder=folder / "benchmarks" / "results")
    (folder / "docs").mkdir()
    markers = {name: f"<!-- {name} -->\nold\n<!-- end {name} -->\n" for name in ("demo", "kernels", "programs", "steps")}
    (folder / "README.md").write_text(f"before\n{markers['demo']}{markers['kernels']}after\n", encoding="utf-8")
    (folder / "docs" / "benchmarks.md").write_text(markers["programs"] + markers["steps"], encoding="utf-8")
    return [folder / "README.md", folder / "docs" / "benchmarks.md"]


def test_the_report_fills_the_markers_and_changes_nothing_the_second_time(tmp_path):
    # the reference happens to be faster than the backend that dispatch prefers, and is not what is reported
    files = checkout(tmp_path, some_rows(reference=0.4))
    report.write(tmp_path)
    first = [path.read_text(encoding="utf-8") for path in files]
    readme = first[0]
    assert "| `sinkhorn` | swav_64 | 64×3000 | float32 | 0.5 (cpu) | 4 | 2 | – | **4×** | 1.5 (1.5) | 50% | memory |" in readme
    assert all(word in readme for word in ("A Processor", "AVX512", "2 threads", "torch 2.14", "commit abc1234", "2026-01-02", "speed.png"))
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" in readme.partition("<!-- kernels -->")[0]
    assert "old" not in readme.partition("<!-- kernels -->")[2]
    assert "| sinkhorn | swav_64 | reference | 0.4 | 0.4 | 0.4 | 5 | 1.5 | 3 | 62% | 1.25 |" in first[1]
    assert (tmp_path / "docs" / "speed.png").stat().st_size > 10_000
    report.write(tmp_path)
    assert [path.read_text(encoding="utf-8") for path in files] == first


def test_the_report_refuses_a_text_without_its_markers():
    with pytest.raises(ValueError, match="holds no <!-- kernels -->"):
        report.fill("<!-- kernels --> but no end", "kernels", "table")
    assert report.fill("as it was", "kernels", "") == "as it was"


def test_the_repository_has_the_markers_that_the_report_fills():
    for path, markers in (("README.md", ("demo", "kernels")), ("docs/benchmarks.md", ("programs", "steps"))):
        text = (measure.ROOT / path).read_text(encoding="utf-8")
        assert all("\nx\n" in report.fill(text, marker, "x") for marker in markers), path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sinkhron"], "choose one of sinkhorn, soft_xent, swapped_prediction, sweep, step, report"),
        (["sinkhorn", "soft_xent"], "got sinkhorn soft_xent"),
        (["device=tpu"], "device must be cpu or cuda; got 'tpu'"),
        (["--device"], "device must be cpu or cuda; got ''"),
        (["repeats=few"], "repeats must be a whole number; got 'few'"),
        (["colour=red"], "unknown option colour"),
        (["store=no"], "store must be true or false; got 'no'"),
    ],
)
def test_mistakes_are_named(words, expected):
    with pytest.raises(ValueError, match=r"^bench: ") as error:
        run.read(words)
    assert expected in str(error.value)


def test_options_are_words_or_flags():
    assert run.read(["--device", "cuda", "soft_xent", "repeats=5"])[0] == "soft_xent"
    for words in (["--device", "cuda"], ["--device=cuda"], ["device=cuda"]):
        assert run.read(words) == (None, {**run.OPTIONS, "device": "cuda"})
    with pytest.raises(ValueError, match="case must be one of swav_64, .*; got none_such"):
        run.one_op("sinkhorn", {**run.OPTIONS, "case": "none_such"})


def test_without_a_gpu_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
        run.settled({**run.OPTIONS, "device": "cuda"})


def test_a_missing_lightly_is_said_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightly", None)
    run._say_once.cache_clear()
    for _ in range(2):
        assert run.installed(sinkhorn_programs, run.inputs(small("sinkhorn"), torch.float32)) == {}
    assert capsys.readouterr().out.count("lightly is not installed") == 1


def test_openmp_is_told_how_to_wait_before_torch_loads(monkeypatch):
    started = []
    monkeypatch.setattr(measure.os, "execv", lambda *arguments: started.append(arguments))
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    measure.settle_threads()
    assert len(started) == 1 and measure.os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    measure.settle_threads()
    assert len(started) == 1
