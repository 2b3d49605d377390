"""What does swapped_prediction, forward and backward, have to beat, and what can nobody avoid?"""

import torch

from benchmarks.kernels import sinkhorn
from benchmarks.measure import Work
from fuseer.kernels.swapped_prediction import cases
from fuseer.kernels.testing import Case


def official(scores, queue_scores, assign, epsilon, iterations, temperature):
    """SwAV's loop over assign crops and the other crops."""
    loss = 0
    for a, i in enumerate(assign):
        with torch.no_grad():
            rows = scores[i].detach() if queue_scores is None else torch.cat((queue_scores[a], scores[i].detach()))
            codes = sinkhorn.official(rows, epsilon, iterations)[-len(scores[i]) :]
        subloss = 0
        for v in range(len(scores)):
            if v != i:
                subloss -= torch.mean(torch.sum(codes * torch.log_softmax(scores[v] / temperature, dim=1), dim=1))
        loss += subloss / (len(scores) - 1)
    return loss / len(assign)


def third_party(arguments):
    from lightly.loss.swav_loss import SwaVLoss

    # lightly assigns the first crops it is given, in order
    if tuple(arguments["assign"]) != tuple(range(len(arguments["assign"]))):
        return {}
    module = SwaVLoss(arguments["temperature"], arguments["iterations"], arguments["epsilon"])

    def loss(scores, queue_scores, assign, epsilon, iterations, temperature):
        crops, assigned = list(scores), len(assign)
        return module(crops[:assigned], crops[assigned:], None if queue_scores is None else list(queue_scores))

    return {"lightly": loss}


def work(arguments):
    """Two passes that keep nothing as large as the scores between them, since the loss is handed out before its gradient is asked for.

    Each reads the scores once, the second writes the gradient; queue rows are read once. An exponential per score and pass, and one per
    assigned row and pass for its code; multiply-adds of Sinkhorn on the assigned rows, of exponents, dot products and gradients.
    """
    scores, assigned = arguments["scores"], len(arguments["assign"])
    V, B, K = scores.shape
    Q = 0 if arguments["queue_scores"] is None else arguments["queue_scores"].shape[1]
    own, codes, queue = V * B * K, assigned * B * K, assigned * Q * K
    pairs = assigned * (V - 1) * B * K
    return Work(
        (3 * own + queue) * scores.element_size(),
        2 * (own + codes) + queue,
        (codes + queue) * 2 * arguments["iterations"] + 4 * own + 2 * pairs,
    )


def sweeps():
    return {
        "K": {k: Case(f"8x64x{k}", cases._case(8, 64, k)) for k in (256, 1024, 3000, 16384)},
        "B": {b: Case(f"8x{b}x3000", cases._case(8, b, 3000)) for b in (16, 64, 256, 1024)},
    }
