"""What do Sinkhorn codes mean?"""

import torch

from fuseer.kernels.dispatch import all_reduce


def sinkhorn(scores, epsilon, iterations, group_name):
    """codes = softmax(scores/epsilon + v), v the column potentials after `iterations` steps; [..., N, K] to [..., N, K]."""
    potentials, _ = column_potentials(scores, epsilon, iterations, group_name)
    return (scores / epsilon + potentials).softmax(-1)


def column_potentials(scores, epsilon, iterations, group_name, passengers=()):
    """The dual potentials v [..., 1, K] of the column marginals, and the numbers `passengers` summed over the group.

    v <- v - log sum_i softmax(scores_i/epsilon + v), the row potential eliminated by the softmax: constants, N and K cancel, and
    every term summed is a probability. Each column sum stays >= 1/(N K): the step before left that column with an entry
    >= 1/N in units in which no entry of its row exceeds 1. So no logarithm meets a zero, whatever the finite scores; a column
    without one, or a problem without rows, keeps the potential 0.
    The first step has v = 0 and is shifted by the column's maximum instead. Collectives: one MAX, then `iterations` SUMs of
    [..., K]; `passengers` ride in the first SUM.
    """
    logits = scores / epsilon
    top = logits.amax(-2, keepdim=True) if logits.shape[-2] else logits.new_full((*logits.shape[:-2], 1, logits.shape[-1]), -torch.inf)
    top = all_reduce(top, "max", group_name)
    top = top.masked_fill(top == -torch.inf, 0)
    sums = (logits - top).exp().sum(-2, keepdim=True)
    flat = all_reduce(torch.cat([sums.flatten(), sums.new_tensor(passengers)]), "sum", group_name)
    sums, arrived = flat[: sums.numel()].view(sums.shape), flat[sums.numel() :]
    potentials = -(top + _log(sums))
    for _ in range(iterations - 1):
        sums = all_reduce((logits + potentials).softmax(-1).sum(-2, keepdim=True), "sum", group_name)
        potentials = potentials - _log(sums)
    return potentials, arrived


def _log(sums):
    return sums.masked_fill(sums == 0, 1).log()
