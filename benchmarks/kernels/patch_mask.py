"""What does patch_mask have to beat, and what can nobody avoid?"""

import torch

from benchmarks.measure import Work


@torch.no_grad()
def official(noise, keep):
    """MAE's random_masking without its gather of tokens: two sorts, here stable where numbers tie, ones, a fill, a gather."""
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    ids_keep = ids_shuffle[:, :keep]
    mask = torch.ones(noise.shape, device=noise.device)
    mask[:, :keep] = 0
    return ids_keep, ids_restore, torch.gather(mask, dim=1, index=ids_restore)


def third_party(arguments):
    """lightly's random_token_mask draws its own noise, so it is no function of ours."""
    return {}


def work(arguments):
    """Noise read once, ids and mask written once. Arithmetic is counted as none: how many comparisons a sort needs is its own affair."""
    (B, P), keep = arguments["noise"].shape, arguments["keep"]
    return Work(B * (P * (arguments["noise"].element_size() + 8 + 4) + 8 * keep), 0, 0)


def sweeps():
    return {}
