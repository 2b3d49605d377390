"""What does gather_patches mean?"""

import torch


def gather_patches(images, ids, patch):
    """out[b, m] = the pixels of patch ids[b, m] of image b, in the order row, column, channel."""
    B, C, H, W = images.shape
    grid = images.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 3, 5, 1)
    return grid.flatten(3).flatten(1, 2)[torch.arange(B, device=images.device)[:, None], ids]
