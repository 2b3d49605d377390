"""Is LARC apex's, around any optimizer: its formula, its groups, schedules, closures, checkpoints, and no question to the device?"""

import copy
import inspect
import io
import pickle

import pytest
import torch
from test_modules import AsksNothing

from fuseer.kernels.modules import LARC

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.02),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.02),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1, weight_decay=0.02),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.02),
}


def parameters(dtype=torch.float64):
    """A matrix, a vector, one of zeros, one whose gradient is zero, one without a gradient."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((7, 5), (33,), (4,), (9,), (3,))]
    made[2].zero_()
    return [torch.nn.Parameter(x.to(dtype)) for x in made]


def gradients(params, step):
    generator = torch.Generator().manual_seed(step + 1)
    for i, p in enumerate(params[:-1]):
        p.grad = 0 * p.detach() if i == 3 else torch.randn(p.shape, dtype=torch.float64, generator=generator).to(p.dtype)


def groups(params):
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.7, "weight_decay": 0.3}]


def published(optimizer, trust_coefficient, clip, eps):
    """One step as the paper has it, tensor by tensor, the norms asked for."""
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = 0
        for p in group["params"]:
            if p.grad is None:
                continue
            w, g = p.detach().norm().item(), p.grad.norm().item()
            if w != 0 and g != 0:
                ratio = trust_coefficient * w / (g + decay * w + eps)
                ratio = min(ratio / group["lr"], 1) if clip else ratio
                p.grad = ratio * (p.grad + decay * p.detach())
    optimizer.step()
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("trust_coefficient", "clip", "eps"), [(0.02, True, 1e-8), (0.001, False, 1e-8), (3.0, True, 0.1)])
def test_is_the_published_loop(name, trust_coefficient, clip, eps):
    ours, theirs = parameters(), parameters()
    wrapped = LARC(OPTIMIZERS[name](groups(ours)), trust_coefficient, clip, eps)
    plain = OPTIMIZERS[name](groups(theirs))
    for step in range(4):
        gradients(ours, step)
        gradients(theirs, step)
        with AsksNothing():
            wrapped._scale([group["weight_decay"] for group in wrapped.param_groups])
        gradients(ours, step)
        wrapped.step()
        published(plain, trust_coefficient, clip, eps)
        for mine, his in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.detach(), his.detach(), rtol=1e-12, atol=1e-14)
    assert [group["weight_decay"] for group in wrapped.param_groups] == [0.02, 0.3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_single_and_half(dtype):
    """Within the roundings of the gradient: two, of at most half a spacing each, and what the step makes of them."""
    ours, truth = parameters(dtype), [torch.nn.Parameter(x.detach().double()) for x in parameters(dtype)]
    gradients(ours, 0)
    for p, x in zip(truth[:-1], ours, strict=False):
        p.grad = x.grad.double()
    LARC(torch.optim.SGD(groups(ours), lr=0.1, weight_decay=0.02)).step()
    published(torch.optim.SGD(groups(truth), lr=0.1, weight_decay=0.02), 0.02, True, 1e-8)
    for mine, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.detach().double(), exact.detach(), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_apex_defaults():
    defaults = {name: p.default for name, p in inspect.signature(LARC).parameters.items()}
    assert defaults == {"optimizer": inspect.Parameter.empty, "trust_coefficient": 0.02, "clip": True, "eps": 1e-8}


def test_the_decay_is_back_after_a_step_that_fails():
    params = parameters()
    wrapped = LARC(OPTIMIZERS["sgd"](groups(params)))

    def closure():
        assert [group["weight_decay"] for group in wrapped.param_groups] == [0, 0]
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        wrapped.step(closure)
    assert [group["weight_decay"] for group in wrapped.param_groups] == [0.02, 0.3]


def test_a_closure_is_evaluated_then_scaled():
    """As often as the inner optimizer asks: LBFGS does more than once."""
    ours, theirs = parameters(), parameters()

    def loss_of(params):
        return sum((p - 1).square().sum() for p in params)

    def closure():
        for p in ours:
            p.grad = None
        loss = loss_of(ours)
        loss.backward()
        return loss

    loss_of(theirs).backward()
    expected = loss_of(theirs).item()
    published(OPTIMIZERS["sgd"](groups(theirs)), 0.02, True, 1e-8)
    assert LARC(OPTIMIZERS["sgd"](groups(ours))).step(closure).item() == expected
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.detach(), his.detach(), rtol=1e-12, atol=1e-14)
    before = loss_of(ours).item()
    LARC(torch.optim.LBFGS(ours, lr=0.5, max_iter=5)).step(closure)
    assert loss_of(ours).item() < before


@pytest.mark.parametrize("of_wrapper", [False, True])
def test_schedulers_take_the_wrapper_or_what_it_wraps(of_wrapper, recwarn):
    params = parameters()
    inner = torch.optim.SGD(params, lr=1.0)
    wrapped = LARC(inner)
    scheduler = torch.optim.lr_scheduler.StepLR(wrapped if of_wrapper else inner, 2, gamma=0.1)
    found = []
    for step in range(4):
        gradients(params, step)
        wrapped.step()
        scheduler.step()
        found.append(wrapped.param_groups[0]["lr"])
    assert found == pytest.approx([1.0, 0.1, 0.1, 0.01])
    assert not recwarn.list


def test_everything_else_is_the_inner_optimizers():
    params = parameters()
    inner = OPTIMIZERS["sgd"](groups(params))
    wrapped = LARC(inner)
    gradients(params, 0)
    wrapped.step()
    assert isinstance(wrapped, torch.optim.Optimizer)
    assert wrapped.param_groups is inner.param_groups and wrapped.state is inner.state and wrapped.defaults is inner.defaults
    assert repr(wrapped) == repr(inner) and wrapped.__getstate__().keys() == inner.__getstate__().keys()
    assert wrapped.state_dict().keys() == inner.state_dict().keys()
    wrapped.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in params)
    wrapped.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert len(inner.param_groups) == 3
    wrapped.param_groups = inner.param_groups[:2]
    assert len(inner.param_groups) == 2
    with pytest.raises(AttributeError, match="no_such"):
        wrapped.no_such  # noqa: B018


def test_it_is_saved_loaded_and_copied():
    params, others = parameters(), parameters()
    wrapped, loaded = (LARC(OPTIMIZERS["sgd"](groups(x)), clip=False) for x in (params, others))
    for step in range(2):
        gradients(params, step)
        wrapped.step()
    stored = io.BytesIO()
    torch.save(wrapped.state_dict(), stored)
    stored.seek(0)
    loaded.load_state_dict(torch.load(stored))
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
    for other in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert (other.trust_coefficient, other.clip, other.eps) == (0.02, False, 1e-8)
        assert torch.equal(other.param_groups[0]["params"][0], params[0])
    gradients(params, 9)
    gradients(others, 9)
    wrapped.step()
    loaded.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_a_grad_scaler_unscales_first_and_skips_an_overflow():
    """Also around a fused optimizer, which would unscale what is scaled by its own norm already."""
    for scale, overflow in ((1024.0, False), (1024.0, True)):
        ours, theirs = parameters(torch.float32), parameters(torch.float32)
        wrapped, plain = (LARC(torch.optim.SGD(x, lr=0.1, momentum=0.9, weight_decay=0.02, fused=True)) for x in (ours, theirs))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))
        gradients(ours, 0)
        gradients(theirs, 0)
        for p in ours[:-1]:
            p.grad.mul_(torch.inf if overflow else scale)
        scaler.step(wrapped)
        scaler.update()
        if not overflow:
            plain.step()
        for mine, his in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.detach(), his.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("sgd",), TypeError, "optimizer must be a torch.optim.Optimizer; got str"),
        ((None, 0.0), ValueError, "trust_coefficient must be finite and > 0; got 0.0"),
        ((None, 0.02, True, -1.0), ValueError, "eps must be in"),
    ],
)
def test_refuses(arguments, error, words):
    optimizer, *rest = arguments
    with pytest.raises(error, match=f"LARC: {words}"):
        LARC(OPTIMIZERS["sgd"](parameters()) if optimizer is None else optimizer, *rest)


def test_refuses_to_maximize():
    params = parameters()
    gradients(params, 0)
    wrapped = LARC(torch.optim.SGD(params, lr=0.1, weight_decay=0.1, maximize=True))
    with pytest.raises(ValueError, match="LARC: no group may maximize"):
        wrapped.step()
    assert wrapped.param_groups[0]["weight_decay"] == 0.1
