"""What does nt_xent, forward and backward, have to beat, and what can nobody avoid?"""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import Work
from fuseer.kernels.dispatch import compute_dtype
from fuseer.kernels.nt_xent import cases

# How many matrices of 2N x 2N float32 numbers a program holds at its peak; a test compares them with what it takes.
MATRICES = {"official": 2.3, "compile": 2.1, "lightly": 4.3, "reference": 5.4}
STRIP = 1024


def official(z1, z2, temperature, normalize):
    """SimCLR's two blocks of logits, the diagonal of the own view lowered by 1e9; half rows in float32. Its code sums the views' losses."""
    z1, z2 = ((F.normalize(z, dim=-1) if normalize else z) for z in (z1.float(), z2.float()))
    own = torch.eye(len(z1), device=z1.device) * 1e9
    labels = torch.arange(len(z1), device=z1.device)
    loss = 0
    for first, second in ((z1, z2), (z2, z1)):
        logits = torch.cat([first @ second.T / temperature, first @ first.T / temperature - own], 1)
        loss = loss + F.cross_entropy(logits, labels)
    return loss / 2


def third_party(arguments):
    """lightly's loss always normalises; half rows are given to it in float32, as it is used."""
    from lightly.loss import NTXentLoss

    if not arguments["normalize"]:
        return {}
    module = NTXentLoss(arguments["temperature"])
    return {"lightly": lambda z1, z2, temperature, normalize: module(z1.float(), z2.float())}


def needs(arguments):
    """{program: bytes beyond the inputs that it will take}: all of them make matrices of all pairs."""
    pairs = 4 * (2 * len(arguments["z1"])) ** 2
    return {name: int(count * pairs) for name, count in MATRICES.items()}


def oracle(z1, z2, temperature, normalize):
    """The op in strips of rows, each made anew in the backward pass: its meaning where the reference's matrices do not fit."""
    rows = torch.cat([z1, z2])
    rows = F.normalize(rows, dim=-1) if normalize else rows
    strips = range(0, len(rows), STRIP)
    return sum(checkpoint(_strip, rows, start, temperature, use_reentrant=False) for start in strips) / max(1, len(rows))


def _strip(rows, start, temperature):
    logits = rows[start : start + STRIP] @ rows.T / temperature
    own = torch.arange(start, start + len(logits), device=rows.device)[:, None]
    logits = logits.scatter(1, own, -torch.inf)
    return (logits.logsumexp(-1) - logits.gather(1, (own + len(rows) // 2) % len(rows))[:, 0]).sum()


def work(arguments):
    """Two passes over half of all pairs, for each is wanted twice: loss and sums of the rows first, and then, made anew, its gradient.

    Each pass reads the rows, the second writes the gradient; an exponential and a dot product per pair and pass, and two more products
    for the gradient.
    """
    z1 = arguments["z1"]
    rows, size = 2 * len(z1), 2 * z1.numel()
    pairs = rows * (rows - 1) // 2
    moved = size * (2 * z1.element_size() + compute_dtype(z1.dtype).itemsize)
    products = 4 * pairs * z1.shape[1]
    half = z1.dtype == torch.bfloat16
    return Work(moved, 2 * pairs, 6 * size + (0 if half else products), half_products=products if half else 0)


def sweeps():
    return {
        "N": {2 * n: cases._case(f"{2 * n}x128", n, 128) for n in (128, 512, 2048, 4096)},
        "D": {d: cases._case(f"2048x{d}", 1024, d) for d in (64, 128, 256, 512, 1024)},
    }
