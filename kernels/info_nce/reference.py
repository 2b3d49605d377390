"""What does info_nce mean? Plain PyTorch, which makes the matrix of all logits."""

import torch
from torch.nn import functional as F

from fuseer.kernels import checks, dispatch


def info_nce(query, keys, positive, positive_index, temperature, normalize):
    """The mean over rows of LSE of all logits less the positive's; a logit is <q, k>/temperature, by default of unit rows."""
    return row_losses(query, keys, positive, positive_index, temperature, normalize).sum() / max(1, len(query))


def row_losses(query, keys, positive, positive_index, temperature, normalize):
    """[N]"""
    q, k = (F.normalize(x, dim=-1) if normalize else x for x in (query, keys.detach()))
    logits = q @ k.T / temperature
    if positive is None:
        own = logits.gather(-1, positive_index[:, None])
    else:
        p = F.normalize(positive.detach(), dim=-1) if normalize else positive.detach()
        own = (q * p).sum(-1, keepdim=True) / temperature
        logits = torch.cat([own, logits], -1)
    return logits.logsumexp(-1) - own[:, 0]


def forward(query, keys, positive, positive_index, temperature, normalize, gradient, group_name):
    """(loss, dquery): this rank's loss and its gradient; empty without `gradient`."""
    if positive_index is not None and dispatch.indices_are_checked(query.device):
        checks.indices_within("info_nce", "positive_index", positive_index, len(keys))
    dtype = dispatch.compute_dtype(query.dtype)
    rows = [None if x is None else x.detach().to(dtype) for x in (query, keys, positive)]
    share = dispatch.mean_share(query, group_name)
    with dispatch.recording():
        rows[0].requires_grad_(gradient)
        losses = row_losses(*rows, positive_index, temperature, normalize)
        dquery = torch.autograd.grad(losses.sum(), rows[0])[0] * share if gradient else rows[0].new_empty(0)
    return losses.detach().sum() * share, dquery.contiguous()
