"""Is a result right? The one numeric verdict, and the cases it is asked about; for tests and benchmarks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from fuseer.kernels.dispatch import compute_dtype


@dataclass(frozen=True)
class Case:
    """One set of inputs: `build(generator)` makes the op's keyword arguments in the order of reference.py, tensors in float64.

    `production` marks the shapes that training meets: benchmarks run those, in `dtype`; tests run the others, in every dtype.
    Of an op that updates lists in place `build` makes the public keyword arguments; benchmarks take the lists named in `halves` in
    bfloat16. Tests that draw shapes make no last axis shorter than `narrowest` (a unit row of one number is ±1, and its gradient all
    rounding) and multiply the numbers by no more than `largest_scale`. Where axes hang together (ids point into one, patches tile an
    image) `sizes` names them, letter by letter, and build(generator, **other sizes) makes the case at those, or at the nearest legal ones.
    """

    name: str
    build: Callable
    production: bool = False
    dtype: torch.dtype = torch.float32
    narrowest: int = 1
    largest_scale: float = 3.0
    halves: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Two errors and their bounds; true only where both hold (a NaN holds nothing)."""

    max_abs: float
    max_abs_bound: float
    rel_l2: float
    rel_l2_bound: float

    def __bool__(self):
        return self.max_abs <= self.max_abs_bound and self.rel_l2 <= self.rel_l2_bound

    def __str__(self):
        return f"max|error| {self.max_abs:.2e} (bound {self.max_abs_bound:.2e}), rel-L2 {self.rel_l2:.2e} (bound {self.rel_l2_bound:.2e})"


def error_vs_eager(actual, eager, truth):
    """The error of `actual` <= 2 * the error of `eager` + 4 eps(dtype of actual) * the size of `truth`, in max-abs and in rel-L2.

    Half a spacing of the dtype's subnormal numbers is added, finer than which no element can be rounded. truth: the reference in
    float64; eager: the reference in float32 on half inputs, in the tested dtype otherwise. The size is max|truth| for max-abs and 1 for
    rel-L2. Integers have to be equal. ValueError where shapes differ or the truth is not finite.
    """
    if not actual.shape == eager.shape == truth.shape:
        raise ValueError(f"error_vs_eager: shapes must be equal; got {list(actual.shape)}, {list(eager.shape)}, {list(truth.shape)}")
    if not truth.is_floating_point() and actual.dtype == truth.dtype:
        off = (actual - truth).double()
        return Verdict(off.abs().max().item() if off.numel() else 0.0, 0.0, off.norm().item(), 0.0)
    if truth.dtype != torch.float64 or not truth.isfinite().all():
        raise ValueError("error_vs_eager: truth must be finite float64; got another dtype, or infinities or NaN")
    if not truth.numel():
        return Verdict(0.0, 0.0, 0.0, 0.0)
    dtype = torch.finfo(actual.dtype)
    rounding, spacing = 4 * dtype.eps, dtype.smallest_normal * dtype.eps
    size = truth.norm() if truth.norm() > 0 else torch.ones_like(truth.norm())
    ours, theirs = actual.double() - truth, eager.double() - truth
    return Verdict(
        max_abs=ours.abs().max().item(),
        max_abs_bound=2 * theirs.abs().max().item() + rounding * truth.abs().max().item() + spacing / 2,
        rel_l2=(ours.norm() / size).item(),
        rel_l2_bound=2 * (theirs.norm() / size).item() + rounding + spacing / 2 * truth.numel() ** 0.5 / size.item(),
    )


def inputs(case, dtype, seed=0, device="cpu"):
    """The case's keyword arguments with every tensor on `device`, in `dtype` where it is no index."""
    made = case.build(torch.Generator().manual_seed(seed))
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in _cast(made, dtype).items()}


def raw_arguments(raw, arguments):
    """A raw op's arguments from a case's, in the order of the schema: alone, with the gradient where the raw op makes it.

    What is one tensor in a case and a list in the schema is a list of one, and None an empty list.
    """
    known = {"group_name": "", "gradient": True, "same_rows": False, "momentum_scalar": None, **arguments}

    def given(argument):
        value = known[argument.name]
        if str(argument.type) != "List[Tensor]" or isinstance(value, list):
            return value
        return [] if value is None else [value]

    return tuple(given(argument) for argument in raw._schema.arguments)


def outputs(function, arguments, differentiable, seed=1):
    """{"out": function(**arguments)} and {"d<name>": its gradient under one fixed random cotangent} for each differentiable name.

    Of several outputs, none of them differentiable, the others are "out 1", ...; a name whose argument is None has no gradient.
    """
    leaves = {name: arguments[name].detach().requires_grad_() for name in differentiable if arguments[name] is not None}
    out = function(**{**arguments, **leaves})
    if isinstance(out, tuple):
        return {f"out {i}" if i else "out": x.detach() for i, x in enumerate(out)}
    found = {"out": out.detach()}
    if leaves:
        dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(out)
        grads = torch.autograd.grad(out, tuple(leaves.values()), dout)
        found.update({f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return found


def eager_outputs(run, dtype, truth):
    """The reference's outputs in the compute dtype of `dtype`, run(compute dtype), as error_vs_eager takes them.

    In float64 the reference is the truth, and would allow nobody else a rounding of his own: there its error is taken to be that
    of float32 times 8 eps(float64)/eps(float32); 8, because the truth is rounded as well, and one error may be luckily small.
    """
    if dtype != torch.float64:
        return run(compute_dtype(dtype))
    shrunk = 8 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    single = run(torch.float32)
    return {name: x + (single[name].double() - x) * shrunk if x.is_floating_point() else x for name, x in truth.items()}


def in_double(outputs):
    """The outputs of a reference run in float64, as error_vs_eager takes them: a mask is float32 whatever its noise was."""
    return {name: x.double() if x.is_floating_point() else x for name, x in outputs.items()}


def compared(function, reference, case, dtype, differentiable=(), arguments=None, device="cpu", seed=0):
    """{output: (actual, eager, truth)} as error_vs_eager takes them; see verdicts."""
    given = inputs(case, dtype, seed, device)
    alone = {"group_name": ""} if "group_name" in reference.__code__.co_varnames else {}

    def run(precision):
        return outputs(reference, {**_cast(given, precision), **alone}, differentiable)

    truth = in_double(run(torch.float64))
    eager = eager_outputs(run, dtype, truth)
    actual = outputs(function, given if arguments is None else arguments, differentiable)
    return {name: (actual[name], eager[name], truth[name]) for name in truth}


def verdicts(function, reference, case, dtype, differentiable=(), arguments=None, device="cpu"):
    """{output: Verdict} of `function` on the case in `dtype`, against `reference` (reference.py's function, autograd's gradient).

    `arguments` replaces what `function` alone is given: a mutation, which has to turn a verdict red.
    """
    found = compared(function, reference, case, dtype, differentiable, arguments, device)
    return {name: error_vs_eager(*three) for name, three in found.items()}


def update_inputs(case, dtype_of, seed=0, device="cpu"):
    """The keyword arguments of an op that updates lists: tensor i of each in dtype_of(name of the list, i); scalars as built."""
    made = case.build(torch.Generator().manual_seed(seed))
    return {name: _listed(name, x, lambda name, i, x: x.to(device, dtype_of(name, i))) for name, x in made.items()}


def compared_updates(function, reference, make, written):
    """{what: (actual, eager, truth)} of an op that writes the lists named in `written`, as error_vs_eager takes them.

    make() gives its keyword arguments anew each time. What one dtype of arithmetic (that of the first list's tensor) and one dtype of the
    result have in common is judged together, and in the coarser of both. A NaN that the truth has too, such as padding, is left out.
    """
    given = make()
    function(**given)
    wide = {}
    for precision in (torch.float32, torch.float64):
        wide[precision] = {name: _listed(name, x, lambda _, i, x, to=precision: x.to(to, copy=True)) for name, x in make().items()}
        reference(**wide[precision])
    shrunk = 8 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    found = {}
    for name in (name for name in written if given[name]):
        for i, like in enumerate(given[written[0]]):
            arithmetic, x = compute_dtype(like.dtype), given[name][i]
            judged = max(arithmetic, x.dtype, key=lambda dtype: torch.finfo(dtype).eps)
            single, truth = (wide[precision][name][i] for precision in (torch.float32, torch.float64))
            eager = single if arithmetic == torch.float32 else truth + (single.double() - truth) * shrunk
            absent = truth.isnan() & x.isnan()
            three = [y.masked_fill(absent, 0.0).flatten() for y in (x.to(judged), eager, truth)]
            found.setdefault(f"{name} in {judged}, computed in {arithmetic}", []).append(three)
    return {what: tuple(torch.cat(parts) for parts in zip(*threes, strict=True)) for what, threes in found.items()}


def _listed(name, value, change):
    """A list of tensors with change(name, i, tensor) in place of each; anything else as it is."""
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return [change(name, i, x) for i, x in enumerate(value)]
    return value


def resnet50():
    """The shapes of ResNet-50's 161 parameters, from its architecture."""
    shapes, channels = [(64, 3, 7, 7), (64,), (64,)], 64
    for width, blocks in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
        for block in range(blocks):
            for shape in ((width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, shape[:1], shape[:1]]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), (4 * width,), (4 * width,)]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def vit_b():
    """The shapes of ViT-B/16's 152 parameters, from its architecture."""
    D = 768
    layers = (((D,), (D,)), ((3 * D, D), (3 * D,)), ((D, D), (D,)), ((D,), (D,)), ((4 * D, D), (4 * D,)), ((D, 4 * D), (D,)))
    block = [shape for pair in layers for shape in pair]
    return [(1, 1, D), (1, 197, D), (D, 3, 16, 16), (D,), *12 * block, (D,), (D,), (1000, D), (1000,)]


def _cast(arguments, dtype):
    return {name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in arguments.items()}
