"""How is patch_mask called, checked and dispatched?"""

import torch

from fuseer.kernels import checks, dispatch
from fuseer.kernels.patch_mask import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)


def _fake(noise, keep):
    B, P = noise.shape
    ids_restore = noise.new_empty((B, P), dtype=torch.int64)
    return ids_restore.new_empty((B, keep)), ids_restore, noise.new_empty((B, P), dtype=torch.float32)


RAW = dispatch.register(
    "patch_mask",
    "(Tensor noise, SymInt keep) -> (Tensor ids_keep, Tensor ids_restore, Tensor mask)",
    _fake,
    triton=_triton.forward,
    cpu=dispatch.COMPILED,
    reference=dispatch.widened(reference.patch_mask),
)


def patch_mask(noise, keep, *, backend=None):
    """ids_restore[b, i] = the rank of noise[b, i] in its row; the `keep` smallest are kept, ids_keep[b, rank] = i, mask = rank >= keep.

    noise [B, P], any strides -> ids_keep [B, keep] and ids_restore [B, P], int64, and mask [B, P], float32, 1 where a patch is removed.
    Equal numbers rank in the order of their patches (-0 equals 0), NaN after everything: the two argsorts of MAE's random_masking,
    made stable. ids_restore is the inverse of the whole order, of which ids_keep is the beginning. With noise from a generator of the
    data's, the mask depends on neither rank nor world size. Not differentiable; no rank talks to another, no host sync.
    Raises ValueError for shapes and for keep outside 1..P; TypeError for dtypes.
    Replaces argsort, argsort, a slice, ones, a masked fill and a gather. Source: He et al. 2022 (MAE), random_masking in models_mae.py.
    """
    checks.tensor("patch_mask", "noise", noise, "[B, P]")
    checks.at_least("patch_mask", "keep", keep, 1)
    if keep > noise.shape[1]:
        raise ValueError(f"patch_mask: keep must be at most P = {noise.shape[1]}, the patches there are; got {keep}")
    args = (noise.detach(), keep)
    return RAW[dispatch.choose("patch_mask", IMPLS, backend, *args)](*args)
