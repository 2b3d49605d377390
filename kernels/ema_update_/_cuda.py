"""When does csrc/ema_update_/ema_update_cuda.cu run, and on what?"""

import torch

from fuseer.kernels import _chunks, cuda_library


def unsupported(teacher, student, momentum, momentum_scalar, shadow):
    return cuda_library.refusal("teacher", teacher)


def forward(teacher, student, momentum, momentum_scalar, shadow):
    """One launch for all tensors, whatever their dtypes; those whose strides differ or leave gaps through contiguous copies."""
    with _chunks.flat(teacher, student, shadow, written=(0, 2)) as lists:
        table = _chunks.table(lists, block=cuda_library.BLOCK)
        if table.programs:
            double = momentum_scalar is not None and momentum_scalar.dtype == torch.float64
            arguments = (table.rows, table.owners, table.programs, float(momentum), momentum_scalar, double)
            cuda_library.launch("fuseer_ema_update", table.rows.device, *arguments)
