"""Where does fuseer.kernels.lars_update_ lead? To its door, op.py."""

from fuseer.kernels.lars_update_.op import lars_update_

__all__ = ["lars_update_"]
