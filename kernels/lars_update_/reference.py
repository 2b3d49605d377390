"""What does a LARS step mean?"""

import torch

from fuseer.kernels import dispatch


def lars_update_(
    params, grads, momenta, lr, momentum, weight_decay, trust_coefficient, eps, denominator, adapt, lr_in_momentum, nesterov, clip,
    segments, group_name,
):  # fmt: skip
    """(params, momenta) after one step, as new tensors. adapt: one bool for each layer; segments: see `pieces`."""
    sums = squares(params, grads, weight_decay, len(adapt), segments, group_name)
    ratios, decays = ratios_and_decays(sums, adapt, lr, weight_decay, trust_coefficient, eps, denominator, clip)
    new_params, new_momenta = [x.clone() for x in params], [x.clone() for x in momenta]
    layers, *whole = layers_and_pieces(segments, new_params, grads, new_momenta)
    for layer, p, g, m in zip(layers, *whole, strict=True):
        d = (g + decays[layer].to(p.dtype) * p) * ratios[layer].to(p.dtype)
        d = lr * d if lr_in_momentum else d
        m.copy_(momentum * m + d)
        step = d + momentum * m if nesterov else m
        p.copy_(p - step if lr_in_momentum else p - lr * step)
    return new_params, new_momenta


def squares(params, grads, weight_decay, layers, segments, group_name):
    """[layers, 3]: of each layer, over its pieces on all ranks, the sums of w^2, g^2 and (g + weight_decay w)^2, in float64."""
    sums = torch.zeros((layers, 3), dtype=torch.float64, device=params[0].device)
    for layer, w, g in zip(*layers_and_pieces(segments, params, grads), strict=True):
        w, g = w.double(), g.double()
        sums[layer] += torch.stack([w.square().sum(), g.square().sum(), (g + weight_decay * w).square().sum()])
    return dispatch.all_reduce(sums, "sum", group_name)


def ratios_and_decays(sums, adapt, lr, weight_decay, trust_coefficient, eps, denominator, clip):
    """Each layer's factor of g + decay w and that decay, [layers] each, in float64."""
    w, g, both = sums.sqrt().unbind(1)
    below, other = (g + weight_decay * w, g) if denominator == "sum" else (both, both)
    wanted = torch.tensor(adapt, dtype=torch.bool, device=sums.device)
    adapted = wanted & (w > 0) & (other > 0)
    ratios = trust_coefficient * w / (below + eps)
    if clip:
        ratios = (ratios / lr).clamp_max(1.0)
    # where there is no ratio, LARC leaves the gradient as it is; the others decay all the same
    undecayed = wanted & ~adapted if denominator == "sum" else torch.zeros_like(wanted)
    return torch.where(adapted, ratios, 1.0), torch.full_like(ratios, weight_decay).masked_fill(undecayed, 0.0)


def layers_and_pieces(segments, *lists):
    """The layers of all pieces, then each list's pieces: whole tensors, or those of `segments`, rows (tensor, start, numel, layer)."""
    if segments is None:
        return range(len(lists[0])), *lists
    table = segments.tolist()
    pieces = [[x[tensor].narrow(0, start, numel) for tensor, start, numel, _ in table] for x in lists]
    return [layer for *_, layer in table], *pieces
