"""What does the soft-target cross-entropy mean?"""

import torch


def soft_xent(logits, target, temperature, weights, target_center, target_temperature):
    """loss_n = -w_n sum_k q_nk log softmax(logits_n/temperature)_k, q the target or softmax((target - center)/target_temperature)."""
    if target_temperature is not None:
        target = target_logits(target, target_center, target_temperature).softmax(-1)
    loss = -(target * (logits / temperature).log_softmax(-1)).sum(-1)
    return loss if weights is None else weights * loss


def forward(logits, target, temperature, weights, target_center, target_temperature):
    """The loss with what its gradient needs, so that the backward pass reduces nothing.

    statistics [N, 4]: maximum and log-sum of logits/temperature; then the same of the target's logits where target_temperature
    is given, else 0 and the sum of the target.
    """
    loss = soft_xent(logits, target, temperature, weights, target_center, target_temperature)
    if target_temperature is None:
        total = target.sum(-1, keepdim=True)
        of_target = torch.cat([torch.zeros_like(total), total], -1)
    else:
        of_target = max_and_log_sum(target_logits(target, target_center, target_temperature))
    return loss, torch.cat([max_and_log_sum(logits / temperature), of_target], -1)


def target_logits(target, target_center, target_temperature):
    return (target if target_center is None else target - target_center) / target_temperature


def max_and_log_sum(rows):
    """[..., K] -> [..., 2], m = max_k and log sum_k exp(x_k - m). Two numbers: their sum is rounded to the size of m."""
    top = rows.amax(-1, keepdim=True)
    return torch.cat([top, (rows - top).exp().sum(-1, keepdim=True).log()], -1)
