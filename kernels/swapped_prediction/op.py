"""How is swapped_prediction called, checked, dispatched and differentiated?"""

import torch
from torch.autograd.function import once_differentiable

from fuseer.kernels import checks, dispatch
from fuseer.kernels.swapped_prediction import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)


def _fake(scores, queue_scores, assign, epsilon, iterations, temperature, group_name):
    V, B, K = scores.shape
    loss = torch.empty((), dtype=dispatch.compute_dtype(scores.dtype), device=scores.device)
    return loss, loss.new_empty((len(assign), K)), loss.new_empty((V + len(assign), B, 2)), loss.new_empty(())


def _fake_backward(dloss, scores, potentials, statistics, scale, assign, epsilon, temperature):
    return scores.new_empty(scores.shape)


def _reference_backward(dloss, scores, potentials, statistics, scale, assign, epsilon, temperature):
    return dispatch.differentiated(reference.swapped_cross_entropy)(dloss, scores, potentials, scale, assign, epsilon, temperature)


RAW = dispatch.register(
    "swapped_prediction",
    "(Tensor scores, Tensor? queue_scores, int[] assign, float epsilon, int iterations, float temperature, str group_name)"
    " -> (Tensor loss, Tensor potentials, Tensor statistics, Tensor scale)",
    _fake,
    triton=_triton.forward,
    cpu=dispatch.COMPILED,
    reference=dispatch.widened(reference.forward),
)
RAW_BACKWARD = dispatch.register(
    "swapped_prediction_backward",
    "(Tensor dloss, Tensor scores, Tensor potentials, Tensor statistics, Tensor scale, int[] assign, float epsilon, float temperature)"
    " -> Tensor",
    _fake_backward,
    triton=_triton.backward,
    cpu=dispatch.COMPILED,
    reference=_reference_backward,
)


class _SwappedPrediction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, scores, queue_scores, assign, epsilon, iterations, temperature, group_name):
        loss, *kept = RAW[backend](scores, queue_scores, assign, epsilon, iterations, temperature, group_name)
        ctx.save_for_backward(scores, *kept)
        ctx.backend, ctx.options = backend, (assign, epsilon, temperature)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return None, RAW_BACKWARD[ctx.backend](dloss, *ctx.saved_tensors, *ctx.options), None, None, None, None, None, None


def swapped_prediction(
    scores, *, assign=(0, 1), epsilon=0.05, iterations=3, temperature=0.1, queue_scores=None, group=None, backend=None
):
    """loss = mean over i in assign of 1/(V-1) sum_{v != i} mean_b CE(codes_i[b], softmax(scores_v[b]/temperature)): SwAV's loss.

    scores [V, B, K] (crop-major; any strides; V >= 2), codes_i = sinkhorn of crop i over its B rows and, where given, the rows of
    queue_scores [A, Q, K] (A = len(assign): stored embeddings times the current prototypes, same dtype, in the order of
    assign), whose own codes are dropped. -> scalar, float32 for half inputs, else the dtype of scores.
    Differentiable in scores, once; codes are detached, queue_scores gets no gradient.
    group=None means this process alone, also when torch.distributed is initialised. With a group of W ranks the codes are those
    of all their rows, and rank r returns L_r = W * (sum over its own rows) / (rows of all ranks): averaging gradients over
    ranks, as DDP and ZeRO do, gives the gradient of the global mean. B and Q may differ per rank; a rank with B = 0 returns 0
    and still joins every collective: one MAX and `iterations` SUM all-reduces, none in the backward pass.
    Replaces SwAV's loop over assign crops and crops, 2 Sinkhorn calls and V(V-1) log-softmaxes.
    Raises ValueError for shapes, V < 2, K < 1, an assign with repeated or absent crops, epsilon or temperature <= 0, iterations
    < 1; TypeError for dtypes; RuntimeError where the backend asked for cannot run.
    Source: Caron et al. 2020, main_swav.py train().
    """
    op = "swapped_prediction"
    checks.tensor(op, "scores", scores, "[V, B, K]")
    checks.prototypes(op, "scores", scores)
    if scores.shape[0] < 2:
        raise ValueError(f"{op}: scores [V, B, K] needs V >= 2 crops, one to assign and one to predict; got {list(scores.shape)}")
    assign = _checked_assign(assign, scores.shape[0])
    if queue_scores is not None:
        checks.tensor(op, "queue_scores", queue_scores, "[A, Q, K]")
        wanted = (len(assign), queue_scores.shape[1], scores.shape[2])
        checks.shape(op, "queue_scores", queue_scores, "[len(assign), Q, K]", wanted)
        checks.same_dtype(op, "scores", scores, "queue_scores", queue_scores)
        checks.same_device(op, "scores", scores, "queue_scores", queue_scores)
        queue_scores = queue_scores.detach()
    checks.positive(op, "epsilon", epsilon)
    checks.positive(op, "temperature", temperature)
    checks.at_least(op, "iterations", iterations, 1)
    args = (scores, queue_scores, assign, float(epsilon), iterations, float(temperature), dispatch.group_name(op, group))
    return _SwappedPrediction.apply(dispatch.choose(op, IMPLS, backend, *args), *args)


def _checked_assign(assign, crops):
    if not isinstance(assign, (tuple, list)) or any(isinstance(i, bool) or not isinstance(i, int) for i in assign):
        raise TypeError(f"swapped_prediction: assign must be a tuple of crop numbers; got {assign!r}")
    if not assign or len(set(assign)) != len(assign) or min(assign) < 0 or max(assign) >= crops:
        raise ValueError(f"swapped_prediction: assign must hold distinct crops out of 0..{crops - 1}, at least one; got {tuple(assign)}")
    return list(assign)
