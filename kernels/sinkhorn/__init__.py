"""Where does fuseer.kernels.sinkhorn lead? To its door, op.py."""

from fuseer.kernels.sinkhorn.op import sinkhorn

__all__ = ["sinkhorn"]
