"""When does csrc/lars_update_/lars_update_cuda.cu run, and on what?"""

import torch

from fuseer.kernels import _chunks, cuda_library, dispatch

# programs that share a tensor, each of which reads the sums of all of them: 12 kB
MOST = 512


def unsupported(params, *rest):
    return cuda_library.refusal("params", params)


def forward(params, grads, momenta, *options):
    """Two launches for all tensors, whatever their dtypes, and with a group one between them; no host sync.

    Tensors whose strides differ or leave gaps go through contiguous copies.
    """
    *numbers, denominator, adapt, lr_in_momentum, nesterov, clip, skip, segments, group_name = options
    switches = (denominator == "norm_of_sum", lr_in_momentum, nesterov, clip)
    weight_decay = numbers[2]
    with _chunks.flat(params, grads, momenta, written=(0, 2)) as lists:
        table = _chunks.table(lists, block=cuda_library.BLOCK, most=MOST, segments=segments, adapt=adapt)
        device, programs = table.rows.device, (table.rows, table.owners, table.programs)
        partials = torch.empty((table.programs, 3), dtype=torch.float64, device=device)
        if table.programs:
            cuda_library.launch("fuseer_lars_squares", device, *programs, weight_decay, partials)
        sums = _over_ranks(table, partials, len(adapt), group_name)
        if table.programs:
            cuda_library.launch("fuseer_lars_update", device, *programs, table.layers, partials, sums, *_flag(skip), *numbers, *switches)


def _over_ranks(table, partials, layers, group_name):
    """The sums [layers, 3] of all ranks; None for a process alone, which sums its partial sums where it needs them."""
    if not group_name:
        return None
    sums = partials.new_empty((layers, 3))
    if layers:
        cuda_library.launch("fuseer_lars_merge", sums.device, table.layers, layers, partials, sums)
    return dispatch.all_reduce(sums, "sum", group_name)


def _flag(skip):
    """(the flag, its bytes, a mask of the bits that make it differ from 0: not the sign of a floating-point -0.0)."""
    if skip is None:
        return None, 0, 0
    if skip.is_complex():
        skip = skip != 0
    return skip, skip.itemsize, 2 ** (8 * skip.itemsize - 1) - 1 if skip.is_floating_point() else -1
