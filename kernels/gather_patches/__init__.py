"""Where does fuseer.kernels.gather_patches lead? To its door, op.py."""

from fuseer.kernels.gather_patches.op import gather_patches

__all__ = ["gather_patches"]
