"""Where does fuseer.kernels.soft_xent lead? To its door, op.py."""

from fuseer.kernels.soft_xent.op import soft_xent

__all__ = ["soft_xent"]
