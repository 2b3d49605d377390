"""What does patch_embed_visible, forward and backward, have to beat, and what can nobody avoid?"""

import torch
from torch.nn import functional as F

from benchmarks.measure import Work


def official(images, weight, bias, ids_keep, pos_embed, mean, std):
    """forward_encoder of models_mae.py: all patches by a convolution, positions added, an index as large as what is kept of them."""
    if mean is not None:
        images = (images.to(weight.dtype) / 255 - mean.to(weight.dtype).view(-1, 1, 1)) / std.to(weight.dtype).view(-1, 1, 1)
    x = F.conv2d(images, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    if pos_embed is not None:
        x = x + pos_embed
    return torch.gather(x, 1, ids_keep.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def third_party(arguments):
    return {}


def work(arguments):
    """Visible pixels are read twice, once for each direction; two operations a weight and token in the forward, and two in the backward."""
    images, weight, ids = (arguments[name] for name in ("images", "weight", "ids_keep"))
    tokens, D, pixels = ids.numel(), len(weight), weight[0].numel()
    read = 2 * tokens * pixels * images.element_size()
    return Work(read + (2 * tokens * D + 3 * weight.numel()) * weight.element_size(), 0, 4 * tokens * D * pixels)


def sweeps():
    return {}
