"""Would the benchmarks time a wrong result, believe a busy machine, or publish a number without its origin?"""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks import measure, report, run
from benchmarks.kernels import sinkhorn as sinkhorn_programs
from benchmarks.kernels import swapped_prediction as swapped_programs
from fuseer.kernels import functional

MACHINE = {
    **{"date": "2026-01-02T03:04:05+00:00", "commit": "abc1234", "dirty": False, "device": "A Processor", "instruction_set": "AVX512"},
    **{"cores": 2, "threads": 2, "python": "3.11", "torch": "2.14", "triton": "3.8", "lightly": "absent"},
    **{"copy_gb_s": 20.0, "fma_g_s": 50.0, "bf16_fma_g_s": 400.0},
}
CALM = [1.0, 1.1, 1.2, 1.0, 1.1]
KINDS = {"official": "eager", "compile": "compile", "cpu": "ours", "reference": "ours", "copy": "floor"}


def small(op):
    return next(case for case in run.part(op, "cases").CASES if not case.production)


def hide_lightly(monkeypatch):
    """Also where another test has imported it; and timm."""
    for name in {"lightly", "timm", *(name for name in sys.modules if name.startswith(("lightly.", "timm.")))}:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("op", run.OPS)
def test_every_case_finds_the_backends_that_take_it(op):
    for case in run.part(op, "cases").CASES:
        if not case.production:
            assert run.backends(op, run.given_to(op, case))[-1] == "reference", case.name


def test_every_sweep_makes_cases_with_an_axis_of_its_number():
    swept = [cases for op in run.OPS if hasattr(run.published(op), "sweeps") for cases in run.published(op).sweeps().values()]
    assert len(swept) > 4
    for length, case in itertools.chain.from_iterable(cases.items() for cases in swept):
        with FakeTensorMode(allow_non_fake_inputs=True):
            shapes = [x.shape for x in case.build(torch.Generator()).values() if isinstance(x, torch.Tensor)]
        assert any(n in (length, length // 2) for shape in shapes for n in shape), (case.name, length)


@pytest.fixture
def quick(monkeypatch):
    """No lightly, no timm, no minutes of rates, and a machine that passes for calm: whether it is has tests of its own."""
    hide_lightly(monkeypatch)
    monkeypatch.setattr(measure, "rates", lambda device: {"copy_gb_s": 20.0, "fma_g_s": 50.0})
    monkeypatch.setattr(measure, "MAX_SPREAD", float("inf"))


@pytest.mark.parametrize("op", run.OPS)
def test_every_op_is_benchmarked_on_every_backend(op, quick):
    case = small(op)
    found, rejected = run.bench(op, [case], repeats=3, with_compile=False, with_memory=False)
    assert not rejected
    arguments = run.given_to(op, case)
    bounds = {"two_gemms"} if op == "info_nce" else set()
    eager = {"official", "foreach_mul_add", "foreach_lerp"} if op == "ema_update_" else {"official"}
    assert {row["program"] for row in found} == {*eager, *bounds, *run.backends(op, arguments)}
    assert {row["program"] for row in found if row["kind"] == "bound"} == bounds
    assert [row["program"] for row in found if row["preferred"]] == [run.backends(op, arguments)[0]]
    for row in found:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["operations"] >= 1 and row["repeats"] == 3
        assert row["operations"] == 2 or row["kind"] != "bound"
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


@pytest.mark.parametrize("op", [op for op in run.OPS if run.updates(op)])
def test_an_update_that_is_another_one_is_refused(op, quick, monkeypatch):
    module, mutated = run.published(op), run.part(op, "cases").mutated
    right = module.official
    monkeypatch.setattr(module, "official", lambda **given: right(**mutated(given)))
    with pytest.raises(run.Wrong, match=f"{op} small: official is another function than {op}: .* of its change"):
        run.bench(op, [small(op)], repeats=3, with_compile=False, with_memory=False)


@pytest.mark.parametrize("op", [op for op in run.OPS if run.updates(op)])
def test_a_wrong_update_gets_no_speed(op, quick, monkeypatch):
    right, mutated = getattr(functional, op), run.part(op, "cases").mutated
    monkeypatch.setattr(
        functional, op, lambda backend, **given: right(backend=backend, **(given if backend == "reference" else mutated(given)))
    )
    if run.backends(op, run.given_to(op, small(op))) == ["reference"]:
        pytest.skip("no backend here but the reference")
    with pytest.raises(run.Wrong, match=rf"{op} small: backend \w+ is wrong, so nothing is timed: "):
        run.bench(op, [small(op)], repeats=3, with_compile=False, with_memory=False)


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


def some_rows(case="swav_64", kinds=KINDS, **times):
    """Rows of one case whose programs took these milliseconds every time."""
    times = {"official": 4.0, "compile": 2.0, "cpu": 0.5, "reference": 8.0, "copy": 0.25, **times}
    timing = measure.Timing({name: [ms / 1e3] * 5 for name, ms in times.items()}, 1.25, 1)
    work = measure.Work(bytes=1000, exponentials=10**6, multiply_adds=2 * 10**6)
    shape = {"case": case, "shape": "64×3000", "dtype": "float32"}
    found = measure.rows("sinkhorn", shape, timing, kinds=kinds, work=work, machine=MACHINE)
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


def test_each_row_has_the_other_programs_times_over_its_own():
    found = {row["program"]: row["against"] for row in some_rows()}
    assert found["cpu"] == {"official": 8.0, "compile": 4.0} and found["official"] == {"compile": 0.5, "cpu": 0.125, "reference": 2.0}
    bound = {row["program"]: row for row in some_rows(kinds={**KINDS, "compile": "bound"})}
    assert bound["cpu"]["against"]["compile"] == 4.0 and bound["cpu"]["speedup"] == 8.0


def test_products_of_bfloat16_matrices_have_a_rate_of_their_own():
    """(1e9 + 8 * 1e9) at 50 G/s, 4e9 at 400 G/s; at 50 G/s where none was measured."""
    work = measure.Work(1, 10**9, 10**9, half_products=4 * 10**9)
    assert measure.arithmetic_seconds(work, MACHINE) == pytest.approx(0.19)
    assert measure.arithmetic_seconds(work, {"fma_g_s": 50.0}) == pytest.approx(0.26)


def test_rates_of_this_machine_are_measured(monkeypatch):
    monkeypatch.setattr(measure, "stopwatch", lambda device: lambda program: 1.0)
    found = measure.rates("cpu")
    assert found == {"copy_gb_s": 0.5, "fma_g_s": 1.1, "bf16_fma_g_s": 1.1, "exp_g_s": 0.0}


def test_one_call_is_a_row_too():
    assert measure.quantiles([0.25]) == {"p20_ms": 250.0, "p50_ms": 250.0, "p80_ms": 250.0}


@pytest.mark.parametrize("known", ["official", "compile", "reference"])
def test_a_program_that_would_be_killed_is_not_run_and_says_why(known, quick, monkeypatch):
    """One byte more than four fifths of what is free; nothing else is left out."""
    case = small("nt_xent")
    needs = run.published("nt_xent").needs
    monkeypatch.setattr(run.published("nt_xent"), "needs", lambda arguments: {known: 8_000_001})
    monkeypatch.setattr(measure, "_free_memory", lambda device: 10_000_000)
    given = run.inputs(case, case.dtype)
    assert set(needs(given)) >= {known}
    timed, kinds, absent = run.programs("nt_xent", case, given, "cpu", with_compile=True)
    assert absent == {known: "needs 0.008 GB, 0.01 GB are free"}
    assert set(timed) == set(kinds) - {known} and kinds.keys() >= {"official", "compile", "reference", "copy"}


def test_what_was_not_run_is_a_row_with_its_reason(quick, monkeypatch):
    """Neither the published program nor the reference fits: judged by the oracle, against no baseline."""
    monkeypatch.setattr(run.published("nt_xent"), "needs", lambda arguments: {"official": 9e9, "reference": 9e9})
    monkeypatch.setattr(measure, "_free_memory", lambda device: 1e9)
    judged = []
    monkeypatch.setattr(run, "verdicts", lambda function, judge, *rest, **options: judged.append(judge) or {})
    found, rejected = run.bench("nt_xent", [small("nt_xent")], repeats=2, with_compile=False, with_memory=True)
    assert not rejected
    rows = {row["program"]: row for row in found}
    assert {name: row.get("not_run") for name, row in rows.items()} == {
        **dict.fromkeys(rows),
        **dict.fromkeys(("official", "reference"), "needs 9 GB, 1 GB are free"),
    }
    assert set(judged) == {run.published("nt_xent").oracle} and rows["cpu"]["preferred"]
    assert all(row["speedup"] is None for row in found) and rows["official"]["p50_ms"] is rows["official"]["extra_mb"] is None


def test_free_memory_is_told():
    free = measure._free_memory("cpu")
    assert free is None if not sys.platform.startswith("linux") else 2**20 < free < 2**50
    assert measure.too_large(2**20, "cpu") is None
    assert sys.platform.startswith("linux") is (measure.too_large(2**51, "cpu") is not None)


@pytest.mark.parametrize("case", ["small", "one_pair", "cold", "dot_products"])
def test_the_oracle_in_strips_is_the_reference(case, monkeypatch):
    module = run.published("nt_xent")
    monkeypatch.setattr(module, "STRIP", 5)
    given = run.inputs(next(found for found in run.part("nt_xent", "cases").CASES if found.name == case), torch.float64)
    names = run.part("nt_xent", "cases").DIFFERENTIABLE
    theirs, own = (run.outputs(function, given, names) for function in (run.reference("nt_xent"), module.oracle))
    for name, x in own.items():
        torch.testing.assert_close(x, theirs[name], rtol=0, atol=1e-13 + 1e-12 * theirs[name].abs().max().item())


def test_rows_say_where_they_come_from():
    for row in some_rows():
        assert row.items() >= MACHINE.items()
    found = measure.header()
    assert set(found) | {"copy_gb_s", "fma_g_s", "bf16_fma_g_s"} == set(MACHINE)
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
    for product in (lambda: (x @ x.t()).exp(), lambda: torch.bmm(x[None], x.t()[None]).exp()):
        assert measure.operations(product, "cpu") == 2
    assert measure.operations(lambda: functional.sinkhorn(x, backend="cpu"), "cpu") == 1
    assert measure.operations(lambda: functional.sinkhorn(x, backend="reference"), "cpu") > 10


MEMORY = """
import torch
from benchmarks.measure import extra_memory
kept = torch.ones(2_500_000)
programs = (lambda: None, lambda: kept + 1, lambda: (kept + 1).exp().sum(), lambda: (kept + 1).exp() + kept.exp())
print([extra_memory(program, "cpu") / 1e7 for program in programs])

from benchmarks import run
from benchmarks.kernels import nt_xent
given = {name: torch.rand(1024, 16) - 0.5 for name in ("z1", "z2")} | {"temperature": 0.1, "normalize": True}
functions = {"official": nt_xent.official, "reference": run.ours("nt_xent", "reference"), **run.installed(nt_xent, given)}
needs = nt_xent.needs(given)
print([extra_memory(run.called(f, given, ("z1", "z2")), "cpu") / needs[name] for name, f in functions.items()])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_extra_memory_is_the_peak_above_the_inputs_and_as_foretold():
    """In a process of its own: measuring it changes how the allocator behaves. Tensors of 10 MB; nt_xent's programs."""
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", MEMORY], cwd=measure.ROOT, capture_output=True, text=True, check=True)
    first, *_, last = (json.loads(line) for line in told.stdout.splitlines() if line.startswith("["))
    assert first == pytest.approx([0, 1, 2, 3], abs=0.1)
    assert len(last) >= 2 and last == pytest.approx([1] * len(last), rel=0.15)


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


def test_the_report_says_what_was_not_run_and_how_near_a_bound_ours_is(tmp_path):
    kinds = {**KINDS, "compile": "bound", "reference": "third party"}
    rows = [row for row in some_rows(kinds=kinds) if row["program"] != "official"]
    shape = {name: rows[0][name] for name in ("case", "shape", "dtype")}
    rows.insert(0, measure.missing("sinkhorn", shape, "official", "eager", "needs 26 GB, 20 GB are free", MACHINE))
    for row in rows:
        row["speedup"] = None
    files = checkout(tmp_path, rows)
    report.write(tmp_path)
    readme, details = (path.read_text(encoding="utf-8") for path in files)
    times = "| 0.5 (cpu) | – (not run: needs 26 GB, 20 GB are free) | – | 8 (reference, 16×) | – | 1.5 (–) |"
    assert f"{times} 50%, 400% of compile | memory |" in readme
    assert "| sinkhorn | swav_64 | official | – | not run: needs 26 GB, 20 GB are free | – | – | – | – | – | – |" in details
    assert (tmp_path / "docs" / "speed.png").stat().st_size > 10_000


def test_the_report_refuses_a_text_without_its_markers():
    with pytest.raises(ValueError, match="holds no <!-- kernels -->"):
        report.fill("<!-- kernels --> but no end", "kernels", "table")
    assert report.fill("as it was", "kernels", "") == "as it was"


def test_the_repository_has_the_markers_that_the_report_fills():
    for path, markers in (("README.md", ("demo", "methods", "kernels")), ("docs/benchmarks.md", ("programs", "steps"))):
        text = (measure.ROOT / path).read_text(encoding="utf-8")
        assert all("\nx\n" in report.fill(text, marker, "x") for marker in markers), path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sinkhron"], f"choose one of {', '.join(run.OPS)}, sweep, step, report"),
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
    hide_lightly(monkeypatch)
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
