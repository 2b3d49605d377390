"""Which op is tested on which backend, device, case and dtype, and how may its inputs lie in memory?"""

import contextlib
import functools
import importlib
import os
from dataclasses import dataclass, replace

import pytest
import torch

from fuseer.kernels import dispatch, functional, testing
from fuseer.kernels.testing import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Under TRITON_INTERPRET=1 a process tests the Triton backends alone, on CPU tensors: an op takes milliseconds per row there.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_ELEMENTS = 700
POOLED_ELEMENTS = 256 if INTERPRETED else 4096
# Ops that write lists of tensors in place have a grid of their own, updates.py.
OPS = tuple(op for op in functional.__all__ if not op.endswith("_"))
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() and not INTERPRETED else ("cpu",)


@dataclass(frozen=True)
class Trial:
    """One op on one backend and device, given one case in one dtype."""

    op: str
    backend: str
    device: str
    case: Case
    dtype: torch.dtype

    def __str__(self):
        return f"{self.op}-{self.backend}-{self.device}-{self.case.name}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def call(self):
        """The public op, on this backend by name."""
        return functools.partial(getattr(functional, self.op), backend=self.backend)

    @property
    def module(self):
        return part(self.op, "op")

    @property
    def differentiable(self):
        """The names that have a gradient in this case: an optional tensor may be absent."""
        built = self.case.build(torch.Generator())
        return tuple(name for name in part(self.op, "cases").DIFFERENTIABLE if built[name] is not None)

    @property
    def out_dtype(self):
        """That of the arithmetic, unless the op's cases.py says otherwise."""
        return getattr(part(self.op, "cases"), "out_dtype", dispatch.compute_dtype)(self.dtype)

    def first_output(self, arguments):
        out = self.call(**arguments)
        return out[0] if isinstance(out, tuple) else out

    def arguments(self, seed=0):
        return testing.inputs(self.case, self.dtype, seed, self.device)

    def outputs(self, arguments=None, call=None):
        """{"out": …, "d<name>": …} of the op, or of `call` in its place."""
        return testing.outputs(call or self.call, self.arguments() if arguments is None else arguments, self.differentiable)

    def verdicts(self, arguments=None):
        return testing.verdicts(self.call, reference(self.op), self.case, self.dtype, self.differentiable, arguments, self.device)

    def pooled_verdicts(self, lay=lambda arguments: arguments):
        """The verdicts, where few numbers are asked for on several draws side by side: of a handful of roundings luck makes the largest."""
        asked = elements(self.case, self.differentiable)
        draws = 1 if asked > POOLED_ELEMENTS else 4 if asked > POOLED_ELEMENTS // 8 else 8
        every = [
            testing.compared(
                self.call, reference(self.op), self.case, self.dtype, self.differentiable, lay(self.arguments(seed)), self.device, seed
            )
            for seed in range(draws)
        ]
        pools = {name: [torch.cat([found[name][i].flatten() for found in every]) for i in range(3)] for name in every[0]}
        return {name: testing.error_vs_eager(*pool) for name, pool in pools.items()}

    def raw(self, arguments=None, backend=None):
        """What the raw forward op returns, by the names of its schema."""
        raw_op = self.module.RAW[backend or self.backend]
        returned = raw_op(*raw_arguments(self.op, self.arguments() if arguments is None else arguments))
        returned = returned if isinstance(returned, tuple) else (returned,)
        return {r.name or "out": x for r, x in zip(raw_op._schema.returns, returned, strict=True)}

    def raw_verdicts(self, actual=None):
        """{output: Verdict} of everything the raw forward op returns; statistics column by column, for their sizes differ.

        A gradient that the forward makes is judged in the dtype in which it reaches the caller, the input's.
        """
        actual = self.raw() if actual is None else actual
        made = {f"d{name}" for name in self.differentiable}
        actual = {name: x.to(self.dtype) if name in made else x for name, x in actual.items()}

        def run(dtype):
            return self.raw(with_tensors(self.arguments(), lambda x: x.to(dtype)), "reference")

        truth = testing.in_double(run(torch.float64))
        eager = testing.eager_outputs(run, self.dtype, truth)
        found = {}
        for name in truth:
            columns = range(truth[name].shape[-1]) if name == "statistics" else [...]
            for column in columns:
                three = [x[name] if column is ... else x[name][..., column] for x in (actual, eager, truth)]
                # potentials of no rows at all: infinite, and no distance from infinity is a number
                infinite = three[2].isinf() & (three[0] == three[2])
                label = name if column is ... else f"{name}[..., {column}]"
                found[label] = testing.error_vs_eager(*(x.masked_fill(infinite, 0) for x in three))
        return found

    def but(self, **changes):
        return Trial(**{**vars(self), **changes})


def part(op, name):
    return importlib.import_module(f"fuseer.kernels.{op}.{name}")


def reference(op):
    return getattr(part(op, "reference"), op)


def raw_arguments(op, arguments):
    return testing.raw_arguments(part(op, "op").RAW["reference"], arguments)


def refusal(op, impl, arguments):
    """Why this backend does not take these arguments; None where it does."""
    if dispatch.backend_of(impl) == "reference":
        return None
    return impl.unsupported(*raw_arguments(op, arguments))


def cases(op, production=False):
    found = [case for case in part(op, "cases").CASES if case.production == production]
    return [case for case in found if elements(case) <= INTERPRETED_ELEMENTS] if INTERPRETED else found


def telling(op):
    """The cases on which the op's mutation must show."""
    return [case for case in cases(op) if case.name in part(op, "cases").TELLING]


def quick(op):
    """All cases; two where an op is interpreted."""
    return telling(op)[:2] if INTERPRETED else cases(op)


def first(op):
    return telling(op)[:1]


def elements(case, names=()):
    """Numbers in the case's tensors, or in those of the names given."""
    built = case.build(torch.Generator())
    return sum(x.numel() for name, x in built.items() if isinstance(x, torch.Tensor) and (not names or name in names))


def trials(dtypes=DTYPES, chosen=cases):
    """Every op × backend × device × chosen case × dtype that the backend takes."""
    found = []
    for op in OPS:
        for impl in part(op, "op").IMPLS:
            backend = dispatch.backend_of(impl)
            if INTERPRETED and backend != "triton":
                continue
            every = [Trial(op, backend, device, case, dtype) for device in DEVICES for case in chosen(op) for dtype in dtypes]
            found += [trial for trial in every if refusal(op, impl, trial.arguments()) is None]
    return found


def of(op, *extra):
    """Chooses these cases for one op and none for the others: trials(dtypes, of("sinkhorn", case))."""
    return lambda other: extra if other == op else ()


def widest(op):
    """Each backend and device of the op with the widest dtype that it takes, as trials of its first telling case."""
    by_width = (torch.float64, torch.float32)
    found = {(trial.backend, trial.device): trial for trial in trials(by_width[::-1], of(op, *first(op)))}
    return list(found.values())


def over(found):
    """Parametrises a test over trials; where there are none there is no test, rather than a skipped one."""
    if not found:
        return lambda test: None
    return pytest.mark.parametrize("trial", found, ids=str)


def with_tensors(arguments, change):
    """The arguments with every tensor changed that is no index."""
    return {name: change(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in arguments.items()}


def resized(case, sizes, scale=1.0):
    """The case with every axis of length n made sizes[n] long, filled anew, uniform over the old range times `scale`.

    An index points into the rows of whichever tensor has the fewest. A case with `sizes` is built at others, which go by their letters.
    """
    if case.sizes:

        def built_at(generator):
            return with_tensors(case.build(generator, **{**case.sizes, **sizes}), lambda x: x * scale)

        return replace(case, name=f"{case.name} with {sizes}", build=built_at)

    def build(generator):
        def fill(x):
            shape = [sizes.get(size, size) for size in x.shape]
            if not x.is_floating_point():
                return torch.randint(fewest, shape, generator=generator)
            low, high = (x.min(), x.max()) if x.numel() else (-1.0, 1.0)
            return (torch.rand(shape, dtype=torch.float64, generator=generator) * (high - low) + low) * scale

        built = case.build(generator)
        fewest = max(1, min((sizes.get(len(x), len(x)) for x in built.values() if isinstance(x, torch.Tensor)), default=1))
        return {name: fill(x) if isinstance(x, torch.Tensor) else x for name, x in built.items()}

    return Case(f"{case.name} with {sizes}", build)


def lengths(case):
    """(lengths of rows, lengths of last axes) that `resized` can change: those of no axis further left, which counts crops or the like.

    Of a case with `sizes` they are letters, and D alone is a last axis.
    """
    if case.sizes:
        return sorted(case.sizes.keys() - {"D"}), sorted(case.sizes.keys() & {"D"})
    shapes = [x.shape for x in case.build(torch.Generator()).values() if isinstance(x, torch.Tensor)]
    leading = {n for shape in shapes for n in shape[:-2]}
    last = {shape[-1] for shape in shapes if len(shape) > 1} - leading
    return sorted({n for shape in shapes for n in shape} - leading - last), sorted(last)


def pointed_at(case):
    """Whether one of the case's tensors is an index, which needs rows to point at; a case with `sizes` sees to that itself."""
    return not case.sizes and any(isinstance(x, torch.Tensor) and not x.is_floating_point() for x in case.build(torch.Generator()).values())


def every_other(x):
    """x in memory with its axes reversed and a stranger's NaN between any two values."""
    wide = torch.full((*reversed(x.shape), 2), torch.nan, dtype=x.dtype, device=x.device)
    return wide[..., 0].permute(tuple(reversed(range(x.dim())))).copy_(x)


def inside(x):
    """x as a block inside a wider one: NaN before, after, left and right of it, and the last axis dense."""
    wide = torch.full([size + 3 for size in x.shape], torch.nan, dtype=x.dtype, device=x.device)
    return wide[tuple(slice(1, 1 + size) for size in x.shape)].copy_(x)


def misaligned(x):
    """x dense, but one element off the alignment of its memory."""
    return torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)


def transposed(x):
    return x.mT.contiguous().mT if x.dim() > 1 else x


LAYOUTS = {f.__name__: f for f in (every_other, inside, misaligned, transposed)}


def equal_rows(x):
    """x with every row a view of the first: stride 0."""
    axis = max(x.dim() - 2, 0)
    return x.narrow(axis, 0, min(1, x.shape[axis])).expand(x.shape)


def close(found, dtype, whole, bound):
    """In double: max|found - whole| <= bound * max|whole|. In single: the verdict, whole(dtype) being the reference in one process."""
    truth = whole(torch.float64)
    assert found.dtype == dtype and found.shape == truth.shape
    if dtype == torch.float32:
        verdict = testing.error_vs_eager(found, whole(torch.float32), truth)
        assert verdict, str(verdict)
    elif truth.numel():
        assert (found - truth).abs().max() <= bound * truth.abs().max()


@contextlib.contextmanager
def poisoned_memory():
    """torch.empty, in Python and C++, gives NaN; torch.use_deterministic_algorithms is on."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(99).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
