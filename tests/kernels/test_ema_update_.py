"""Is the momentum update its formula, exact at its ends, never stuck in float32, and refused clearly?"""

import pytest
import torch
from grid import over
from updates import bits, first, of, trials

from fuseer.kernels.ema_update_ import ema_update_

EVERY_TRIAL = trials(("float32",), of("ema_update_", *first("ema_update_")))
EVERY_BACKEND = over(EVERY_TRIAL)
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(dtype, device, seed=0):
    """Tensors of few and of many elements."""
    return [normal(n, seed=seed + n).to(device, dtype) for n in (0, 1, 5, 16, 33, 2049, 20000)]


def test_is_its_formula():
    teacher, student = normal(7, 5), normal(7, 5, seed=1)
    expected, shadow = 0.9 * teacher + 0.1 * student, torch.zeros(7, 5, dtype=torch.bfloat16)
    assert ema_update_([teacher], [student], 0.9, shadow=[shadow]) is None
    torch.testing.assert_close(teacher, expected, rtol=1e-15, atol=1e-15)
    assert torch.equal(shadow, expected.bfloat16())


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_its_ends_are_exact(trial, dtype):
    """Momentum 0 gives the student and 1 the teacher, to the bit, as a number and as a tensor."""
    for end in (0.0, 1.0):
        for momentum in (end, torch.tensor(end, device=trial.device)):
            teacher, student = (drawn(dtype, trial.device, seed) for seed in (0, 1))
            kept = [x.clone() for x in (teacher if end else student)]
            trial.call(teacher, student, momentum)
            assert all(torch.equal(x, y) for x, y in zip(teacher, kept, strict=True)), momentum


@EVERY_BACKEND
def test_a_scalar_tensor_is_that_number(trial):
    for momentum in (0.25, 0.996, 0.9999):
        found = []
        for m in (momentum, *(torch.tensor(momentum, dtype=dtype, device=trial.device) for dtype in (torch.float32, torch.float64))):
            teacher, student = drawn(torch.float32, trial.device), drawn(torch.bfloat16, trial.device, 1)
            trial.call(teacher, student, m)
            found.append(torch.cat(teacher))
        # weights that differ by a rounding of momentum, on numbers of up to 5
        torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[2], found[0], rtol=1e-6, atol=1e-6)


@EVERY_BACKEND
@HALVES
def test_the_shadow_is_the_rounded_teacher(trial, half):
    teacher, student = drawn(torch.float32, trial.device), drawn(half, trial.device, 1)
    shadow = [torch.full_like(x, torch.nan, dtype=half) for x in teacher]
    trial.call(teacher, student, 0.9, shadow=shadow)
    assert all(torch.equal(bits(x), bits(y.to(half))) for x, y in zip(shadow, teacher, strict=True))


@over([trial for trial in EVERY_TRIAL if trial.backend == "cpu"])
def test_a_teacher_that_equals_its_student_stays_so(trial):
    """The rounded m and 1 minus it add up to 1 (m >= 1/2); rounding 1 - m by itself drifts 1.6e-4 in 20,000 steps of m = 0.9999."""
    for momentum in (0.5, 2 / 3, 0.9, 0.99, 0.996, 0.999, 0.9999):
        teacher = drawn(torch.float32, trial.device)
        student = [x.clone() for x in teacher]
        trial.call(teacher, student, momentum)
        assert all(torch.equal(x, y) for x, y in zip(teacher, student, strict=True)), momentum


@EVERY_BACKEND
@HALVES
def test_half_alone_stops_moving_and_float32_with_a_shadow_does_not(trial, half):
    """From 1 towards 0 by 0.0015 and 0.0002: half a spacing below 1 is 0.00195 in bfloat16 and 0.00024 in float16."""
    momentum = 0.9985 if half == torch.bfloat16 else 0.9998
    alone, teacher = ([torch.ones(40, dtype=dtype, device=trial.device)] for dtype in (half, torch.float32))
    shadow, student = [torch.ones(40, dtype=half, device=trial.device)], [torch.zeros(40, dtype=half, device=trial.device)]
    for _ in range(100):
        trial.call(alone, student, momentum)
        trial.call(teacher, student, momentum, shadow=shadow)
    assert (alone[0] == 1).all()
    torch.testing.assert_close(teacher[0], torch.full_like(teacher[0], momentum**100), rtol=1e-5, atol=0)
    assert torch.equal(shadow[0], teacher[0].to(half)) and (shadow[0] < 1).all()


@EVERY_BACKEND
def test_nan_and_infinity_stay_where_they_are(trial):
    teacher, student = normal(70).float().to(trial.device), normal(70, seed=1).float().to(trial.device)
    teacher[3], teacher[64], student[5], student[66] = torch.nan, torch.inf, torch.nan, -torch.inf
    trial.call([teacher], [student], 0.9)
    assert torch.equal(teacher.isnan().nonzero().flatten().cpu(), torch.tensor([3, 5]))
    assert torch.equal(teacher.isinf().nonzero().flatten().cpu(), torch.tensor([64, 66]))


@EVERY_BACKEND
def test_a_thousand_steps_are_those_of_float64(trial):
    teacher, exact = normal(300).float().to(trial.device), normal(300).float().double()
    for step in range(1000):
        student = normal(300, seed=step + 1).float()
        trial.call([teacher], [student.to(trial.device)], 0.99)
        exact = 0.99 * exact + 0.01 * student.double()
    torch.testing.assert_close(teacher.double().cpu(), exact, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"student": []}, ValueError, "the lists must be equally long; got 2 teacher, 0 student"),
        ({"shadow": [torch.ones(3)]}, ValueError, "the lists must be equally long; got 2 teacher, 2 student, 1 shadow"),
        ({"student": [torch.ones(3), torch.ones(5)]}, ValueError, r"student\[1\] must have the shape of teacher\[1\], \[4\]; got \[5\]"),
        ({"student": [torch.ones(3), 4.0]}, TypeError, r"student\[1\] must be a tensor; got float"),
        ({"student": [torch.ones(3), torch.ones(4).int()]}, TypeError, r"student\[1\] must be float16, bfloat16, float32 or float64"),
        ({"teacher": [torch.ones(3), torch.ones(1).expand(4)]}, ValueError, r"teacher\[1\] is written, and is expanded"),
        ({"student": [torch.ones(3), torch.ones(4, device="meta")]}, ValueError, r"student\[1\] must be on the device of teacher"),
        ({"momentum": 1.01}, ValueError, "momentum must be in 0..1; got 1.01"),
        ({"momentum": float("nan")}, ValueError, "momentum must be in 0..1; got nan"),
        ({"momentum": torch.tensor([0.5])}, TypeError, r"momentum must be a number or a .* scalar tensor; got torch.float32 \[1\]"),
        ({"momentum": torch.tensor(1)}, TypeError, "momentum must be a number or a float32 or float64 scalar"),
        ({"momentum": torch.tensor(0.5, device="meta")}, ValueError, "momentum must be on the device of teacher; got meta and cpu"),
    ],
)
def test_refuses(changes, error, words):
    arguments = {"teacher": [torch.ones(3), torch.ones(4)], "student": [torch.zeros(3), torch.zeros(4)], "momentum": 0.5, **changes}
    before = [x.clone() for x in arguments["teacher"]]
    with pytest.raises(error, match=f"^ema_update_: .*{words}"):
        ema_update_(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments["teacher"], before, strict=True))
