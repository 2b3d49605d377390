"""How is nt_xent called, checked, dispatched and differentiated?"""

import torch
from torch.autograd.function import once_differentiable

from fuseer.kernels import checks, dispatch
from fuseer.kernels.nt_xent import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)


def _fake(z1, z2, temperature, normalize, same_rows, gradient, group_name):
    dtype = dispatch.compute_dtype(z1.dtype)
    shape = z1.shape if gradient else (0,)
    return z1.new_empty((), dtype=dtype), z1.new_empty(shape, dtype=dtype), z1.new_empty(shape, dtype=dtype)


RAW = dispatch.register(
    "nt_xent",
    "(Tensor z1, Tensor z2, float temperature, bool normalize, bool same_rows, bool gradient, str group_name)"
    " -> (Tensor loss, Tensor dz1, Tensor dz2)",
    _fake,
    triton=_triton.forward,
    cpu=_cpu.forward,
    reference=reference.forward,
)


class _NtXent(torch.autograd.Function):
    """The raw op makes the gradient as well: it needs the sums of all rows, and what the loss is multiplied by later is one number."""

    @staticmethod
    def forward(ctx, backend, z1, z2, *options):
        loss, dz1, dz2 = RAW[backend](z1, z2, *options)
        ctx.save_for_backward(dz1, dz2)
        ctx.dtype = z1.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dz1, dz2 = ((dz * dloss).to(ctx.dtype) for dz in ctx.saved_tensors)
        return None, dz1, dz2, None, None, None, None, None


def nt_xent(z1, z2, *, temperature=0.1, normalize=True, same_rows=False, group=None, backend=None):
    """The mean over all 2N rows i of LSE_{j≠i}(y_ij/temperature) - y_ip/temperature, where p is the other view of i.

    y_ij = <z_i, z_j> over the rows of z1 and z2 alike, each divided by max(|z|, 1e-12) with `normalize`. z1 [N, D], z2 [N, D], any
    strides; a scalar, float32, or float64 where z1 is. Differentiable in both, once. The 2N x 2N matrix never exists: memory is
    O(N D). SimCLR's published code sums the losses of the two views, which is 2 times this mean.
    group: rows of all its ranks are negatives of each other. Rank r returns W * (sum over its own rows)/(rows of all ranks), so that
    gradients averaged over ranks are those of the global mean; N may differ between ranks and be 0 (then 0 is returned). Features are
    gathered once and row sums once; the backward needs no rank. same_rows=True promises the same N everywhere and spares the exchange
    of N, which on a GPU waits for the device; a broken promise is an error of the collective or garbage.
    A temperature below zero turns the order round, as in lightly's loss. Raises ValueError for shapes and temperatures of 0,
    TypeError for dtypes. Source: Chen et al. 2020, arXiv 2002.05709; google-research/simclr tf2/objective.py.
    """
    checks.tensor("nt_xent", "z1", z1, "[N, D]")
    checks.tensor("nt_xent", "z2", z2, "[N, D]")
    checks.shape("nt_xent", "z2", z2, "[N, D] of z1", z1.shape)
    checks.same_dtype("nt_xent", "z1", z1, "z2", z2)
    checks.same_device("nt_xent", "z1", z1, "z2", z2)
    checks.nonzero("nt_xent", "temperature", temperature)
    gradient = torch.is_grad_enabled() and (z1.requires_grad or z2.requires_grad)
    options = (float(temperature), bool(normalize), bool(same_rows), gradient, dispatch.group_name("nt_xent", group))
    return _NtXent.apply(dispatch.choose("nt_xent", IMPLS, backend, z1, z2, *options), z1, z2, *options)
