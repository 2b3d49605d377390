"""Does every op, on every backend, device, case and dtype, mean what its reference says, wherever its inputs lie in memory?"""

import functools
import pkgutil
import random
from pathlib import Path

import pytest
import torch
from grid import (
    DEVICES,
    DTYPES,
    INTERPRETED,
    LAYOUTS,
    OPS,
    cases,
    equal_rows,
    first,
    lengths,
    over,
    part,
    pointed_at,
    poisoned_memory,
    quick,
    refusal,
    resized,
    telling,
    threads,
    trials,
    with_tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseer.kernels import dispatch, functional
from fuseer.kernels.testing import Case, error_vs_eager, inputs, outputs

SINGLE_AND_HALF = (torch.float32, torch.bfloat16, torch.float16)
EVERY_OP = pytest.mark.parametrize("op", OPS)
SOME_DTYPES = (torch.float32,) if INTERPRETED else DTYPES
SWEEP = 9 if INTERPRETED else 300
LONGEST = 12 if INTERPRETED else 40


def red(found):
    """The verdicts that do not hold, in words; '' where all hold."""
    return "; ".join(f"{name}: {verdict}" for name, verdict in found.items() if not verdict)


def test_every_folder_with_an_op_is_in_the_public_list():
    folders = [name for _, name, is_package in pkgutil.iter_modules([str(Path(functional.__file__).parent)]) if is_package]
    assert sorted(folders) == sorted(functional.__all__)


def test_every_op_has_cases_that_tell_and_trials_for_them():
    for op in OPS:
        assert len(telling(op)) >= 2, op
        assert {case.name for case in telling(op)} <= {case.name for case in cases(op)}
    names = {trial.op for trial in trials()}
    assert INTERPRETED or names == set(OPS)


@EVERY_OP
@pytest.mark.parametrize("device", DEVICES)
def test_a_backend_takes_a_dtype_in_every_case_or_in_none(op, device):
    for impl in part(op, "op").IMPLS:
        taken = {}
        for dtype in DTYPES:
            reasons = {case.name: refusal(op, impl, inputs(case, dtype, device=device)) for case in cases(op)}
            assert len({reason is None for reason in reasons.values()}) == 1, (dispatch.backend_of(impl), dtype, reasons)
            taken[dtype] = None in reasons.values()
        assert len({taken[dtype] for dtype in SINGLE_AND_HALF}) == 1, (dispatch.backend_of(impl), taken)


@over(trials())
def test_verdict(trial):
    assert not red(trial.verdicts())


@over(trials(chosen=telling))
def test_verdict_sees_the_mutation(trial):
    assert not trial.verdicts(part(trial.op, "cases").mutated(trial.arguments()))["out"]


def test_verdict_refuses_nan_and_sees_half_an_error():
    truth = torch.linspace(-1, 1, 9, dtype=torch.float64)
    eager = truth.float()
    assert error_vs_eager(eager, eager, truth)
    assert not error_vs_eager(torch.full_like(eager, torch.nan), eager, truth)
    assert not error_vs_eager(eager * (1 + 6e-7), eager, truth)
    with pytest.raises(ValueError, match="shapes must be equal"):
        error_vs_eager(eager[1:], eager, truth)
    with pytest.raises(ValueError, match="finite float64"):
        error_vs_eager(eager, eager, truth * torch.inf)
    ids = torch.arange(9)
    assert error_vs_eager(ids, ids, ids) and not error_vs_eager(ids + (ids == 4), ids, ids)
    assert error_vs_eager(ids[:0], ids[:0], ids[:0])


@over(trials())
def test_everything_the_raw_op_returns_is_the_references(trial):
    actual, expected = trial.raw(), trial.but(backend="reference").raw()
    assert not red(trial.raw_verdicts(actual))
    kept_wider = getattr(part(trial.op, "cases"), "KEPT_IN_FLOAT64", {}).get(trial.backend, ())
    for name, x in actual.items():
        dtype = torch.float64 if name in kept_wider else expected[name].dtype
        assert (x.dtype, x.shape, x.stride()) == (dtype, expected[name].shape, expected[name].stride()), name


@over(trials(SOME_DTYPES[:2], quick))
def test_memory_layout_does_not_matter(trial):
    for name, layout in LAYOUTS.items():
        assert not red(trial.verdicts(with_tensors(trial.arguments(), layout))), name


@over(trials(SOME_DTYPES[:2], first if INTERPRETED else telling))
def test_rows_of_stride_zero(trial):
    case = Case(trial.case.name, lambda generator: with_tensors(trial.case.build(generator), lambda x: equal_rows(x).contiguous()))
    alike = trial.but(case=case)
    assert not red(alike.verdicts(with_tensors(alike.arguments(), equal_rows)))


@over(trials(chosen=quick))
def test_inputs_are_never_modified_and_outputs_have_their_dtype(trial):
    arguments = with_tensors(trial.arguments(), LAYOUTS["inside"])
    memory = [x if x._base is None else x._base for x in arguments.values() if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in memory]
    actual = trial.outputs(arguments)
    assert actual["out"].dtype == trial.out_dtype
    assert all(actual[f"d{name}"].dtype == trial.dtype for name in trial.differentiable)
    assert {x.device.type for x in actual.values()} == {trial.device}
    for x, was in zip(memory, before, strict=True):
        torch.testing.assert_close(x, was, rtol=0, atol=0, equal_nan=True)


@over(trials(SOME_DTYPES, quick))
def test_every_output_is_written_and_every_call_gives_the_same_bits(trial):
    """Also with memory that is NaN until it is written, and with torch.use_deterministic_algorithms."""
    plain = {**trial.raw(), **trial.outputs()}
    with poisoned_memory():
        runs = [{**trial.raw(), **trial.outputs()} for _ in range(2)]
    for run in [{**trial.raw(), **trial.outputs()}, *runs]:
        for name, x in run.items():
            assert not x.isnan().any(), name
            assert torch.equal(x, plain[name]), name


@over(trials(chosen=first))
def test_sweep_of_random_shapes(trial):
    """Seeded, 300 shapes of up to 128 rows of 1024 over the single and half dtypes, each in the manner of one of the op's cases."""
    draw, failures = random.Random(0), []
    for number in range(SWEEP // len(SINGLE_AND_HALF) // fewer(trial)):
        case = draw.choice(cases(trial.op))
        rows, last = lengths(case)
        sizes = {n: round(2 ** draw.uniform(0, 4 if INTERPRETED else 7)) for n in rows}
        sizes |= {n: max(case.narrowest, round(2 ** draw.uniform(0, 5 if INTERPRETED else 10))) for n in last}
        drawn = trial.but(case=resized(case, sizes))
        # two threads spend such shapes waiting for each other: every eighth is enough, and test_cpu_backends.py has wide ones on three
        with threads(2 if number % 8 == 7 else 1):
            words = red(drawn.pooled_verdicts())
        failures += [f"{number}: {drawn.case.name}: {words}"] if words else []
    assert not failures, f"{len(failures)} of {number + 1} red\n" + "\n".join(failures)


@over(trials(dtypes=(torch.float32,), chosen=first))
def test_any_shape_stride_and_dtype(trial):
    taken = [trial.but(dtype=dtype) for dtype in DTYPES]
    taken = [other for other in taken if other in trials(chosen=first)]

    @settings(max_examples=6 if INTERPRETED else 50 // fewer(trial), deadline=None, database=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        case = data.draw(st.sampled_from(cases(trial.op)), label="case")
        rows, last = lengths(case)
        sizes = {n: data.draw(st.integers(pointed_at(case), LONGEST), label=f"rows {n}") for n in rows}
        sizes |= {n: data.draw(st.integers(case.narrowest, LONGEST), label=f"last axis {n}") for n in last}
        scale = min(data.draw(st.sampled_from([0.01, 1.0, 3.0]), label="scale"), case.largest_scale)
        drawn = data.draw(st.sampled_from(taken), label="trial").but(case=resized(case, sizes, scale))
        strides = {name: data.draw(st.sampled_from([None, *LAYOUTS]), label=name) for name in drawn.arguments()}
        assert not red(drawn.pooled_verdicts(lambda arguments: laid_out(arguments, strides)))

    # of so little work a second thread has none, and makes the first one wait
    with threads(1):
        check()


def fewer(trial):
    """How many times less is drawn: a reference is judged by itself."""
    return 5 if trial.backend == "reference" else 1


def laid_out(arguments, strides):
    return {name: with_tensors({name: x}, LAYOUTS[strides[name]])[name] if strides[name] else x for name, x in arguments.items()}


@EVERY_OP
def test_backend_by_name_runs_or_raises(op, monkeypatch):
    call, arguments = getattr(functional, op), inputs(cases(op)[0], torch.float32)
    with pytest.raises(ValueError, match=f"{op}: backend must be one of triton, cuda, cpu, reference; got 'fast'"):
        call(**arguments, backend="fast")
    with pytest.raises(RuntimeError, match=f"{op}: backend 'cuda' was asked for and cannot run"):
        call(**arguments, backend="cuda")
    monkeypatch.setenv("FUSEER_BACKEND", "quick")
    with pytest.raises(ValueError, match=f"{op}: FUSEER_BACKEND must be one of"):
        call(**arguments)
    monkeypatch.setenv("FUSEER_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="was asked for and cannot run"):
        call(**arguments)
    by_name = outputs(functools.partial(call, backend="reference"), arguments, ())
    monkeypatch.setenv("FUSEER_BACKEND", "reference")
    assert all(torch.equal(x, by_name[name]) for name, x in outputs(call, arguments, ()).items())
