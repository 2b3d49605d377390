"""Do the Triton kernels of ema_update_ and lars_update_, interpreted, move the bytes and make the launches that they promise?

Not collected by name: test_interpreted.py runs this file in a process of its own, with TRITON_INTERPRET=1 and the plugin interpreter.
"""

import pytest
import torch
from grid import inside, misaligned, poisoned_memory
from interpreted import nbytes, uniform
from interpreter import counted

from fuseer.kernels import _chunks
from fuseer.kernels.ema_update_ import _triton as ema_update_
from fuseer.kernels.ema_update_ import reference as ema_reference
from fuseer.kernels.lars_update_ import _triton as lars_update_
from fuseer.kernels.lars_update_ import reference as lars_reference
from fuseer.kernels.testing import error_vs_eager

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
SHAPES = ((), (0,), (1,), (15,), (16,), (17,), (3, 0, 2), (9, 33), (5, 8, 3, 3), (64,))
# of the lists of an op; the last one of ema_update_'s is the shadow
TRIPLES = ((SINGLE,) * 3, (BRAIN,) * 3, (HALF,) * 3, (SINGLE, BRAIN, BRAIN), (SINGLE, HALF, BRAIN), (BRAIN, SINGLE, HALF))
MIXES = pytest.mark.parametrize("dtypes", TRIPLES, ids=lambda dtypes: "-".join(str(x).removeprefix("torch.") for x in dtypes))
OPTIONS = dict(lr=0.7, momentum=0.5, weight_decay=0.3, trust_coefficient=0.4, eps=0.0, denominator="sum", adapt=None)
OPTIONS |= dict(lr_in_momentum=False, nesterov=False, clip=False, skip=None, segments=None, group_name="")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that tiny tensors fill several, and so few programs a piece that each takes several of them."""
    monkeypatch.setattr(ema_update_, "BLOCK", 16)
    monkeypatch.setattr(lars_update_, "BLOCK", 16)
    monkeypatch.setattr(lars_update_, "RUNS", 4)
    monkeypatch.setattr(lars_update_, "BLOCK_P", 2)


@pytest.fixture
def measured(monkeypatch):
    """Runs a body and returns the count of its launches; memory that nobody wrote is NaN, and kernels reach what is in tables alone."""
    reached = []

    def table(lists, **options):
        reached.extend(x for tensors in lists for x in tensors)
        return made(lists, **options)

    def run(body, *arguments):
        reached.clear()
        with poisoned_memory(), counted(reached) as count:
            assert body(*arguments) is None
        return count

    made = _chunks.table
    monkeypatch.setattr(_chunks, "table", table)
    return run


def drawn(shapes, dtype, seed=0):
    return [uniform(*shape, dtype=dtype, seed=seed + 100 * i) for i, shape in enumerate(shapes)]


def cloned(tensors):
    return [x.clone() for x in tensors]


def agree(found, eager, truth):
    """The verdict on each tensor of a list."""
    for mine, single, double in zip(found, eager, truth, strict=True):
        verdict = error_vs_eager(mine, single, double)
        assert verdict, verdict


def ema_agrees(before, teacher, student, shadow, momentum):
    runs = [
        ema_reference.ema_update_([x.to(dtype) for x in before], [x.to(dtype) for x in student], momentum)
        for dtype in (torch.float32, torch.float64)
    ]
    agree(teacher, *runs)
    if shadow:
        agree(shadow, *runs)


def lars_arguments(lists, options):
    """What the raw op takes, in its order."""
    given = {**OPTIONS, "adapt": [True] * len(lists[0]), **options}
    return (*lists, *given.values())


def lars_agrees(before, lists, options):
    *numbers, _, segments, group_name = lars_arguments(lists, options)[3:]
    runs = [
        lars_reference.lars_update_(*([x.to(dtype) for x in tensors] for tensors in before), *numbers, segments, group_name)
        for dtype in (torch.float32, torch.float64)
    ]
    for place, number in ((0, 0), (2, 1)):
        agree(lists[place], *(run[number] for run in runs))


def traffic(count, tensors):
    """Bytes (read, read once, written, written once) over all the tensors."""
    found = [count.of(x) for x in tensors]
    return tuple(sum(getattr(x, name) for x in found) for name in ("read", "read_once", "written", "written_once"))


def size(tensors):
    return sum(map(nbytes, tensors))


@MIXES
@pytest.mark.parametrize("shadowed", [True, False], ids=["shadow", "no shadow"])
def test_ema_moves_every_number_once_in_one_launch(measured, dtypes, shadowed):
    teacher, student = drawn(SHAPES, dtypes[0]), drawn(SHAPES, dtypes[1], 1)
    shadow = [torch.full(shape, torch.nan, dtype=dtypes[2]) for shape in SHAPES] if shadowed else []
    before, kept = cloned(teacher), cloned(student)
    count = measured(ema_update_.forward, teacher, student, 0.75, None, shadow)
    ema_agrees(before, teacher, kept, shadow, 0.75)
    assert count.launches == [("_update", (sum(-(-x.numel() // 16) for x in teacher),))]
    assert traffic(count, teacher) == (size(teacher),) * 4
    assert traffic(count, student) == (size(student), size(student), 0, 0)
    assert traffic(count, shadow) == (0, 0, size(shadow), size(shadow))
    assert all(torch.equal(a, b) for a, b in zip(student, kept, strict=True))


def mixed(shapes, seed, turn):
    """Tensors of all dtypes in turn, every third one off the alignment of its memory."""
    made = [uniform(*shape, dtype=(SINGLE, BRAIN, HALF)[(i + turn) % 3], seed=seed + 100 * i) for i, shape in enumerate(shapes)]
    return [misaligned(x) if (i + turn) % 3 == 1 else x for i, x in enumerate(made)]


@pytest.mark.parametrize("scalar", [None, torch.float32, torch.float64], ids=str)
def test_ema_of_every_mix_is_one_launch(measured, scalar):
    teacher, student, shadow = (mixed(SHAPES, seed, turn) for seed, turn in ((0, 0), (1, 1), (2, 0)))
    before, number = cloned(teacher), 0.996
    momentum = None if scalar is None else torch.tensor(number, dtype=scalar)
    count = measured(ema_update_.forward, teacher, student, number if scalar is None else 0.0, momentum, shadow)
    assert count.kernels == ["_update"]
    ema_agrees(before, teacher, student, shadow, number if scalar is None else momentum.item())
    assert traffic(count, teacher) == (size(teacher),) * 4


@pytest.mark.parametrize("scalar", [False, True])
def test_ema_of_all_or_nothing_is_exact(measured, scalar):
    for momentum in (0.0, 1.0):
        teacher, student, shadow = drawn(SHAPES, SINGLE), drawn(SHAPES, SINGLE, 1), drawn(SHAPES, BRAIN, 2)
        # differences of numbers of one size are exact, and prove nothing
        student = [0.001 * x for x in student]
        before = cloned(teacher)
        measured(ema_update_.forward, teacher, student, momentum, torch.tensor(momentum) if scalar else None, shadow)
        for found, copy, wanted in zip(teacher, shadow, before if momentum else student, strict=True):
            assert torch.equal(found, wanted) and torch.equal(copy, wanted.bfloat16())


def test_ema_of_other_layouts(measured):
    teacher = [uniform(4, 6, 3, 5).to(memory_format=torch.channels_last), uniform(5, 7), inside(uniform(5, 7)), uniform(9, 2).t()]
    student = [uniform(*x.shape, seed=1) for x in teacher]
    student[3] = uniform(9, 2, seed=1).t()
    shadow = [x.bfloat16().contiguous() for x in teacher[:3]] + [uniform(9, 2, dtype=BRAIN).t()]
    around = teacher[2]._base.clone()
    before = cloned(teacher)
    count = measured(ema_update_.forward, teacher, student, 0.75, None, shadow)
    ema_agrees(before, teacher, student, shadow, 0.75)
    assert count.kernels == ["_update"]
    # strides that agree are walked as they lie
    assert traffic(count, teacher[3:]) == (size(teacher[3:]),) * 4
    teacher[2].fill_(torch.nan)
    around[1:6, 1:8] = torch.nan
    torch.testing.assert_close(teacher[2]._base, around, rtol=0, atol=0, equal_nan=True)


def test_updates_of_nothing(measured):
    empty = [[torch.empty(0), torch.empty(3, 0)] for _ in range(3)]
    assert measured(ema_update_.forward, *empty[:2], 0.5, None, []).launches == []
    assert measured(lars_update_.forward, *lars_arguments(empty, {})).launches == []


VARIANTS = {
    "sum": {},
    "norm_of_sum": {"denominator": "norm_of_sum"},
    "eps": {"eps": 0.5},
    "lr_in_momentum": {"lr_in_momentum": True},
    "nesterov": {"nesterov": True},
    "nesterov_lr_in_momentum": {"nesterov": True, "lr_in_momentum": True, "denominator": "norm_of_sum"},
    "clip": {"clip": True, "trust_coefficient": 4.0, "lr": 1.5},
    "clip_below": {"clip": True},
    "no_decay": {"weight_decay": 0.0},
}


@pytest.mark.parametrize(("variant", "dtypes"), [(v, (SINGLE,) * 3) for v in VARIANTS] + [("nesterov", x) for x in TRIPLES[1:]], ids=str)
def test_lars_reads_twice_and_writes_once_in_two_launches(measured, dtypes, variant):
    lists = [drawn(SHAPES, dtype, seed) for seed, dtype in enumerate(dtypes)]
    adapt = [i % 3 != 1 for i in range(len(SHAPES))]
    before, options = [cloned(tensors) for tensors in lists], {**VARIANTS[variant], "adapt": adapt}
    count = measured(lars_update_.forward, *lars_arguments(lists, options))
    lars_agrees(before, lists, options)
    programs = sum(-(-blocks // max(1, -(-blocks // 4))) for blocks in (-(-x.numel() // 16) for x in lists[0]))
    assert count.launches == [("_partial_sums", (programs,)), ("_update", (programs,))]
    params, grads, momenta = lists
    twice = [size(tensors) + size(x for x, adapted in zip(tensors, adapt, strict=True) if adapted) for tensors in (params, grads)]
    assert traffic(count, params) == (twice[0], size(params), size(params), size(params))
    assert traffic(count, grads) == (twice[1], size(grads), 0, 0)
    assert traffic(count, momenta) == (size(momenta),) * 4
    assert all(torch.equal(a, b) for a, b in zip(grads, before[1], strict=True))


def test_lars_of_every_mix_is_two_launches(measured):
    lists = [mixed(SHAPES, seed, seed) for seed in range(3)]
    before = [cloned(tensors) for tensors in lists]
    count = measured(lars_update_.forward, *lars_arguments(lists, {}))
    assert count.kernels == ["_partial_sums", "_update"]
    lars_agrees(before, lists, {})


@pytest.mark.parametrize("flag", [torch.tensor(True), torch.tensor([1.0]), torch.tensor(torch.nan), torch.tensor(-3)], ids=repr)
def test_lars_under_a_flag_changes_nothing(measured, flag):
    lists = [drawn(SHAPES, SINGLE, seed) for seed in range(3)]
    lists[1][5].fill_(torch.inf)
    before = [cloned(tensors) for tensors in lists]
    count = measured(lars_update_.forward, *lars_arguments(lists, {"skip": flag}))
    assert all(torch.equal(a, b) for old, new in zip(before, lists, strict=True) for a, b in zip(old, new, strict=True))
    assert traffic(count, [*lists[0], *lists[2]])[2] == 0
    lists[1][5].zero_()
    before[1][5].zero_()
    measured(lars_update_.forward, *lars_arguments(lists, {"skip": torch.zeros_like(flag)}))
    lars_agrees(before, lists, {})


SEGMENTS = torch.tensor([[1, 50, 70, 2], [0, 10, 20, 1], [1, 3, 40, 1], [0, 0, 0, 0], [0, 64, 36, 2], [1, 130, 65, 3], [0, 30, 17, 4]])


def padded(dtypes, offset=0):
    """Two flat tensors each, NaN where no segment is, which is where padding would be."""
    lists = [[uniform(offset + n, dtype=dtype, seed=seed)[offset:] for n in (100, 200)] for seed, dtype in enumerate(dtypes)]
    for tensors in lists:
        for i, x in enumerate(tensors):
            inside = torch.zeros(len(x), dtype=torch.bool)
            for tensor, start, numel, _ in SEGMENTS.tolist():
                inside[start : start + numel] |= tensor == i
            x.masked_fill_(~inside, torch.nan)
    return lists


@MIXES
@pytest.mark.parametrize("offset", [0, 3])
def test_lars_of_segments_leaves_padding_alone(measured, dtypes, offset):
    lists = padded(dtypes, offset)
    before, options = [cloned(tensors) for tensors in lists], {"segments": SEGMENTS, "adapt": [True, True, True, False, True]}
    count = measured(lars_update_.forward, *lars_arguments(lists, options))
    assert count.kernels == ["_partial_sums", "_update"]
    for old, new in ((before[0], lists[0]), (before[2], lists[2])):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
    clean = [[x.nan_to_num(0.0) for x in tensors] for tensors in before], [[x.nan_to_num(0.0) for x in tensors] for tensors in lists]
    lars_agrees(*clean, options)
    adapted = sum(numel for *_, numel, layer in SEGMENTS.tolist() if layer != 3)
    every, item = sum(SEGMENTS[:, 2].tolist()), dtypes[0].itemsize
    assert traffic(count, lists[0]) == ((every + adapted) * item, every * item, every * item, every * item)
    momenta = every * dtypes[2].itemsize
    assert traffic(count, lists[2]) == (momenta,) * 4


def test_lars_with_others_merges_and_reduces_its_sums(measured, monkeypatch):
    """As if another process had exactly the same pieces."""
    seen = []

    def all_reduce(tensor, reduction, name):
        assert (tensor.dtype, reduction, name) == (torch.float64, "sum", "the others")
        seen.append(tensor.clone())
        return 2 * tensor

    lists, options = padded((SINGLE,) * 3), {"segments": SEGMENTS, "adapt": [True] * 6, "group_name": "the others"}
    before = [cloned(tensors) for tensors in lists]
    monkeypatch.setattr(lars_update_, "all_reduce", all_reduce)
    monkeypatch.setattr(lars_reference.dispatch, "all_reduce", lambda tensor, *_: 2 * tensor)
    count = measured(lars_update_.forward, *lars_arguments(lists, options))
    assert count.launches[1] == ("_merge_sums", (6,)) and count.kernels == ["_partial_sums", "_merge_sums", "_update"]
    (sums,) = seen
    whole = lars_reference.squares(*before[:2], 0.3, 6, SEGMENTS, "the others") / 2
    torch.testing.assert_close(sums, whole, rtol=1e-6, atol=0)
    assert (sums[[0, 5]] == 0).all()
    lars_agrees(*[[[x.nan_to_num(0.0) for x in tensors] for tensors in which] for which in (before, lists)], options)


def test_a_process_without_a_number_joins_the_reduction(measured, monkeypatch):
    seen = []
    monkeypatch.setattr(lars_update_, "all_reduce", lambda tensor, *_: seen.append(tensor.clone()) or tensor)
    lists = [[torch.full((7,), torch.nan)] for _ in range(3)]
    options = {"segments": torch.zeros((0, 4), dtype=torch.int64), "adapt": [True, False, True], "group_name": "the others"}
    count = measured(lars_update_.forward, *lars_arguments(lists, options))
    assert count.kernels == ["_merge_sums"]
    assert torch.equal(seen[0], torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("exponent", [-40, -30, -19, 0, 19, 30, 38])
@pytest.mark.parametrize("denominator", ["sum", "norm_of_sum"])
def test_no_square_overflows_or_vanishes(measured, exponent, denominator):
    """|g| times a power of ten changes neither a ratio's accuracy nor whether there is one."""
    shapes, scale = ((40,), (5, 9)), 10.0**exponent
    params, momenta = drawn(shapes, SINGLE), [torch.zeros(shape) for shape in shapes]
    grads = [(x.double() * scale).float() for x in drawn(shapes, SINGLE, 1)]
    options = {"denominator": denominator, "weight_decay": 0.0, "lr": 1.0}
    lists = [params, grads, momenta]
    before = [cloned(tensors) for tensors in lists]
    measured(lars_update_.forward, *lars_arguments(lists, options))
    if exponent > -40:
        lars_agrees(before, lists, options)
    # denormal numbers have few digits, and their quotient may be beyond float32
    assert all((new != old).any() and new.isfinite().all() for old, new in zip(before[0], params, strict=True)) or exponent == -40


@pytest.mark.parametrize("denominator", ["sum", "norm_of_sum"])
def test_lars_where_a_norm_is_zero(measured, denominator):
    params, grads, momenta = (drawn([(20,)] * 4, SINGLE, seed) for seed in range(3))
    params[0].zero_()
    grads[1].zero_()
    params[2].zero_()
    grads[2].zero_()
    grads[3] = -0.5 * params[3]
    lists, options = [params, grads, momenta], {"denominator": denominator, "weight_decay": 0.5}
    before = [cloned(tensors) for tensors in lists]
    measured(lars_update_.forward, *lars_arguments(lists, options))
    lars_agrees(before, lists, options)


def test_a_gradient_that_almost_cancels_the_decay_keeps_its_norm(measured):
    """|g|^2 + 2 weight_decay g.w + ... would be noise; so would (g + weight_decay w) with weight_decay rounded to one float."""
    params, decay = drawn([(1000,)], SINGLE), 0.1
    grads = [(-decay * x.double() * (1 + 1e-6)).float() for x in params]
    momenta = [torch.zeros(1000)]
    options = {"denominator": "norm_of_sum", "weight_decay": decay, "momentum": 0.0}
    lists = [params, grads, momenta]
    before = [cloned(tensors) for tensors in lists]
    measured(lars_update_.forward, *lars_arguments(lists, options))
    w, g = (x[0].double() for x in before[:2])
    wanted = 0.4 * w.norm() * (g + decay * w) / (g + decay * w).norm()
    # float32 with one float of decay is off by a hundredth
    torch.testing.assert_close(momenta[0].double(), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


def test_lars_without_a_number_or_with_none_flows_through(measured):
    """What is not finite in a gradient ends where the reference has it."""
    for value in (torch.nan, torch.inf):
        params, grads, momenta = (drawn([(40,), (9,)], SINGLE, seed) for seed in range(3))
        grads[0][17] = value
        lists, before = [params, grads, momenta], [cloned(params), cloned(grads), cloned(momenta)]
        measured(lars_update_.forward, *lars_arguments(lists, {}))
        wanted = lars_reference.lars_update_(*before, *lars_arguments(before, {})[3:-3], None, "")
        for found, expected in zip((*params, *momenta), (*wanted[0], *wanted[1]), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_blocks_of_production(measured, monkeypatch):
    monkeypatch.undo()
    lists = [drawn([(5000,), (3,), (2048,), (2049,)], dtype, seed) for seed, dtype in enumerate((SINGLE, BRAIN, SINGLE))]
    before = [cloned(tensors) for tensors in lists]
    lars_update_.forward(*lars_arguments(lists, {}))
    lars_agrees(before, lists, {})
    teacher, kept = lists[0], cloned(lists[0])
    ema_update_.forward(teacher, lists[1], 0.99, None, [])
    ema_agrees(kept, teacher, lists[1], [], 0.99)


def test_refusals_in_words():
    x, y = torch.empty(3), torch.empty(3, dtype=torch.float64)
    assert ema_update_.unsupported([x], [x], 0.5, None, []) is None
    assert ema_update_.unsupported([x, y], [x, x], 0.5, None, []) == "its arithmetic is float32 and teacher[1] is float64"
    assert ema_update_.unsupported([x], [x], 0.5, None, [y]) == "its arithmetic is float32 and shadow[0] is float64"
    assert lars_update_.unsupported([x], [y], [x]) == "its arithmetic is float32 and grads[0] is float64"
    assert lars_update_.unsupported([x.to("meta")], [x], [x]) == "params[0] is on meta, not on a CUDA device"
