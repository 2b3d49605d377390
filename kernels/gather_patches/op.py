"""How is gather_patches called, checked, dispatched and differentiated?"""

import torch
from torch.autograd.function import once_differentiable

from fuseer.kernels import checks, dispatch
from fuseer.kernels.gather_patches import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)


def _fake(images, ids, patch):
    return images.new_empty((*ids.shape, patch * patch * images.shape[1]))


def _fake_backward(dout, images, ids, patch):
    return images.new_empty(images.shape)


def _reference(images, ids, patch):
    checks.patch_ids("gather_patches", "ids", ids, images, patch)
    return reference.gather_patches(images.detach(), ids, patch).contiguous()


def _reference_backward(dout, images, ids, patch):
    checks.patch_ids("gather_patches", "ids", ids, images, patch)
    return dispatch.differentiated(reference.gather_patches)(dout, images, ids, patch)


RAW = dispatch.register(
    "gather_patches",
    "(Tensor images, Tensor ids, SymInt patch) -> Tensor",
    _fake,
    triton=_triton.forward,
    cpu=dispatch.COMPILED,
    reference=_reference,
)
RAW_BACKWARD = dispatch.register(
    "gather_patches_backward",
    "(Tensor dout, Tensor images, Tensor ids, SymInt patch) -> Tensor",
    _fake_backward,
    triton=_triton.backward,
    cpu=dispatch.COMPILED,
    reference=_reference_backward,
)


class _GatherPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, images, ids, patch):
        ctx.save_for_backward(images, ids)
        ctx.backend, ctx.patch = backend, patch
        return RAW[backend](images, ids, patch)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return None, RAW_BACKWARD[ctx.backend](dout, *ctx.saved_tensors, ctx.patch), None, None


def gather_patches(images, ids, *, patch, backend=None):
    """out[b, m] = the pixels of patch ids[b, m] of image b, in the order row, column, channel.

    images [B, C, H, W], any strides, channels_last among them, sides that patch divides; the P = H W/patch^2 patches are numbered row by
    row. ids int64 [B, M], any order, repeated or none at all -> [B, M, patch * patch * C] in the dtype of images.
    Differentiable in images, once: the gradient of a pixel is the sum over all that took its patch, in one order. No copy of the whole
    images in patches and no index of the output's size are made. No rank talks to another.
    Raises ValueError for shapes, and for ids outside 0..P-1 (the C++ always, the others with FUSEER_CHECK_INDICES=1; without it Triton
    makes such rows NaN); TypeError for dtypes.
    Source: patchify and random_masking of facebookresearch/mae, models_mae.py (He et al. 2021, arXiv 2111.06377).
    """
    checks.tensor("gather_patches", "images", images, "[B, C, H, W]")
    checks.at_least("gather_patches", "patch", patch, 1)
    checks.patches("gather_patches", images, patch)
    checks.indices("gather_patches", "ids", ids, "[B, M]", (len(images), None), "images", images)
    arguments = (images, ids, patch)
    return _GatherPatches.apply(dispatch.choose("gather_patches", IMPLS, backend, *arguments), *arguments)
