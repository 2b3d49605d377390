"""Which op that updates lists in place is tested on which backend, device, case and mix of dtypes, and how may its lists lie in memory?"""

import functools
from dataclasses import dataclass

import torch
from grid import DEVICES, DTYPES, INTERPRETED, LAYOUTS, part

from fuseer.kernels import dispatch, functional, testing
from fuseer.kernels.testing import Case

UPDATES = tuple(op for op in functional.__all__ if op.endswith("_"))
# what stands around a tensor in memory, and has to stand there afterwards
GUARD = 64


def lists(op):
    return part(op, "cases").LISTS


def written(op):
    return part(op, "cases").WRITTEN


def one(dtype):
    return lambda op, name, i: dtype


def cycled(op, name, i):
    """Sixteen tensors in a row see every pair of dtypes in the first two lists, and the third list all of them."""
    place = lists(op).index(name)
    return DTYPES[(i, i // 4, i // 2 + 1)[place] % 4]


# Of each list's tensors, by dtype of the first list, which is that of the arithmetic.
MIXES = {
    **{str(dtype).removeprefix("torch."): one(dtype) for dtype in DTYPES},
    "half_rest": lambda op, name, i: torch.float32 if name == lists(op)[0] else torch.bfloat16,
    "half_first": lambda op, name, i: torch.float16 if name == lists(op)[0] else torch.float32,
    "half_source": lambda op, name, i: torch.bfloat16 if name == lists(op)[1] else torch.float32,
    "mixed_halves": lambda op, name, i: DTYPES[(i + 2 * lists(op).index(name)) % 3],
    "mixed": cycled,
}
# Interpreted, a program takes milliseconds.
SOME_MIXES = ("float32", "half_rest", "mixed_halves") if INTERPRETED else tuple(MIXES)


@dataclass(frozen=True)
class UpdateTrial:
    """One in-place op on one backend and device, given one case in one mix of dtypes."""

    op: str
    backend: str
    device: str
    case: Case
    mix: str

    def __str__(self):
        return f"{self.op}-{self.backend}-{self.device}-{self.case.name}-{self.mix}"

    @property
    def call(self):
        return functools.partial(getattr(functional, self.op), backend=self.backend)

    @property
    def raw_op(self):
        return part(self.op, "op").RAW[self.backend]

    def arguments(self, lay=lambda name, i, x: x, seed=0):
        """Anew on each call, every tensor of a list laid out by lay(list, place, tensor)."""
        made = testing.update_inputs(self.case, functools.partial(MIXES[self.mix], self.op), seed, self.device)
        made = {name: x.to(self.device) if isinstance(x, torch.Tensor) and name != "segments" else x for name, x in made.items()}
        for name in lists(self.op):
            if made[name]:
                made[name] = [lay(name, i, x) for i, x in enumerate(made[name])]
        return made

    def updated(self, lay=lambda name, i, x: x):
        """{name: list} of the lists that the op wrote."""
        arguments = self.arguments(lay)
        self.call(**arguments)
        return {name: arguments[name] for name in written(self.op) if arguments[name]}

    def verdicts(self, lay=lambda name, i, x: x, mutate=lambda arguments: arguments):
        """{what: Verdict}; `mutate` changes what the backend alone is given."""
        truth = functools.partial(getattr(functional, self.op), backend="reference")

        def call(**arguments):
            self.call(**mutate(arguments))

        found = testing.compared_updates(call, truth, functools.partial(self.arguments, lay), written(self.op))
        return {what: testing.error_vs_eager(*three) for what, three in found.items()}

    def but(self, **changes):
        return UpdateTrial(**{**vars(self), **changes})


def raw_arguments(op, arguments):
    """The raw op's arguments, in the order of its schema."""
    if isinstance(arguments.get("momentum"), torch.Tensor):
        arguments = {**arguments, "momentum": 0.0, "momentum_scalar": arguments["momentum"]}
    return testing.raw_arguments(part(op, "op").RAW["reference"], arguments)


def cases(op):
    return [case for case in part(op, "cases").CASES if not case.production]


def telling(op):
    """The cases on which the op's mutation must show."""
    return [case for case in cases(op) if case.name in part(op, "cases").TELLING]


def first(op):
    return telling(op)[:1]


def refusal(trial, impl):
    """Why this backend does not take the trial's arguments; None where it does."""
    if dispatch.backend_of(impl) == "reference":
        return None
    return impl.unsupported(*raw_arguments(trial.op, trial.arguments()))


def trials(mixes=SOME_MIXES, chosen=cases):
    """Every op × backend × device × chosen case × mix that the backend takes."""
    found = []
    for op in UPDATES:
        for impl in part(op, "op").IMPLS:
            backend = dispatch.backend_of(impl)
            if INTERPRETED and backend != "triton":
                continue
            every = [UpdateTrial(op, backend, device, case, mix) for device in DEVICES for case in chosen(op) for mix in mixes]
            found += [trial for trial in every if refusal(trial, impl) is None]
    return found


def of(op, *extra):
    """Chooses these cases for one op and none for the others."""
    return lambda other: extra if other == op else ()


def guarded(x):
    """x dense, off the alignment of its memory by one element, with a stranger's 7 before and after it."""
    wide = torch.full((x.numel() + 2 * GUARD + 1,), 7, dtype=x.dtype, device=x.device)
    return wide[GUARD + 1 : GUARD + 1 + x.numel()].view(x.shape).copy_(x)


def as_it_lies(x):
    return x


EVERY_LAYOUT = {"as_it_lies": as_it_lies, "guarded": guarded, **LAYOUTS}


def everywhere(layout, only=None):
    """lay(list, place, tensor) with this layout; in one list alone where `only` names it."""
    return lambda name, i, x: EVERY_LAYOUT[layout](x) if only in (None, name) else x


def bits(x):
    """A tensor's numbers as integers, so that a NaN equals itself."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
