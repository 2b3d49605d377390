"""What does patch_embed_visible mean?"""

import torch


def patch_embed_visible(images, weight, bias, ids_keep, pos_embed, mean, std):
    """out[b, m] = <weight, patch ids_keep[b, m] of image b> + bias + pos_embed[ids_keep[b, m]]; uint8 images become (u/255 - mean)/std."""
    p = weight.shape[-1]
    B, C, H, W = images.shape
    pixels = images.to(weight.dtype)
    if mean is not None:
        pixels = (pixels / 255 - mean[:, None, None]) / std[:, None, None]
    grid = pixels.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)
    visible = grid.flatten(3).flatten(1, 2)[torch.arange(B, device=images.device)[:, None], ids_keep]
    out = visible @ weight.flatten(1).T
    if bias is not None:
        out = out + bias
    return out if pos_embed is None else out + pos_embed[ids_keep]


def rounded(images, weight):
    """Images as they are multiplied: float ones rounded to the dtype of the weight, as torch's convolution under autocast takes them."""
    return images.to(weight.dtype) if images.is_floating_point() else images


def out_dtype(weight, pos_embed):
    """The weight's, which under autocast may be narrower than that of the positions: then, as torch promotes, theirs."""
    return weight.dtype if pos_embed is None else torch.promote_types(weight.dtype, pos_embed.dtype)
