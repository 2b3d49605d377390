"""What does the loss on masked patches mean?"""

import torch

from fuseer.kernels import checks
from fuseer.kernels.gather_patches.reference import gather_patches

EPS = 1e-6


def masked_patch_mse(pred, images, ids_masked, patch, normalize, reduction):
    """loss_bm = mean over the pixels of patch ids_masked[b, m] of (pred - target)^2, or the mean of all of them."""
    target = gather_patches(images, ids_masked, patch)
    if normalize:
        mean, deviation = mean_and_deviation(target)
        target = (target - mean) / deviation
    if pred.shape[1] == patches(images, patch):
        pred = pred[torch.arange(len(pred), device=pred.device)[:, None], ids_masked]
    loss = (pred - target).square().mean(-1)
    return loss.mean() if reduction == "mean" else loss


def forward(pred, images, ids_masked, patch, normalize, reduction):
    """The loss with what its gradient needs: statistics [B, M, 2], mean and 1/deviation of each target's pixels; unnormalised 0 and 1."""
    checks.patch_ids("masked_patch_mse", "ids_masked", ids_masked, images, patch)
    loss = masked_patch_mse(pred, images, ids_masked, patch, normalize, reduction)
    if not normalize:
        return loss, loss.new_tensor([0.0, 1.0]).expand(*ids_masked.shape, 2)
    mean, deviation = mean_and_deviation(gather_patches(images, ids_masked, patch))
    return loss, torch.cat([mean, deviation.reciprocal()], -1)


def mean_and_deviation(pixels):
    """[..., n] -> [..., 1] each: the mean, and the root of the unbiased variance + EPS."""
    return pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + EPS).sqrt()


def patches(images, patch):
    """P, the number of patches of an image."""
    return (images.shape[2] // patch) * (images.shape[3] // patch)
