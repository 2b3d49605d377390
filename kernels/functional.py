"""What may I call? The public list of ops."""

from fuseer.kernels.ema_update_ import ema_update_
from fuseer.kernels.info_nce import info_nce
from fuseer.kernels.lars_update_ import lars_update_
from fuseer.kernels.nt_xent import nt_xent
from fuseer.kernels.sinkhorn import sinkhorn
from fuseer.kernels.soft_xent import soft_xent
from fuseer.kernels.swapped_prediction import swapped_prediction

__all__ = ["ema_update_", "info_nce", "lars_update_", "nt_xent", "sinkhorn", "soft_xent", "swapped_prediction"]
