"""Where does fuseer.kernels.patch_mask lead? To its door, op.py."""

from fuseer.kernels.patch_mask.op import patch_mask

__all__ = ["patch_mask"]
