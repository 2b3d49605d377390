"""How is gather_tokens called, checked, dispatched and differentiated?"""

import torch
from torch.autograd.function import once_differentiable

from fuseer.kernels import checks, dispatch
from fuseer.kernels.gather_tokens import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)


def _fake(x, ids):
    return x.new_empty((*ids.shape, x.shape[2]))


def _fake_backward(dout, ids, patches):
    return dout.new_empty((ids.shape[0], patches, dout.shape[2]))


def _reference(x, ids):
    checks.ids("gather_tokens", "ids", ids, x.shape[1])
    return reference.gather_tokens(x, ids)


def _reference_backward(dout, ids, patches):
    x = dout.new_empty((1, 1, 1)).expand(len(ids), patches, dout.shape[2])
    return dispatch.differentiated(reference.gather_tokens)(dout, x, ids)


RAW = dispatch.register(
    "gather_tokens",
    "(Tensor x, Tensor ids) -> Tensor",
    _fake,
    triton=_triton.forward,
    cpu=dispatch.COMPILED,
    reference=_reference,
)
RAW_BACKWARD = dispatch.register(
    "gather_tokens_backward",
    "(Tensor dout, Tensor ids, SymInt patches) -> Tensor",
    _fake_backward,
    triton=_triton.backward,
    cpu=dispatch.COMPILED,
    reference=_reference_backward,
)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, ids):
        ctx.save_for_backward(ids)
        ctx.backend, ctx.patches = backend, x.shape[1]
        return RAW[backend](x, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (ids,) = ctx.saved_tensors
        return None, RAW_BACKWARD[ctx.backend](dout, ids, ctx.patches), None


def gather_tokens(x, ids, *, backend=None):
    """out[b, m] = x[b, ids[b, m]], rows of D numbers copied whole.

    x [B, P, D], ids [B, M] int64, any strides -> [B, M, D] in the dtype of x. Ids may repeat: the gradient of a token is the sum over
    the rows it went to, in their order, in float32 for halves (float64 for float64), rounded once; no atomics. Differentiable in x,
    once; kept for that are the ids alone. No rank talks to another.
    Raises ValueError for shapes and for ids outside 0..P-1 (on a GPU only with FUSEER_CHECK_INDICES=1, since looking waits for the
    device; without it such a row is NaN, and nothing outside x is read); TypeError for dtypes.
    Replaces torch.gather(x, 1, ids.unsqueeze(-1).repeat(1, 1, D)), whose index alone is 8 bytes a number, as in MAE's random_masking.
    """
    checks.tensor("gather_tokens", "x", x, "[B, P, D]")
    checks.indices("gather_tokens", "ids", ids, "[B, M]", (x.shape[0], None), "x", x)
    return _GatherTokens.apply(dispatch.choose("gather_tokens", IMPLS, backend, x, ids), x, ids)
