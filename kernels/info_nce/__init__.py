"""Where does fuseer.kernels.info_nce lead? To its door, op.py."""

from fuseer.kernels.info_nce.op import info_nce

__all__ = ["info_nce"]
