"""How is patch_embed_visible called, checked, dispatched and differentiated?"""

import torch
from torch.autograd.function import once_differentiable

from fuseer.kernels import checks, dispatch
from fuseer.kernels.patch_embed_visible import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)
ARGUMENTS = "Tensor images, Tensor weight, Tensor? bias, Tensor ids_keep, Tensor? pos_embed, Tensor? mean, Tensor? std"


def _fake(images, weight, bias, ids_keep, pos_embed, mean, std):
    return weight.new_empty((*ids_keep.shape, len(weight)), dtype=reference.out_dtype(weight, pos_embed))


def _fake_backward(dout, images, weight, bias, ids_keep, pos_embed, mean, std):
    return tuple(weight.new_empty(0) if x is None else x.new_empty(x.shape) for x in (weight, bias, pos_embed))


def _reference(images, weight, bias, ids_keep, pos_embed, mean, std):
    checks.patch_ids("patch_embed_visible", "ids_keep", ids_keep, images, weight.shape[3])
    wide = [_widened(x, weight) for x in (weight, bias, ids_keep, pos_embed, mean, std)]
    out = reference.patch_embed_visible(reference.rounded(images, weight), *wide)
    return out.to(reference.out_dtype(weight, pos_embed)).contiguous()


def _reference_backward(dout, images, weight, bias, ids_keep, pos_embed, mean, std):
    checks.patch_ids("patch_embed_visible", "ids_keep", ids_keep, images, weight.shape[3])
    mean, std = (_widened(x, weight) for x in (mean, std))

    def out(weight, bias, pos_embed):
        return reference.patch_embed_visible(pixels, weight, bias, ids_keep, pos_embed, mean, std)

    pixels, leaves = reference.rounded(images, weight), (weight, bias, pos_embed)
    return tuple(weight.new_empty(0) if x is None else x for x in dispatch.gradients(out, dout, leaves))


def _widened(x, weight):
    return x.detach().to(dispatch.compute_dtype(weight.dtype)) if x is not None and x.is_floating_point() else x


RAW = dispatch.register(
    "patch_embed_visible",
    f"({ARGUMENTS}) -> Tensor",
    _fake,
    triton=_triton.forward,
    cpu=dispatch.COMPILED,
    reference=_reference,
)
# bias and pos_embed stand for their gradients: where one is None, so is what is returned for it, as a tensor without numbers
RAW_BACKWARD = dispatch.register(
    "patch_embed_visible_backward",
    f"(Tensor dout, {ARGUMENTS}) -> (Tensor dweight, Tensor dbias, Tensor dpos_embed)",
    _fake_backward,
    triton=_triton.backward,
    cpu=dispatch.COMPILED,
    reference=_reference_backward,
)


class _PatchEmbedVisible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, *arguments):
        ctx.save_for_backward(*arguments)
        ctx.backend = backend
        return RAW[backend](*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        images, weight, bias, ids_keep, pos_embed, mean, std = ctx.saved_tensors
        _, _, of_weight, of_bias, _, of_positions, _, _ = ctx.needs_input_grad
        wanted = (weight, bias if of_bias else None, ids_keep, pos_embed if of_positions else None)
        dweight, dbias, dpositions = RAW_BACKWARD[ctx.backend](dout, images, *wanted, mean, std)
        given = (dweight if of_weight else None, dbias if of_bias else None, None, dpositions if of_positions else None)
        return None, None, *given, None, None


def patch_embed_visible(images, weight, bias, ids_keep, *, pos_embed=None, mean=None, std=None, backend=None):
    """out[b, m] = <weight, patch ids_keep[b, m] of image b> + bias + pos_embed[ids_keep[b, m]]: a ViT's visible tokens.

    images [B, C, H, W], any strides, channels_last among them; weight [D, C, p, p] as of a convolution of stride p, p dividing H and W;
    bias [D] or None; ids_keep int64 [B, keep], any order, repeated or none, among the P = H W/p^2 patches row by row; pos_embed [P, D] ->
    [B, keep, D] in the weight's dtype, which bias and pos_embed have too; no row is made for a class token. Float images may be of any
    float dtype and are rounded to the weight's; of uint8 ones every pixel becomes (u/255 - mean)/std, mean and std [C] then required, as
    numbers or as tensors (on a GPU the latter spare a copy). Sums and normalisation in float32, float64 where the weight is.
    Under autocast weight and bias are cast as torch's convolution casts them, and out is promoted to the dtype of pos_embed.
    Differentiable in weight, bias and pos_embed, once; images that require a gradient are refused. Kept for it: the arguments, no
    patches. Patches that are not visible are not read. No rank talks to another.
    Raises ValueError for shapes, mean or std without uint8 images or these without them, ids outside 0..P-1 (the C++ always, the others
    with FUSEER_CHECK_INDICES=1; without it Triton makes such rows NaN); TypeError for dtypes.
    Source: He et al. 2021 (MAE), arXiv 2111.06377; forward_encoder of facebookresearch/mae models_mae.py, which embeds all and gathers.
    """
    checks.tensor("patch_embed_visible", "weight", weight, "[D, C, p, p]")
    _check_images(images, weight)
    D, P = len(weight), (images.shape[2] // weight.shape[3]) * (images.shape[3] // weight.shape[3])
    for name, value, layout, sizes in (("bias", bias, "[D]", (D,)), ("pos_embed", pos_embed, "[P, D]", (P, D))):
        if value is not None:
            checks.tensor("patch_embed_visible", name, value, layout)
            checks.shape("patch_embed_visible", name, value, layout, sizes)
            checks.same_dtype("patch_embed_visible", "weight", weight, name, value)
            checks.same_device("patch_embed_visible", "images", images, name, value)
    checks.indices("patch_embed_visible", "ids_keep", ids_keep, "[B, keep]", (len(images), None), "images", images)
    mean, std = (_of_channels(name, value, images, weight) for name, value in (("mean", mean), ("std", std)))
    weight, bias = _autocast(weight, images), None if bias is None else _autocast(bias, images)
    arguments = (images, weight, bias, ids_keep, pos_embed, mean, std)
    return _PatchEmbedVisible.apply(dispatch.choose("patch_embed_visible", IMPLS, backend, *arguments), *arguments)


def _check_images(images, weight):
    if not (isinstance(images, torch.Tensor) and images.dtype == torch.uint8 and images.dim() == 4):
        checks.tensor("patch_embed_visible", "images", images, "[B, C, H, W]")
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "patch_embed_visible: images must not require a gradient: none is made; got requires_grad=True; give images.detach(),"
            " or use gather_patches, which makes one, and a matrix product"
        )
    if len(weight) < 1 or weight.shape[1] != images.shape[1] or weight.shape[2] != weight.shape[3] or weight.shape[3] < 1:
        raise ValueError(
            f"patch_embed_visible: weight must be [D, C, p, p] with D, p >= 1 and the C of images; got {list(weight.shape)} for images"
            f" {list(images.shape)}"
        )
    checks.same_device("patch_embed_visible", "images", images, "weight", weight)
    checks.patches("patch_embed_visible", images, weight.shape[3])


def _of_channels(name, value, images, weight):
    """mean or std as a tensor [C] in the dtype of the arithmetic; None beside float images, which must have none."""
    if images.dtype != torch.uint8:
        if value is not None:
            raise ValueError(
                f"patch_embed_visible: {name} is for uint8 images, float ones come normalised; got {name} and {images.dtype}; leave it out"
            )
        return None
    if value is None:
        raise ValueError(f"patch_embed_visible: {name} [C] is needed to normalise uint8 images; got None; give that of their pixels/255")
    dtype = dispatch.compute_dtype(weight.dtype)
    if not isinstance(value, torch.Tensor):
        value = torch.tensor([float(x) for x in value], dtype=dtype).to(images.device, non_blocking=True)
    checks.tensor("patch_embed_visible", name, value, "[C]")
    checks.shape("patch_embed_visible", name, value, "[C] of images", images.shape[1:2])
    checks.same_device("patch_embed_visible", "images", images, name, value)
    return value.detach().to(dtype)


def _autocast(x, images):
    """x as a convolution of these images would take it."""
    device = images.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))
