"""What does nt_xent mean? Plain PyTorch, which makes the matrix of all pairs."""

import torch
from torch.nn import functional as F

from fuseer.kernels import dispatch


def nt_xent(z1, z2, temperature, normalize):
    """The mean over all 2N rows of LSE_{j≠i}(y_ij/temperature) - y_ip/temperature, y = <z_i, z_j> of unit rows, p the other view of i."""
    rows = torch.cat([z1, z2])
    return row_losses(rows, [len(rows)], temperature, normalize).sum() / max(1, len(rows))


def row_losses(rows, counts, temperature, normalize):
    """[M]: the loss of every row; `rows` holds, rank after rank, counts[r] rows, all first views before all second views."""
    logits, positive = _logits(rows, counts, temperature, normalize)
    return logits.logsumexp(-1) - logits.gather(-1, positive[:, None])[:, 0]


def statistics(rows, counts, temperature, normalize):
    """[M, 2]: (top, sum) with softmax_ij = exp((y_ij - top_i)/temperature)/sum_i, as ranks exchange them."""
    logits = _logits(rows, counts, temperature, normalize)[0]
    top = logits.amax(-1)
    return torch.stack([top * temperature, (logits - top[:, None]).exp().sum(-1)], -1)


def _logits(rows, counts, temperature, normalize):
    """(logits [M, M], -infinity on the diagonal; the index [M] of every row's positive)."""
    unit = F.normalize(rows, dim=-1) if normalize else rows
    logits = (unit @ unit.T / temperature).masked_fill(torch.eye(len(rows), dtype=torch.bool, device=rows.device), -torch.inf)
    others = [torch.arange(n, device=rows.device).roll(n // 2) + sum(counts[:r]) for r, n in enumerate(counts)]
    return logits, torch.cat(others)


def forward(z1, z2, temperature, normalize, same_rows, gradient, group_name):
    """(loss, dz1, dz2): this rank's loss, and the gradient of the sum of all ranks' losses; empty without `gradient`."""
    mine = torch.cat([z1, z2]).detach()
    every, counts, rank = dispatch.gather_rows(mine, group_name, same_rows)
    every = every.to(dispatch.compute_dtype(mine.dtype))
    first, share = sum(counts[:rank]), len(counts) / max(1, len(every))
    own = slice(first, first + len(mine))
    if not gradient:
        loss = row_losses(every, counts, temperature, normalize)[own].sum() * share
        return loss, loss.new_empty(0), loss.new_empty(0)
    if group_name and len(every):
        # other backends need the sums of all rows, and ranks may run different backends
        dispatch.gather_rows(statistics(every, counts, temperature, normalize)[own], group_name, counts=counts)
    with dispatch.recording():
        leaf = every.requires_grad_()
        losses = row_losses(leaf, counts, temperature, normalize)
        (drows,) = torch.autograd.grad(losses.sum() * share, leaf)
    dz1, dz2 = (drows[own][half].clone() for half in (slice(len(z1)), slice(len(z1), None)))
    return losses.detach()[own].sum() * share, dz1, dz2
