"""Does every op, on every backend and case, mean what its reference says, and live with autograd, opcheck and torch.compile?"""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseer.kernels import dispatch, functional
from fuseer.kernels.testing import error_vs_eager, inputs, outputs, verdicts

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def part(op, name):
    return importlib.import_module(f"fuseer.kernels.{op}.{name}")


def reference(op):
    return getattr(part(op, "reference"), op)


def raw_arguments(op, arguments):
    """The raw op's arguments: reference.py's, in its order."""
    return tuple({**arguments, "group_name": ""}[name] for name in inspect.signature(reference(op)).parameters)


def backends(op, arguments):
    """The backends that take these arguments, by name."""
    found = []
    for impl in part(op, "op").IMPLS:
        name = dispatch.backend_of(impl)
        if name == "reference" or impl.unsupported(*raw_arguments(op, arguments)) is None:
            found.append(name)
    return found


def bound(op, backend):
    return lambda **arguments: getattr(functional, op)(**arguments, backend=backend)


def cases(op, production=False):
    return [case for case in part(op, "cases").CASES if case.production == production]


def told(op):
    """The cases on which the op's mutation must show."""
    return [case for case in cases(op) if case.name in part(op, "cases").TELLING]


ALL = [pytest.param(op, case, id=f"{op}-{case.name}") for op in functional.__all__ for case in cases(op)]
TELLING = [pytest.param(op, case, id=f"{op}-{case.name}") for op in functional.__all__ for case in told(op)]
OPS = pytest.mark.parametrize("op", functional.__all__)


def test_every_folder_with_an_op_is_in_the_public_list():
    folders = [name for _, name, is_package in pkgutil.iter_modules([str(Path(functional.__file__).parent)]) if is_package]
    assert sorted(folders) == sorted(functional.__all__)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), ALL)
def test_verdict(op, case, dtype):
    differentiable = part(op, "cases").DIFFERENTIABLE
    arguments = inputs(case, dtype)
    for backend in backends(op, arguments):
        found = verdicts(bound(op, backend), reference(op), case, dtype, differentiable)
        assert all(found.values()), f"{backend}: " + "; ".join(f"{name}: {verdict}" for name, verdict in found.items())
        actual = outputs(bound(op, backend), arguments, differentiable)
        assert actual["out"].dtype == dispatch.compute_dtype(dtype)
        assert all(actual[f"d{name}"].dtype == dtype for name in differentiable)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), TELLING)
def test_verdict_sees_the_mutation(op, case, dtype):
    arguments = part(op, "cases").mutated(inputs(case, dtype))
    for backend in backends(op, arguments):
        found = verdicts(bound(op, backend), reference(op), case, dtype, part(op, "cases").DIFFERENTIABLE, arguments)
        assert not found["out"], f"{backend}: {found['out']}"


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


@pytest.mark.parametrize(("op", "case"), ALL)
def test_memory_layout_does_not_matter(op, case):
    arguments = inputs(case, torch.float32)
    strided = {name: every_other(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    differentiable = part(op, "cases").DIFFERENTIABLE
    for backend in backends(op, arguments):
        found = verdicts(bound(op, backend), reference(op), case, torch.float32, differentiable, strided)
        assert all(found.values()), f"{backend}: " + "; ".join(f"{name}: {verdict}" for name, verdict in found.items())


def every_other(x):
    """x in memory with its axes reversed and a stranger's NaN between any two values."""
    wide = torch.full((*reversed(x.shape), 2), torch.nan, dtype=x.dtype)
    view = wide[..., 0].permute(*reversed(range(x.dim())))
    view.copy_(x)
    return view


@pytest.mark.parametrize(("op", "case"), ALL)
def test_opcheck(op, case):
    module = part(op, "op")
    for dtype in (torch.float32, torch.bfloat16):
        arguments = inputs(case, dtype)
        for layout in (lambda x: x, every_other):
            raw = raw_arguments(op, {name: layout(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()})
            for backend in backends(op, arguments):
                torch.library.opcheck(module.RAW[backend], raw)
                if hasattr(module, "RAW_BACKWARD"):
                    torch.library.opcheck(module.RAW_BACKWARD[backend], backward_arguments(op, module, backend, raw))


def backward_arguments(op, module, backend, raw):
    """The backward op's arguments, found by name among the forward's inputs and outputs."""
    returned = module.RAW[backend](*raw)
    returned = returned if isinstance(returned, tuple) else (returned,)
    known = dict(zip((a.name for a in module.RAW[backend]._schema.arguments), raw, strict=True))
    known.update(zip((r.name for r in module.RAW[backend]._schema.returns), returned, strict=True))
    known["dloss"] = torch.ones_like(returned[0])
    return tuple(known[a.name] for a in module.RAW_BACKWARD[backend]._schema.arguments)


@OPS
def test_compiles_without_a_graph_break(op):
    differentiable = part(op, "cases").DIFFERENTIABLE
    for case in cases(op)[:2]:
        arguments = inputs(case, torch.float32)
        for backend in (None, *backends(op, arguments)):
            torch._dynamo.reset()
            compiled = torch.compile(bound(op, backend), fullgraph=True, backend="aot_eager")
            eager = outputs(bound(op, backend), arguments, differentiable)
            for name, x in outputs(compiled, arguments, differentiable).items():
                assert torch.equal(x, eager[name]), (backend, name)


@OPS
def test_gradients_flow_where_promised_and_nowhere_else(op):
    differentiable = part(op, "cases").DIFFERENTIABLE
    for case in cases(op):
        arguments = {name: x.requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in inputs(case, torch.float64).items()}
        out = getattr(functional, op)(**arguments)
        assert out.requires_grad == bool(differentiable)
        if differentiable:
            out.sum().backward()
        for name, x in arguments.items():
            if isinstance(x, torch.Tensor):
                assert (x.grad is not None) == (name in differentiable), name


@OPS
@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_stride(op, data):
    case = data.draw(st.sampled_from(cases(op)))
    letters = {name: x for name, x in inputs(case, torch.float32).items() if isinstance(x, torch.Tensor)}
    axes = sorted({size for x in letters.values() for size in x.shape})
    sizes = {size: data.draw(st.integers(1, 40)) if size > 4 else size for size in axes}
    dtype = data.draw(st.sampled_from(DTYPES))
    flipped = data.draw(st.booleans())

    def build(generator):
        made = case.build(generator)
        for name in letters:
            shape = [sizes[size] for size in made[name].shape]
            made[name] = torch.rand(shape, dtype=torch.float64, generator=generator)
            made[name] = every_other(made[name]) if flipped else made[name]
        return made

    drawn = type(case)("drawn", build)
    for backend in backends(op, inputs(drawn, dtype)):
        found = verdicts(bound(op, backend), reference(op), drawn, dtype, part(op, "cases").DIFFERENTIABLE)
        assert all(found.values()), f"{backend}: " + "; ".join(f"{name}: {verdict}" for name, verdict in found.items())


@OPS
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
    by_name = call(**arguments, backend="reference")
    monkeypatch.setenv("FUSEER_BACKEND", "reference")
    assert torch.equal(call(**arguments), by_name)
