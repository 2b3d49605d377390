"""What does info_nce, forward and backward, have to beat, and what can nobody avoid?"""

import torch
from torch.nn import functional as F

from benchmarks.measure import Work
from fuseer.kernels.info_nce import cases


def prepared(arguments):
    """What the published code is given: MoCo's queue is float32 and [D, Q], of unit rows already; MoCo v3 normalises its keys itself."""
    keys = arguments["keys"]
    if arguments["positive"] is None:
        return arguments
    keys = keys.float()
    return {**arguments, "keys": (F.normalize(keys, dim=-1) if arguments["normalize"] else keys).T.contiguous()}


def official(query, keys, positive, positive_index, temperature, normalize):
    """MoCo's logits against a copy of its queue, or MoCo v3's against all keys, and a cross-entropy; half rows in float32."""

    def unit(x):
        return F.normalize(x.float(), dim=-1) if normalize else x.float()

    q = unit(query)
    if positive is None:
        return F.cross_entropy(torch.einsum("nc,mc->nm", q, unit(keys)) / temperature, positive_index)
    own = torch.einsum("nc,nc->n", q, unit(positive)).unsqueeze(-1)
    logits = torch.cat([own, torch.einsum("nc,ck->nk", q, keys.clone().detach())], dim=1)
    logits /= temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def third_party(arguments):
    """lightly's loss with a memory bank, which it copies as MoCo does; not moved on, for the next call is to find the same."""
    from lightly.loss import NTXentLoss

    if arguments["positive"] is None or not arguments["normalize"] or not len(arguments["keys"]):
        return {}
    module = NTXentLoss(arguments["temperature"], memory_bank_size=tuple(arguments["keys"].shape))
    module.memory_bank.bank = F.normalize(arguments["keys"].float(), dim=-1)
    module.memory_bank._dequeue_and_enqueue = lambda batch: None
    return {"lightly": lambda query, positive, **rest: module(query.float(), positive.float())}


def bounds(arguments):
    """The two products alone, of unit rows in the inputs' dtype: every query with every key, and the gradient's weights with the keys."""
    query, keys = (F.normalize(arguments[name].float(), dim=-1).to(arguments[name].dtype) for name in ("query", "keys"))
    logits, dquery = query.new_empty(len(query), len(keys)), torch.empty_like(query)

    def two_gemms():
        torch.mm(query, keys.T, out=logits)
        torch.mm(logits, keys, out=dquery)

    return {"two_gemms": two_gemms}


def work(arguments):
    """One pass over the keys, since the gradient is known but for one factor: keys, queries and positives read, gradient written.

    An exponential per query and key, and the two products.
    """
    query, keys = arguments["query"], arguments["keys"]
    pairs = len(query) * len(keys)
    given = (query, keys) if arguments["positive"] is None else (query, keys, arguments["positive"])
    moved = sum(x.numel() * x.element_size() for x in (*given, query))
    products, half = 2 * pairs * query.shape[1], query.dtype == torch.bfloat16
    return Work(moved, pairs, 2 * keys.numel() + (0 if half else products), half_products=products if half else 0)


def sweeps():
    return {
        "Q": {q: cases._case(f"256x{q}x128", (256, q, 128)) for q in (4096, 16384, 65536, 262144)},
        "N": {n: cases._case(f"{n}x65536x128", (n, 65536, 128)) for n in (32, 64, 256, 1024)},
    }
