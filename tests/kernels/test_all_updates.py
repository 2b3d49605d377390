"""Does every op that updates lists in place mean what its reference says, on every backend, in any mix of dtypes and any layout?"""

import pytest
import torch
from grid import INTERPRETED, over, part, poisoned_memory, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from updates import (
    EVERY_LAYOUT,
    MIXES,
    UPDATES,
    bits,
    cases,
    everywhere,
    first,
    lists,
    of,
    raw_arguments,
    telling,
    trials,
    written,
)

from fuseer.kernels import functional, testing
from fuseer.kernels.testing import Case

UNIFORM = ("float32", "bfloat16", "float16", "float64")
SOME = ("float32", "half_rest", "mixed_halves", "mixed")
FEW = ("float32", "mixed_halves")
EVERY_OP = pytest.mark.parametrize("op", UPDATES)


def some(op):
    """All cases; two where an op is interpreted."""
    return telling(op)[:2] if INTERPRETED else cases(op)


def red(found):
    """The verdicts that do not hold, in words; '' where all hold."""
    return "; ".join(f"{what}: {verdict}" for what, verdict in found.items() if not verdict)


def same(found, expected):
    """Whether the lists hold the same bits."""
    return all(torch.equal(bits(x), bits(y)) for name in expected for x, y in zip(found[name], expected[name], strict=True))


def test_every_update_has_cases_that_tell_and_trials_for_them():
    assert UPDATES
    for op in UPDATES:
        assert len(telling(op)) >= 4, op
        assert len(telling(op)) == len(part(op, "cases").TELLING)
    assert INTERPRETED or {(trial.op, trial.mix) for trial in trials()} == {(op, mix) for op in UPDATES for mix in MIXES}


@over(trials())
def test_verdict(trial):
    assert not red(trial.verdicts())


@over(trials(chosen=telling))
def test_verdict_sees_the_mutation(trial):
    """In every list that is written; where dtypes are not mixed, in all that is judged."""
    found = trial.verdicts(mutate=part(trial.op, "cases").mutated)
    for name in {what.partition(" ")[0] for what in found}:
        seen = [not verdict for what, verdict in found.items() if what.startswith(name)]
        assert all(seen) if trial.mix in UNIFORM else any(seen), (name, {what: str(verdict) for what, verdict in found.items()})


def short(op):
    """The telling cases but those of hundreds of tensors, which take seconds in every layout and say no more."""
    return [case for case in telling(op) if len(case.build(torch.Generator())[lists(op)[0]]) <= 40]


# "mixed" has the pair of half_rest too
@over(trials([mix for mix in SOME if mix != "half_rest"], short))
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_memory_layout_does_not_matter(trial, layout):
    # threads share what lies flat by then: test_any_number_of_threads
    with threads(1):
        for only in (None, *lists(trial.op)):
            assert not red(trial.verdicts(everywhere(layout, only))), only


@over(trials(SOME, some))
@pytest.mark.parametrize("layout", ["as_it_lies", "guarded", "inside", "every_other"])
def test_nothing_else_is_written(trial, layout):
    arguments = trial.arguments(everywhere(layout))
    kept = {name: [whole(x).clone() for x in arguments[name] or ()] for name in lists(trial.op)}
    trial.call(**arguments)
    for name, before in kept.items():
        for x, was in zip(arguments[name] or (), before, strict=True):
            found = whole(x).clone()
            if name in written(trial.op):
                place = [y.as_strided(x.shape, x.stride(), x.storage_offset()) for y in (found, was)]
                place[0].copy_(place[1])
            assert torch.equal(bits(found), bits(was)), name


def whole(x):
    """All the memory that a tensor is a part of."""
    return x if x._base is None else x._base.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


@over(trials(SOME, some))
def test_every_call_gives_the_same_bits(trial):
    """Also with memory that is NaN until it is written, where copies stand in for lists that do not lie alike."""
    for layout, only in (("as_it_lies", None), ("every_other", None), ("transposed", lists(trial.op)[1])):
        plain = trial.updated(everywhere(layout, only))
        with poisoned_memory():
            again = trial.updated(everywhere(layout, only))
        assert same(trial.updated(everywhere(layout, only)), plain) and same(again, plain)


@over([trial for trial in trials(SOME, some) if trial.device == "cpu"])
def test_any_number_of_threads(trial):
    for count in (1, 2, 3):
        with threads(count):
            assert not red(trial.verdicts()), count
            assert same(trial.updated(), trial.updated()), count


def forms(op):
    """The first case of each kind of call, by which optional arguments it gives: to a schema and a trace the numbers are all one."""
    found = {}
    for case in cases(op):
        built = case.build(torch.Generator())
        if len(built[lists(op)[0]]) <= 40:
            found.setdefault(tuple((name, type(value)) for name, value in built.items()), case)
    return list(found.values())


@over(trials(FEW, lambda op: forms(op)[: 2 if INTERPRETED else None]))
def test_opcheck(trial):
    """Tensors that are taken as they lie in one dtype, and copies of them in several."""
    layout = "as_it_lies" if trial.mix == FEW[0] else "every_other"
    torch.library.opcheck(trial.raw_op, raw_arguments(trial.op, trial.arguments(everywhere(layout))))


@over(trials(FEW[1:], lambda op: forms(op)[: 1 if INTERPRETED else None]))
@pytest.mark.parametrize("backend", ["aot_eager"] if INTERPRETED else ["aot_eager", "inductor"])
def test_compiles_whole(trial, backend):
    """Between operators of torch that make what the op reads and read what it writes."""
    first_list, source = lists(trial.op)[:2]

    def step(arguments):
        arguments = {**arguments, source: [x * 2 for x in arguments[source]]}
        trial.call(**arguments)
        return [x + 1 for x in arguments[first_list]]

    torch._dynamo.reset()
    compiled, plain = trial.arguments(), trial.arguments()
    for found, expected in zip(torch.compile(step, fullgraph=True, backend=backend)(compiled), step(plain), strict=True):
        assert torch.equal(bits(found), bits(expected))
    assert all(same({name: compiled[name]}, {name: plain[name]}) for name in written(trial.op) if plain[name])


@over(trials(("float32",), first))
def test_autograd_knows_that_a_tensor_changed(trial):
    arguments = trial.arguments()
    name = lists(trial.op)[0]
    leaf = arguments[name][0].requires_grad_()
    kept = (leaf * leaf).sum()
    before = leaf.detach().clone()
    trial.call(**arguments)
    assert not torch.equal(leaf.detach(), before)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@over(trials(("float32",), first))
def test_any_lists(trial):
    taken = [trial.but(mix=mix) for mix in MIXES]
    taken = [other for other in taken if other in trials(chosen=first)]

    @settings(max_examples=6 if INTERPRETED else 60, deadline=None, database=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        case = data.draw(st.sampled_from([case for case in cases(trial.op) if drawable(trial.op, case)]), label="case")
        shape = st.lists(st.integers(0, 9), max_size=4) | st.integers(0, 70).map(lambda n: [n])
        shapes = data.draw(st.lists(shape, max_size=9), label="shapes")
        drawn = data.draw(st.sampled_from(taken), label="mix").but(case=reshaped(trial.op, case, shapes))
        layouts = {name: data.draw(st.sampled_from(sorted(EVERY_LAYOUT)), label=name) for name in lists(trial.op)}
        assert not red(drawn.verdicts(lambda name, i, x: EVERY_LAYOUT[layouts[name]](x)))

    check()


def drawable(op, case):
    return case.build(torch.Generator()).get("segments") is None


def reshaped(op, case, shapes):
    """The case's options with other lists; of an old list per layer there are as many as tensors."""

    def build(generator):
        made = case.build(generator)

        def fill(shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        made |= {name: [fill(shape) for shape in shapes] if made[name] else None for name in lists(op)}
        if "adapt" in made:
            made["adapt"] = [(made["adapt"] * (len(shapes) + 1))[i] for i in range(len(shapes))]
        return made

    return Case(f"{case.name} of {len(shapes)}", build)


@EVERY_OP
def test_empty_lists_are_legal(op):
    arguments = {**trials(("float32",), of(op, *first(op)))[0].arguments(), **dict.fromkeys(lists(op), [])}
    arguments |= {"adapt": []} if "adapt" in arguments else {}
    assert getattr(functional, op)(**arguments) is None


@EVERY_OP
def test_backend_by_name_runs_or_raises(op, monkeypatch):
    def arguments():
        return testing.update_inputs(cases(op)[0], lambda name, i: torch.float32)

    call = getattr(functional, op)
    with pytest.raises(ValueError, match=f"{op}: backend must be one of triton, cuda, cpu, reference; got 'fast'"):
        call(**arguments(), backend="fast")
    with pytest.raises(RuntimeError, match=f"{op}: backend 'cuda' was asked for and cannot run"):
        call(**arguments(), backend="cuda")
    monkeypatch.setenv("FUSEER_BACKEND", "quick")
    with pytest.raises(ValueError, match=f"{op}: FUSEER_BACKEND must be one of"):
        call(**arguments())
    by_name, by_environment = arguments(), arguments()
    monkeypatch.setenv("FUSEER_BACKEND", "reference")
    call(**by_environment)
    monkeypatch.delenv("FUSEER_BACKEND")
    call(**by_name, backend="reference")
    assert same(by_environment, {name: by_name[name] for name in written(op) if by_name[name]})
