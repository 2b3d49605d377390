"""Does every op, on every backend, live with autograd: gradcheck, retain_graph, no_grad, loss scaling, changed inputs?"""

import pytest
import torch
from grid import INTERPRETED, first, over, part, quick, telling, trials, with_tensors

from fuseer.kernels.testing import error_vs_eager, inputs

GRADCHECK_ELEMENTS = 400


def differentiable(found):
    return [trial for trial in found if trial.differentiable]


def small(op):
    return [case for case in telling(op) if sum(x.numel() for x in tensors(inputs(case, torch.float64))) <= GRADCHECK_ELEMENTS]


def tensors(arguments):
    return [x for x in arguments.values() if isinstance(x, torch.Tensor)]


def recorded(trial, changed=False):
    """(leaves, out, one random cotangent, arguments): the op called on leaves, or where `changed` on copies that may be written to."""
    arguments = trial.arguments()
    leaves = [arguments[name].requires_grad_() for name in trial.differentiable]
    if changed:
        arguments.update({name: leaf * 1 for name, leaf in zip(trial.differentiable, leaves, strict=True)})
    out = trial.first_output(arguments)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(out)
    return leaves, out, dout, arguments


def swapped_with_codes_held(arguments):
    """swapped_prediction's loss as a function of its scores, all codes held at their value for the scores given."""
    scores, queue, assign, epsilon, iterations, temperature = arguments.values()
    potentials, scale = part("swapped_prediction", "reference").potentials_and_scale(scores, queue, assign, epsilon, iterations, "")
    codes = (scores[list(assign)] / epsilon + potentials[:, None]).softmax(-1)
    pairs = [(a, v) for a, i in enumerate(assign) for v in range(len(scores)) if v != i]

    def loss(x):
        return -scale * sum((codes[a] * (x[v] / temperature).log_softmax(-1)).sum() for a, v in pairs) / len(pairs)

    return loss


# An op with a detached intermediate differs from its own differences: what gradcheck takes them of instead.
HELD = {"swapped_prediction": swapped_with_codes_held}


class Held(torch.autograd.Function):
    """Forward: `value`, a function of the first differentiable input; backward: the op's own, at the point it is called at."""

    @staticmethod
    def forward(ctx, value, op, x):
        ctx.op = op
        ctx.save_for_backward(x)
        return value(x.detach())

    @staticmethod
    def backward(ctx, dout):
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return None, None, torch.autograd.grad(ctx.op(leaf), leaf, dout)[0]


@over(differentiable(trials(dtypes=(torch.float64,), chosen=small)))
def test_gradcheck(trial):
    arguments = trial.arguments()
    for name in trial.differentiable:

        def op(x, name=name):
            return trial.call(**{**arguments, name: x})

        value = HELD[trial.op](arguments) if trial.op in HELD else op
        x = arguments[name].clone().requires_grad_()
        torch.testing.assert_close(value(x), op(x), rtol=1e-12, atol=1e-12)
        assert torch.autograd.gradcheck(lambda x, value=value, op=op: Held.apply(value, op, x), x)


@over(differentiable(trials(chosen=quick)))
def test_retain_graph_gives_the_same_gradient_again(trial):
    leaves, out, dout, _ = recorded(trial)
    once = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    torch.autograd.grad(out, leaves, 3 * dout, retain_graph=True)
    again = torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, dout)


@over(trials(chosen=quick))
def test_no_grad_and_inference_mode_give_the_same_and_record_nothing(trial):
    recorded_out = recorded(trial)[1]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = recorded(trial)[1] if mode is torch.no_grad else trial.first_output(trial.arguments())
        assert torch.equal(out, recorded_out.detach())
        assert not out.requires_grad and out.grad_fn is None


@over(differentiable(trials(chosen=first if INTERPRETED else telling)))
def test_loss_scaling_scales_the_gradient(trial):
    """By 2^16: to the bit where that is exact; in float16 as the reference does where the plain gradient would have underflown."""
    name = trial.differentiable[0]
    leaves, out, dout, arguments = recorded(trial)
    plain = torch.autograd.grad(out, leaves, dout, retain_graph=True)[0]
    if trial.dtype != torch.float16:
        scaled = torch.autograd.grad(out, leaves, dout * 2**16)[0]
        normal = plain.abs() > torch.finfo(plain.dtype).tiny * 2**10
        assert normal.any()
        assert torch.equal(scaled[normal], plain[normal] * 2**16)
        return
    # A float16 gradient of dout * 2^-20 is subnormal: scaling it after it was rounded would show.
    tiny = dout * 2.0**-20 / plain.abs().max().clamp_min(1).item()
    scaled = torch.autograd.grad(out, leaves, tiny * 2**16)[0]
    assert not scaled.isinf().any()
    truth, eager = (scaled_by_the_reference(trial, arguments, name, tiny, dtype) for dtype in (torch.float64, torch.float32))
    assert (truth.abs() < 2.0**-14 * 2**16).all()
    assert error_vs_eager(scaled, eager, truth)


def scaled_by_the_reference(trial, arguments, name, dout, dtype):
    cast = with_tensors(arguments, lambda x: x.detach().to(dtype))
    leaf = cast[name].requires_grad_()
    out = trial.but(backend="reference").call(**{**cast, name: leaf})
    return torch.autograd.grad(out, leaf, (dout * 2**16).to(dtype))[0]


def reread(trial):
    """The names of what the raw backward op is given."""
    raw = getattr(trial.module, "RAW_BACKWARD", {}).get(trial.backend)
    return [argument.name for argument in raw._schema.arguments] if raw else []


@over(differentiable(trials((torch.float32,), quick)))
def test_inputs_changed_before_the_backward_pass_are_refused_or_do_not_matter(trial):
    """Refused where the backward pass reads that input again; without effect where it has no use for it, or the gradient is made."""
    for name in trial.differentiable:
        leaves, out, dout, arguments = recorded(trial, changed=True)
        expected = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        with torch.no_grad():
            arguments[name].mul_(2)
        if name in reread(trial):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(out, leaves, dout)
        else:
            assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, leaves, dout), expected, strict=True))


@over(differentiable(trials((torch.float32,), quick)))
def test_the_gradient_of_an_expanded_or_broadcast_cotangent(trial):
    """out.sum() hands the backward pass a tensor of stride 0, a slice of out one that is not dense."""
    arguments = trial.arguments()
    for reduce, dense in (
        (lambda x: x.sum(), torch.ones_like),
        (lambda x: x.flatten()[::2].sum(), lambda x: (torch.arange(x.numel()) % 2 == 0).to(x).view(x.shape)),
    ):
        leaves, out, _, _ = recorded(trial)
        found = torch.autograd.grad(reduce(out), leaves)
        again = dict(zip(trial.differentiable, leaves, strict=True))
        expected = torch.autograd.grad(trial.call(**{**arguments, **again}), leaves, dense(out))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@over(differentiable(trials(dtypes=(torch.float32,), chosen=first)))
def test_a_second_derivative_is_refused(trial):
    leaves, out, dout, _ = recorded(trial)
    grad = torch.autograd.grad(out, leaves, dout.requires_grad_(), create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def untouched_by_autocast(op):
    """The quick cases, of ops that do not say in cases.py that they follow it as torch's own would; those have a test of their own."""
    return [] if getattr(part(op, "cases"), "FOLLOWS_AUTOCAST", False) else quick(op)


@over(trials((torch.float32,), untouched_by_autocast))
def test_autocast_changes_nothing(trial):
    plain = trial.outputs()
    with torch.autocast(trial.device, torch.bfloat16):
        inside = trial.outputs()
    assert all(torch.equal(inside[name], x) for name, x in plain.items())


@over(trials((torch.float32,), quick))
def test_gradients_flow_where_promised_and_nowhere_else(trial):
    refused = getattr(part(trial.op, "cases"), "REFUSES_GRADIENT", ())
    arguments = trial.arguments()
    arguments |= with_tensors({name: x for name, x in arguments.items() if name not in refused}, lambda x: x.requires_grad_())
    out = trial.first_output(arguments)
    assert out.requires_grad == bool(trial.differentiable)
    if trial.differentiable:
        out.sum().backward()
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            assert (x.grad is not None) == (name in trial.differentiable), name
