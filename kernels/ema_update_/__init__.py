"""Where does fuseer.kernels.ema_update_ lead? To its door, op.py."""

from fuseer.kernels.ema_update_.op import ema_update_

__all__ = ["ema_update_"]
