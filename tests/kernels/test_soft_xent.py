"""Is the soft-target cross-entropy its formula, and refused clearly?"""

import pytest
import torch
from grid import DTYPES, of, over, trials, widest

from fuseer.kernels.soft_xent import soft_xent
from fuseer.kernels.testing import Case

EVERY_BACKEND = over(widest("soft_xent"))


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_is_its_formula():
    logits, target, weights = normal(7, 5), normal(7, 5, seed=1), normal(7, seed=2)
    found = soft_xent(logits, target, temperature=0.3, weights=weights)
    formula = weights * (target.sum(1) * (logits / 0.3).logsumexp(1) - (target * logits).sum(1) / 0.3)
    torch.testing.assert_close(found, formula, rtol=1e-12, atol=1e-12)


def test_is_torch_cross_entropy_on_probabilities():
    logits, target = normal(7, 5), normal(7, 5, seed=1).softmax(1)
    expected = torch.nn.functional.cross_entropy(logits / 0.1, target, reduction="none")
    torch.testing.assert_close(soft_xent(logits, target), expected, rtol=1e-12, atol=1e-12)


def test_centred_target_is_a_softmax_of_the_teacher():
    logits, teacher, center = normal(7, 5), normal(7, 5, seed=1), normal(5, seed=2)
    centred = soft_xent(logits, teacher, target_center=center, target_temperature=0.04)
    torch.testing.assert_close(centred, soft_xent(logits, ((teacher - center) / 0.04).softmax(1)), rtol=1e-12, atol=1e-12)
    sharpened = soft_xent(logits, teacher, target_temperature=0.04)
    torch.testing.assert_close(sharpened, soft_xent(logits, (teacher / 0.04).softmax(1)), rtol=1e-12, atol=1e-12)


def test_chance_is_the_logarithm_of_k():
    for k, value in ((3000, 8.0064), (65536, 11.0904)):
        loss = soft_xent(torch.zeros(2, k), torch.full((2, k), 1 / k))
        torch.testing.assert_close(loss, torch.full((2,), value), rtol=0, atol=5e-5)


def test_half_logits_take_a_float_target_and_give_a_half_gradient():
    logits = normal(3, 4).bfloat16().requires_grad_()
    loss = soft_xent(logits, normal(3, 4, seed=1).softmax(1))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16


def extreme(name, **changes):
    """A case of ordinary logits and a target of ordinary probabilities, some of it replaced: by a value, or by a function of it."""

    def build(generator):
        rows = [torch.randn((9, 21), dtype=torch.float64, generator=generator) for _ in range(2)]
        made = {"logits": rows[0], "target": rows[1].softmax(1), "temperature": 0.1, "weights": None}
        made |= {"target_center": None, "target_temperature": None}
        return made | {key: value(made[key]) if callable(value) else value for key, value in changes.items()}

    return Case(name, build)


def one_hot(target):
    return torch.nn.functional.one_hot(target.argmax(1), target.shape[1]).double()


def masked(row_of_minus_infinities):
    """-inf in every seventh place, as of a class that cannot be."""
    return row_of_minus_infinities.masked_fill(torch.arange(21) % 7 == 0, -torch.inf)


EXTREMES = (
    extreme("spread", logits=lambda x: x * 300),
    extreme("far_above", logits=lambda x: x + 4096),
    extreme("constant_rows", logits=lambda x: x[:, :1].expand_as(x).clone()),
    extreme("one_hot", target=one_hot),
    extreme("no_target", target=torch.zeros_like),
    extreme("sums_of_seven", target=lambda x: 7 * x),
    extreme("no_weight", weights=torch.zeros(9, dtype=torch.float64)),
    extreme("masked_teacher", target=masked, target_temperature=0.04),
    extreme("certain_teacher", target=lambda x: x * 2000, target_temperature=0.04, target_center=torch.ones(21, dtype=torch.float64)),
)


@over(trials(DTYPES, of("soft_xent", *EXTREMES)))
def test_extremes(trial):
    found = trial.verdicts()
    assert all(found.values()), {name: str(verdict) for name, verdict in found.items()}
    if trial.case.name in ("no_target", "no_weight"):
        assert all((x == 0).all() for x in trial.outputs().values())


@EVERY_BACKEND
@pytest.mark.parametrize("name", ["logits", "target", "weights", "target_center"])
def test_nan_is_seen_in_its_row_and_nowhere_else(trial, name):
    """target_center belongs to all rows."""
    arguments = {
        "logits": normal(4, 6),
        "target": normal(4, 6, seed=1),
        "weights": normal(4, seed=2),
        "target_center": normal(6, seed=3),
    }
    arguments[name].view(-1)[2] = torch.nan
    call = {key: x.to(trial.device, trial.dtype) for key, x in arguments.items()}
    call["logits"].requires_grad_()
    loss = trial.call(**call, target_temperature=0.5)
    (gradient,) = torch.autograd.grad(loss.sum(), call["logits"])
    row = 2 if name == "weights" else 0
    expected = torch.arange(4) == row if name != "target_center" else torch.ones(4, dtype=torch.bool)
    assert torch.equal(loss.isnan().cpu(), expected)
    assert torch.equal(gradient.isnan().all(1).cpu(), expected)
    assert torch.equal(gradient.isnan().any(1).cpu(), expected)


@EVERY_BACKEND
def test_keeps_four_numbers_a_row_and_nothing_of_its_own_size(trial):
    arguments = trial.arguments()
    arguments["logits"].requires_grad_()
    given, kept = {x.data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor)}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        trial.call(**arguments)
    assert sum(x.numel() for x in kept if x.data_ptr() not in given) <= 4 * len(arguments["logits"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"logits": None}, TypeError, "logits must be a tensor"),
        ({"logits": torch.ones(3, 4, dtype=torch.int32)}, TypeError, "logits must be float16"),
        ({"logits": torch.ones(3, 4, 1)}, ValueError, r"logits must be \[N, K\]; got \[3, 4, 1\]"),
        ({"logits": torch.ones(3, 0)}, ValueError, "K >= 1"),
        ({"target": None}, TypeError, "target must be a tensor"),
        ({"target": torch.ones(3, 5)}, ValueError, r"target must be \[N, K\] = \[3, 4\]; got \[3, 5\]"),
        ({"target": torch.ones(3, 4, dtype=torch.bool)}, TypeError, "target must be float16"),
        ({"target": torch.ones(3, 4, device="meta")}, ValueError, "target must be on the device of logits; got meta and cpu"),
        ({"weights": torch.ones(4)}, ValueError, r"weights must be \[N\] = \[3\]; got \[4\]"),
        ({"target_center": torch.ones(4)}, ValueError, "target_center needs target_temperature"),
        ({"target_center": torch.ones(3), "target_temperature": 0.1}, ValueError, r"target_center must be \[K\] = \[4\]; got \[3\]"),
        ({"target_temperature": 0.0}, ValueError, "target_temperature must be finite and > 0; got 0.0"),
        ({"temperature": -0.1}, ValueError, "temperature must be finite and > 0; got -0.1"),
        ({"temperature": True}, TypeError, "temperature must be a number; got bool"),
    ],
)
def test_refuses(changes, error, words):
    arguments = {"logits": torch.ones(3, 4), "target": torch.ones(3, 4), **changes}
    with pytest.raises(error, match=f"^soft_xent: .*{words}"):
        soft_xent(**arguments)
