"""Where does fuseer.kernels.swapped_prediction lead? To its door, op.py."""

from fuseer.kernels.swapped_prediction.op import swapped_prediction

__all__ = ["swapped_prediction"]
