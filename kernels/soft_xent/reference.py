"""What does the soft-target cross-entropy mean?"""


def soft_xent(logits, target, temperature, weights, target_center, target_temperature):
    """loss_n = -w_n sum_k q_nk log softmax(logits_n/temperature)_k, q the target or softmax((target - center)/target_temperature)."""
    if target_center is not None:
        target = target - target_center
    if target_temperature is not None:
        target = (target / target_temperature).softmax(-1)
    loss = -(target * (logits / temperature).log_softmax(-1)).sum(-1)
    return loss if weights is None else weights * loss
