"""What does soft_xent, forward and backward, have to beat, and what can nobody avoid?"""

import torch

from benchmarks.measure import Work


def official(logits, target, temperature, weights, target_center, target_temperature):
    """The cross-entropy lines of SwAV, of DINO (centred and sharpened target) and of iBOT (weights), in float32 as DINO computes them."""
    logits, target = logits.float(), target.float()
    if target_temperature is not None:
        target = torch.softmax((target if target_center is None else target - target_center.float()) / target_temperature, dim=-1)
    loss = torch.sum(-target * torch.log_softmax(logits / temperature, dim=-1), dim=-1)
    return loss if weights is None else loss * weights


def third_party(arguments):
    """lightly's iBOT patch loss is this op with a mean over rows and a centre that it then moves; its DINO loss pairs views instead."""
    from lightly.loss import IBOTPatchLoss

    if arguments["target_temperature"] is None or arguments["weights"] is not None:
        return {}
    N, K = arguments["logits"].shape
    device = arguments["logits"].device
    module = IBOTPatchLoss(K, arguments["target_temperature"], arguments["temperature"]).to(device)
    mask = torch.ones(1, 1, N, dtype=torch.bool, device=device)

    def loss(logits, target, temperature, weights, target_center, target_temperature):
        if target_center is not None:
            module.center.center = target_center.float()[None]
        return module(target.float(), logits.float(), mask)

    return {"lightly": loss}


def work(arguments):
    """Two passes that keep nothing as large as the logits between them: each reads logits and target, the second writes the gradient.

    An exponential per logit and pass, and per target and pass where the target is a softmax; exponents, dot product, gradient.
    """
    logits, target = arguments["logits"], arguments["target"]
    size = logits.numel()
    sharpened = arguments["target_temperature"] is not None
    read = 2 * size * (logits.element_size() + target.element_size())
    return Work(read + size * logits.element_size(), 2 * size * (1 + sharpened), size * (6 + 2 * sharpened))


def sweeps():
    return {}
