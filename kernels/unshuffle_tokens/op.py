"""How is unshuffle_tokens called, checked, dispatched and differentiated?"""

import torch
from torch.autograd.function import once_differentiable

from fuseer.kernels import checks, dispatch
from fuseer.kernels.unshuffle_tokens import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)


def _fake(x, ids_restore, mask_token, pos_embed):
    return x.new_empty((*ids_restore.shape, x.shape[2]))


def _fake_backward(dout, ids_restore, keep, mask_token_dtype, pos_embed_dtype):
    B, P, D = dout.shape
    positions = (0,) if pos_embed_dtype is None else (P, D)
    dpos_embed = dout.new_empty(positions, dtype=pos_embed_dtype or mask_token_dtype)
    return dout.new_empty((B, keep, D)), dout.new_empty((D,), dtype=mask_token_dtype), dpos_embed


def _reference(x, ids_restore, mask_token, pos_embed):
    checks.permutations("unshuffle_tokens", "ids_restore", ids_restore)
    return dispatch.widened(reference.unshuffle_tokens)(x, ids_restore, mask_token, pos_embed).to(x.dtype)


def _reference_backward(dout, ids_restore, keep, mask_token_dtype, pos_embed_dtype):
    """The gradients are linear in dout, so any x and tokens will do."""
    dx, dmask_token, dpos_embed = _fake_backward(dout, ids_restore, keep, mask_token_dtype, pos_embed_dtype)
    leaves = [dx.zero_(), dmask_token.zero_(), None if pos_embed_dtype is None else dpos_embed.zero_()]
    made = dispatch.gradients(lambda x, token, pos: reference.unshuffle_tokens(x, ids_restore, token, pos), dout, leaves)
    return *made[:2], dpos_embed if pos_embed_dtype is None else made[2]


RAW = dispatch.register(
    "unshuffle_tokens",
    "(Tensor x, Tensor ids_restore, Tensor mask_token, Tensor? pos_embed) -> Tensor",
    _fake,
    triton=_triton.forward,
    cpu=dispatch.COMPILED,
    reference=_reference,
)
RAW_BACKWARD = dispatch.register(
    "unshuffle_tokens_backward",
    "(Tensor dout, Tensor ids_restore, SymInt keep, ScalarType mask_token_dtype, ScalarType? pos_embed_dtype)"
    " -> (Tensor dx, Tensor dmask_token, Tensor dpos_embed)",
    _fake_backward,
    triton=_triton.backward,
    cpu=dispatch.COMPILED,
    reference=_reference_backward,
)


class _UnshuffleTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, ids_restore, mask_token, pos_embed):
        ctx.save_for_backward(ids_restore)
        # a fixed pos_embed has no dtype here: its gradient is not made
        ctx.dtypes = mask_token.dtype, pos_embed.dtype if ctx.needs_input_grad[4] else None
        ctx.backend, ctx.keep = backend, x.shape[1]
        return RAW[backend](x, ids_restore, mask_token, pos_embed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        (ids_restore,) = ctx.saved_tensors
        dx, dmask_token, dpos_embed = RAW_BACKWARD[ctx.backend](dout, ids_restore, ctx.keep, *ctx.dtypes)
        return None, dx, None, dmask_token, None if ctx.dtypes[1] is None else dpos_embed


def unshuffle_tokens(x, ids_restore, mask_token, pos_embed=None, *, backend=None):
    """out[b, i] = (x[b, r] if r < keep else mask_token) + pos_embed[i], r = ids_restore[b, i]: kept tokens back in their places.

    x [B, keep, D], ids_restore [B, P] int64 (each row a permutation of 0..P-1, as patch_mask makes it), mask_token [D], pos_embed [P, D]
    or None, any strides -> [B, P, D] in the dtype of x. mask_token and pos_embed may have another dtype, as parameters under autocast
    do; the sum is made in float32 for half x (in the dtype of x otherwise) and rounded once. keep may be 0 to P. No class token.
    Differentiable in x, mask_token and pos_embed, once: dx are rows of dout, dmask_token its sum over masked places, dpos_embed over
    images, float64 sums on the CPU and float32 ones in a fixed order on a GPU, without atomics; kept are the ids alone. A pos_embed
    that requires no gradient costs none. No rank talks to another.
    Raises ValueError for shapes and rows that are no permutation (on a GPU only with FUSEER_CHECK_INDICES=1, since looking waits for
    the device; without it no memory but the op's own is touched, and the gradient is undefined); TypeError for dtypes.
    Replaces repeat, cat, an index [B, P, D] of int64, gather and add. Source: He et al. 2022 (MAE), forward_decoder in models_mae.py.
    """
    op = "unshuffle_tokens"
    checks.tensor(op, "x", x, "[B, keep, D]")
    B, keep, D = x.shape
    checks.indices(op, "ids_restore", ids_restore, "[B, P]", (B, None), "x", x)
    P = ids_restore.shape[1]
    if keep > P:
        raise ValueError(f"{op}: x must hold at most P = {P} tokens an image, one for each of ids_restore; got {keep}")
    for name, value, layout, sizes in (("mask_token", mask_token, "[D]", (D,)), ("pos_embed", pos_embed, "[P, D]", (P, D))):
        if value is not None or name == "mask_token":
            checks.tensor(op, name, value, layout)
            checks.shape(op, name, value, layout, sizes)
            checks.same_device(op, "x", x, name, value)
    args = (x, ids_restore, mask_token, pos_embed)
    return _UnshuffleTokens.apply(dispatch.choose(op, IMPLS, backend, *args), *args)
