"""When does csrc/nt_xent/nt_xent_cpu.cpp run, and what do ranks exchange around it?"""

import torch

from fuseer.kernels import dispatch, extension

REASON = extension.reason()
STATISTICS = dispatch.define(
    "nt_xent_statistics", "(Tensor rows, int begin, int count, float temperature, bool normalize) -> (float, Tensor)"
)
GRADIENT = dispatch.define(
    "nt_xent_gradient",
    "(Tensor rows, Tensor of_all, Tensor of_own, int begin, int count, float temperature, bool normalize, float scale) -> Tensor",
)
ALONE = dispatch.define("nt_xent_alone", "(Tensor rows, float temperature, bool normalize, float scale) -> (float, Tensor)")


def unsupported(z1, z2, temperature, normalize, same_rows, gradient, group_name):
    if REASON is not None:
        return REASON
    if z1.device.type != "cpu":
        return f"z1 is on {z1.device.type}, not on the CPU"
    return None


def forward(z1, z2, temperature, normalize, same_rows, gradient, group_name):
    """(loss, dz1, dz2), as reference.py says; rows are gathered once, and for the gradient their statistics once."""
    every, counts, rank = dispatch.gather_rows(torch.cat([z1, z2]), group_name, same_rows)
    begin, count, share = sum(counts[:rank]), counts[rank], len(counts) / max(1, len(every))
    options = (begin, count, temperature, normalize)
    empty = z1.new_empty((0, z1.shape[1]) if gradient else (0,), dtype=dispatch.compute_dtype(z1.dtype))
    if not len(every):
        return empty.new_zeros(()), empty, empty.clone()
    if gradient and not group_name:
        total, drows = ALONE(every, temperature, normalize, share / temperature)
    else:
        total, statistics = STATISTICS(every, *options)
        if not gradient:
            return empty.new_tensor(total * share), empty, empty.clone()
        of_all = dispatch.gather_rows(statistics[:, :2].contiguous(), group_name, counts=counts)[0]
        drows = GRADIENT(every, of_all, statistics, *options, share / temperature)
    return empty.new_tensor(total * share), drows[: len(z1)], drows[len(z1) :].clone()
