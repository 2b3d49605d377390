"""What may I call? The public list of ops."""

from fuseer.kernels.ema_update_ import ema_update_
from fuseer.kernels.gather_patches import gather_patches
from fuseer.kernels.gather_tokens import gather_tokens
from fuseer.kernels.info_nce import info_nce
from fuseer.kernels.lars_update_ import lars_update_
from fuseer.kernels.masked_patch_mse import masked_patch_mse
from fuseer.kernels.nt_xent import nt_xent
from fuseer.kernels.patch_embed_visible import patch_embed_visible
from fuseer.kernels.patch_mask import patch_mask
from fuseer.kernels.sinkhorn import sinkhorn
from fuseer.kernels.soft_xent import soft_xent
from fuseer.kernels.swapped_prediction import swapped_prediction
from fuseer.kernels.unshuffle_tokens import unshuffle_tokens

__all__ = [
    "ema_update_",
    "gather_patches",
    "gather_tokens",
    "info_nce",
    "lars_update_",
    "masked_patch_mse",
    "nt_xent",
    "patch_embed_visible",
    "patch_mask",
    "sinkhorn",
    "soft_xent",
    "swapped_prediction",
    "unshuffle_tokens",
]
