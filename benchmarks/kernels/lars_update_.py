"""What does lars_update_ have to beat, and what can nobody avoid?"""

import contextlib

import torch

from benchmarks.measure import Work, read_bytes


def official(
    params, grads, momenta, lr, momentum, weight_decay, trust_coefficient, eps, denominator, adapt,
    lr_in_momentum, nesterov, clip, skip, segments,
):  # fmt: skip
    """The loop over parameters of apex LARC and SGD ("sum"), and of MoCo v3 ("norm_of_sum"), which ask for no norm by the host."""
    for p, g, m, adapted in zip(params, grads, momenta, adapt, strict=True):
        d = g.add(p, alpha=weight_decay)
        w, other = torch.norm(p), torch.norm(g if denominator == "sum" else d)
        if adapted:
            below = other + weight_decay * w + eps if denominator == "sum" else other + eps
            ratio = trust_coefficient * w / below
            ratio = (ratio / lr).clamp_max(1.0) if clip else ratio
            d = torch.where(w > 0, torch.where(other > 0, d * ratio, g if denominator == "sum" else d), g if denominator == "sum" else d)
        d = lr * d if lr_in_momentum else d
        m.mul_(momentum).add_(d)
        step = d.add(m, alpha=momentum) if nesterov else m
        p.sub_(step, alpha=1 if lr_in_momentum else lr)


def third_party(arguments):
    """timm's Lars and lightly's LARS, with torch's loops as they ship; both adapt every tensor, by the sum of the norms."""
    plain = arguments["denominator"] == "sum" and all(arguments["adapt"]) and not arguments["lr_in_momentum"]
    if not plain or arguments["segments"] is not None or arguments["clip"] or not arguments["momentum"]:
        return {}
    found, options = {}, {name: arguments[name] for name in ("lr", "momentum", "weight_decay", "nesterov", "eps")}
    with contextlib.suppress(ModuleNotFoundError):
        from timm.optim.lars import Lars

        found["timm"] = stepped(lambda params: Lars(params, trust_coeff=arguments["trust_coefficient"], **options))
    with contextlib.suppress(ModuleNotFoundError):
        from lightly.utils.lars import LARS

        found["lightly"] = stepped(lambda params: LARS(params, trust_coefficient=arguments["trust_coefficient"], **options))
    return found


def stepped(optimizer_of):
    """The op's function by an optimizer, which is made once for the lists and works in their memory."""
    made = {}

    def step(params, grads, momenta, **options):
        key = tuple(x.data_ptr() for x in params)
        if key not in made:
            made.clear()
            weights = [torch.nn.Parameter(x) for x in params]
            optimizer = optimizer_of(weights)
            for p, g, m in zip(weights, grads, momenta, strict=True):
                p.grad, optimizer.state[p]["momentum_buffer"] = g, m
            made[key] = optimizer
        made[key].step()

    return step


def work(arguments):
    """All three lists read, weights and momenta written: 20 bytes a float32 parameter, where caches hold a layer until its step.

    Two passes through memory move 28. Three sums of squares, then decay, ratio, momentum and step.
    """
    params, grads, momenta = (arguments[name] for name in ("params", "grads", "momenta"))
    return Work(2 * read_bytes(params) + read_bytes(grads) + 2 * read_bytes(momenta), 0, 8 * sum(x.numel() for x in params))


def sweeps():
    return {}
