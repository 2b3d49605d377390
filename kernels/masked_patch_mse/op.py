"""How is masked_patch_mse called, checked, dispatched and differentiated?"""

import torch
from torch.autograd.function import once_differentiable

from fuseer.kernels import checks, dispatch
from fuseer.kernels.masked_patch_mse import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)
OPTIONS = "SymInt patch, bool normalize, str reduction"


def _fake(pred, images, ids_masked, patch, normalize, reduction):
    dtype = dispatch.compute_dtype(pred.dtype)
    loss = pred.new_empty(() if reduction == "mean" else ids_masked.shape, dtype=dtype)
    return loss, pred.new_empty((*ids_masked.shape, 2), dtype=dtype)


def _fake_backward(dloss, pred, images, ids_masked, statistics, patch, normalize, reduction):
    return pred.new_empty(pred.shape)


def _reference_backward(dloss, pred, images, ids_masked, statistics, *options):
    return dispatch.differentiated(reference.masked_patch_mse)(dloss, pred, images, ids_masked, *options)


RAW = dispatch.register(
    "masked_patch_mse",
    f"(Tensor pred, Tensor images, Tensor ids_masked, {OPTIONS}) -> (Tensor loss, Tensor statistics)",
    _fake,
    triton=_triton.forward,
    cpu=dispatch.COMPILED,
    reference=dispatch.widened(reference.forward),
)
RAW_BACKWARD = dispatch.register(
    "masked_patch_mse_backward",
    f"(Tensor dloss, Tensor pred, Tensor images, Tensor ids_masked, Tensor statistics, {OPTIONS}) -> Tensor",
    _fake_backward,
    triton=_triton.backward,
    cpu=dispatch.COMPILED,
    reference=_reference_backward,
)


class _MaskedPatchMse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, pred, images, ids_masked, *options):
        loss, statistics = RAW[backend](pred, images, ids_masked, *options)
        ctx.save_for_backward(pred, images, ids_masked, statistics)
        ctx.backend, ctx.options = backend, options
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        return None, RAW_BACKWARD[ctx.backend](dloss, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


def masked_patch_mse(pred, images, ids_masked, *, patch, normalize=True, reduction="mean", backend=None):
    """loss_bm = mean over the n = patch * patch * C pixels of patch ids_masked[b, m] of (pred - target)^2; their mean with "mean".

    images [B, C, H, W], sides that patch divides; P = H W/patch^2 patches, numbered row by row, the pixels of each in the order row,
    column, channel. The target is the pixels, or with `normalize` (pixel - mean)/sqrt(variance + 1e-6) of their own patch, unbiased
    variance. ids_masked [B, M] int64, M >= 1. pred is [B, P, n], whose rows ids_masked picks (so also where M = P), or else [B, M, n]
    in the order of ids_masked. Any strides; channels_last images, and pred cut from a longer sequence, are read where they lie.
    A scalar, or with reduction="none" [B, M]: float32, or float64 where pred is; images are cast to that. No target is kept: two numbers a
    patch are. Differentiable in pred alone, once; unmasked rows have gradient 0, repeated ones the sum. No rank talks to another.
    Raises ValueError for shapes, no masked patch, one number to normalise, an index outside 0..P-1 (on a GPU only with
    FUSEER_CHECK_INDICES=1, since looking waits for the device); TypeError for dtypes, uint8 images among them.
    Source: He et al. 2021 (MAE), arXiv 2111.06377; facebookresearch/mae models_mae.py forward_loss.
    """
    checks.tensor("masked_patch_mse", "pred", pred, "[B, P or M, patch * patch * C]")
    checks.tensor("masked_patch_mse", "images", images, "[B, C, H, W]")
    checks.at_least("masked_patch_mse", "patch", patch, 1)
    checks.patches("masked_patch_mse", images, patch)
    checks.indices("masked_patch_mse", "ids_masked", ids_masked, "[B, M]", (len(images), None), "images", images)
    checks.same_device("masked_patch_mse", "pred", pred, "images", images)
    _check_sizes(pred, images, ids_masked, patch)
    if reduction not in ("mean", "none"):
        raise ValueError(f'masked_patch_mse: reduction must be "mean" or "none"; got {reduction!r}')
    if ids_masked.shape[1] < 1 or (reduction == "mean" and not len(ids_masked)):
        raise ValueError(f"masked_patch_mse: no masked patch has no mean; got ids_masked {list(ids_masked.shape)}; mask at least one")
    if normalize and pred.shape[2] < 2:
        raise ValueError("masked_patch_mse: normalize needs patches of at least 2 numbers; got patch 1 of 1 channel; give normalize=False")
    arguments = (pred, images, ids_masked, patch, bool(normalize), reduction)
    return _MaskedPatchMse.apply(dispatch.choose("masked_patch_mse", IMPLS, backend, *arguments), *arguments)


def _check_sizes(pred, images, ids_masked, patch):
    """Refuse predictions that are neither those of all patches nor those of the masked ones."""
    B, C, *_ = images.shape
    P, M, n = reference.patches(images, patch), ids_masked.shape[1], patch * patch * C
    if tuple(pred.shape) not in ((B, P, n), (B, M, n)):
        wanted = f"[B, P, n] = {[B, P, n]} or [B, M, n] = {[B, M, n]}, n = patch * patch * C"
        raise ValueError(f"masked_patch_mse: pred must be {wanted}; got {list(pred.shape)}")
