"""Where does fuseer.kernels.masked_patch_mse lead? To its door, op.py."""

from fuseer.kernels.masked_patch_mse.op import masked_patch_mse

__all__ = ["masked_patch_mse"]
