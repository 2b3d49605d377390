"""How is swapped_prediction called, checked, dispatched and differentiated?"""

import torch
from torch.autograd.function import once_differentiable

from fuseer.kernels import checks, dispatch
from fuseer.kernels.swapped_prediction import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)


def _sizes(scores):
    return scores[0].shape if len(scores) == 1 else (len(scores), *scores[0].shape)


def _fake(scores, queue_scores, assign, epsilon, iterations, temperature, group_name):
    V, B, K = _sizes(scores)
    loss = torch.empty((), dtype=dispatch.compute_dtype(scores[0].dtype), device=scores[0].device)
    return loss, loss.new_empty((len(assign), K)), loss.new_empty((V + len(assign), B, 2)), loss.new_empty(())


def _fake_cpu(scores, *options):
    """The CPU keeps its potentials in float64: at scores of 100 one float32 would round them by 1e-4."""
    loss, potentials, *kept = _fake(scores, *options)
    return loss, potentials.double(), *kept


def _fake_backward(dloss, scores, potentials, statistics, scale, assign, epsilon, temperature):
    return scores[0].new_empty(_sizes(scores))


def _whole(given):
    return given[0] if len(given) == 1 and given[0].dim() == 3 else given


def _reference(scores, queue_scores, *options):
    return dispatch.widened(reference.forward)(_whole(scores), _whole(queue_scores), *options)


def _reference_backward(dloss, scores, potentials, statistics, scale, assign, epsilon, temperature):
    backward = dispatch.differentiated(reference.swapped_cross_entropy)
    return backward(dloss, _whole(scores), potentials, scale, assign, epsilon, temperature)


# scores and queue_scores are lists of one tensor [V, B, K] or [A, Q, K], or of V or A matrices that may lie anywhere; dscores is [V, B, K]
RAW = dispatch.register(
    "swapped_prediction",
    "(Tensor[] scores, Tensor[] queue_scores, int[] assign, float epsilon, int iterations, float temperature, str group_name)"
    " -> (Tensor loss, Tensor potentials, Tensor statistics, Tensor scale)",
    {None: _fake, "cpu": _fake_cpu},
    triton=_triton.forward,
    cpu=dispatch.COMPILED,
    reference=_reference,
)
RAW_BACKWARD = dispatch.register(
    "swapped_prediction_backward",
    "(Tensor dloss, Tensor[] scores, Tensor potentials, Tensor statistics, Tensor scale, int[] assign, float epsilon, float temperature)"
    " -> Tensor",
    _fake_backward,
    triton=_triton.backward,
    cpu=dispatch.COMPILED,
    reference=_reference_backward,
)


class _SwappedPrediction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, queue_scores, assign, epsilon, iterations, temperature, group_name, *scores):
        loss, *kept = RAW[backend](scores, queue_scores, assign, epsilon, iterations, temperature, group_name)
        ctx.save_for_backward(*scores, *kept)
        ctx.backend, ctx.given, ctx.options = backend, len(scores), (assign, epsilon, temperature)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        scores, kept = ctx.saved_tensors[: ctx.given], ctx.saved_tensors[ctx.given :]
        dscores = RAW_BACKWARD[ctx.backend](dloss, scores, *kept, *ctx.options)
        return *[None] * 7, *((dscores,) if ctx.given == 1 else dscores.unbind())


def swapped_prediction(
    scores, *, assign=(0, 1), epsilon=0.05, iterations=3, temperature=0.1, queue_scores=None, group=None, backend=None
):
    """loss = mean over i in assign of 1/(V-1) sum_{v != i} mean_b CE(codes_i[b], softmax(scores_v[b]/temperature)): SwAV's loss.

    scores: [V, B, K] (crop-major), or a list of V crops [B, K] that may lie anywhere and are never stacked; any strides; V >= 2.
    codes_i = sinkhorn of crop i over its B rows and, where given, the rows of queue_scores, [A, Q, K] or a list of A tensors [Q, K]
    (A = len(assign): stored embeddings times the current prototypes, same dtype, in the order of assign), whose own codes are
    dropped. -> scalar, float32 for half inputs, else the dtype of scores.
    Differentiable in scores, in every crop of a list, once; codes are detached, queue_scores gets no gradient.
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
    given, (V, B, K) = _checked_scores("scores", scores, "[V, B, K]")
    if V < 2:
        raise ValueError(f"{op}: scores [V, B, K] needs V >= 2 crops, one to assign and one to predict; got {[V, B, K]}")
    checks.prototypes(op, "scores", given[0])
    assign = _checked_assign(assign, V)
    queue = []
    if queue_scores is not None:
        queue, sizes = _checked_scores("queue_scores", queue_scores, "[A, Q, K]")
        if (sizes[0], sizes[2]) != (len(assign), K):
            raise ValueError(f"{op}: queue_scores must be [len(assign), Q, K] = {[len(assign), sizes[1], K]}; got {list(sizes)}")
        checks.same_dtype(op, "scores", given[0], "queue_scores", queue[0])
        checks.same_device(op, "scores", given[0], "queue_scores", queue[0])
        queue = [x.detach() for x in queue]
    checks.positive(op, "epsilon", epsilon)
    checks.positive(op, "temperature", temperature)
    checks.at_least(op, "iterations", iterations, 1)
    args = (queue, assign, float(epsilon), iterations, float(temperature), dispatch.group_name(op, group))
    return _SwappedPrediction.apply(dispatch.choose(op, IMPLS, backend, given, *args), *args, *given)


def _checked_scores(name, value, layout):
    """(the tensor [V, B, K], or the V tensors [B, K], as a list; (V, B, K))."""
    op = "swapped_prediction"
    if isinstance(value, torch.Tensor):
        checks.tensor(op, name, value, layout)
        return [value], value.shape
    each = f"[{layout.partition(', ')[2]}"
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{op}: {name} must be a tensor {layout}, or a list of tensors {each}; got {type(value).__name__}")
    if not value:
        raise ValueError(f"{op}: {name} must hold at least one tensor {each}; got none")
    for number, x in enumerate(value):
        one = f"{name}[{number}]"
        checks.tensor(op, one, x, each)
        checks.shape(op, one, x, f"{each} of {name}[0]", value[0].shape)
        checks.same_dtype(op, f"{name}[0]", value[0], one, x)
        checks.same_device(op, f"{name}[0]", value[0], one, x)
    return list(value), (len(value), *value[0].shape)


def _checked_assign(assign, crops):
    if not isinstance(assign, (tuple, list)) or any(isinstance(i, bool) or not isinstance(i, int) for i in assign):
        raise TypeError(f"swapped_prediction: assign must be a tuple of crop numbers; got {assign!r}")
    if not assign or len(set(assign)) != len(assign) or min(assign) < 0 or max(assign) >= crops:
        raise ValueError(f"swapped_prediction: assign must hold distinct crops out of 0..{crops - 1}, at least one; got {tuple(assign)}")
    return list(assign)
