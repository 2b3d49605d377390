"""Is the soft-target cross-entropy its formula, and refused clearly?"""

import pytest
import torch

from fuseer.kernels.soft_xent import soft_xent


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


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)])
@pytest.mark.parametrize("options", [{}, {"target_temperature": 0.5}, {"target_temperature": 0.5, "target_center": normal(4, seed=3)}])
def test_gradcheck(weights, options):
    logits, target = normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda x: soft_xent(x, target, temperature=0.7, weights=weights, **options), logits)


def test_half_logits_take_a_float_target_and_give_a_half_gradient():
    logits = normal(3, 4).bfloat16().requires_grad_()
    loss = soft_xent(logits, normal(3, 4, seed=1).softmax(1))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16


def test_second_derivative_is_refused():
    logits = normal(3, 4).requires_grad_()
    dloss = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(soft_xent(logits, normal(3, 4, seed=1)), logits, dloss, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_changes_nothing():
    logits, target = normal(3, 4).float(), normal(3, 4, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = soft_xent(logits, target)
    assert torch.equal(inside, soft_xent(logits, target))


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
