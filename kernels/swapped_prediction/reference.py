"""What does SwAV's swapped prediction mean?"""

import torch

from fuseer.kernels.sinkhorn.reference import column_potentials
from fuseer.kernels.soft_xent.reference import max_and_log_sum


def swapped_prediction(scores, queue_scores, assign, epsilon, iterations, temperature, group_name):
    """loss = scale * sum_b mean_{i in assign} 1/(V-1) sum_{v != i} CE(codes_i[b], scores_v[b]/temperature).

    Here and below scores are [V, B, K] or V crops [B, K]; queue_scores [A, Q, K], or A times [Q, K], or none.
    """
    potentials, scale = potentials_and_scale(scores, queue_scores, assign, epsilon, iterations, group_name)
    return swapped_cross_entropy(scores, potentials, scale, assign, epsilon, temperature)


def forward(scores, queue_scores, assign, epsilon, iterations, temperature, group_name):
    """The loss with what its gradient needs, so that the backward pass neither iterates, nor reduces, nor communicates.

    potentials [A, K]; statistics [V + A, B, 2]: maximum and log-sum of every row of scores/temperature, then of every assign
    crop's row of scores/epsilon + potentials; scale [].
    """
    potentials, scale = potentials_and_scale(scores, queue_scores, assign, epsilon, iterations, group_name)
    loss = swapped_cross_entropy(scores, potentials, scale, assign, epsilon, temperature)
    rows = [x / temperature for x in scores] + [scores[i] / epsilon + v for i, v in zip(assign, potentials, strict=True)]
    return loss, potentials, max_and_log_sum(torch.stack(rows)), scale


@torch.no_grad()
def potentials_and_scale(scores, queue_scores, assign, epsilon, iterations, group_name):
    """Sinkhorn's column potentials [A, K] over queue and own rows of the assign crops; scale = W / max(1, sum over ranks of B)."""
    rows = [scores[i] for i in assign]
    if queue_scores is not None and len(queue_scores):
        rows = [torch.cat([stored, own]) for stored, own in zip(queue_scores, rows, strict=True)]
    potentials, (count, ranks) = column_potentials(torch.stack(rows), epsilon, iterations, group_name, (scores[0].shape[0], 1))
    return potentials.squeeze(1), ranks / count.clamp(min=1)


def swapped_cross_entropy(scores, potentials, scale, assign, epsilon, temperature):
    """Each crop v is charged once, against the sum of the codes of the assign crops other than v."""
    codes = [(scores[i].detach() / epsilon + v).softmax(-1) for i, v in zip(assign, potentials, strict=True)]
    loss = potentials.new_zeros(())
    for v, crop in enumerate(scores):
        targets = [code for code, i in zip(codes, assign, strict=True) if i != v]
        if targets:
            loss = loss - (sum(targets) * (crop / temperature).log_softmax(-1)).sum()
    return scale * loss / (len(assign) * (len(scores) - 1))
