"""Where does fuseer.kernels.nt_xent lead? To its door, op.py."""

from fuseer.kernels.nt_xent.op import nt_xent

__all__ = ["nt_xent"]
