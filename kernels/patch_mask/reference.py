"""Which patches does a random mask keep?"""

import torch


def patch_mask(noise, keep):
    """(ids_keep, ids_restore, mask) of rows of noise: MAE's two sorts, both stable, so that equal noise keeps the order of its patches."""
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1, stable=True)
    ids_keep = ids_shuffle[:, :keep].clone(memory_format=torch.contiguous_format)
    return ids_keep, ids_restore, (ids_restore >= keep).float()
