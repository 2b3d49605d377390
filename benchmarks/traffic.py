"""How many bytes must a call move, how many does it move, and how many would eager? Counted from shapes; nothing runs."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.launches import nbytes, storage

# ops that find their tensors by addresses in a table, and the lists that they read and write
UPDATED = {"ema_update_": ("teacher",), "lars_update_": ("params", "momenta")}


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Eager(TorchDispatchMode):
    """Counts dispatched ops that do work, and the bytes they must read and write: each input and each output once."""

    WRITES_ONLY = ("zeros", "ones", "full", "zero_", "fill", "empty", "new_", "scalar_tensor")

    def __init__(self):
        super().__init__()
        self.ops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, mutable = func.overloadpacket.__name__, func._schema.is_mutable
        read, written = {(storage(x), x.storage_offset(), x.shape): x for x in tensors((args, kwargs))}, tensors(out)
        views = {storage(x) for x in read.values()} >= {storage(x) for x in written}
        if mutable or not (views or name.startswith("empty") or name.startswith("new_empty")):
            self.ops += 1
            reads = () if name.startswith(self.WRITES_ONLY) else read.values()
            self.bytes += sum(map(nbytes, (*reads, *written)))
        return out


def floor_bytes(called):
    """Every input read once, every output and gradient written once; what is updated in place both, a shadow written alone."""
    updated = [called.arguments[name] for name in UPDATED.get(called.op, ())]
    return sum(map(nbytes, tensors([called.arguments, called.outputs, updated])))


def moved_bytes(called):
    """Each launch touches every tensor that it is given once, intermediates included; READS corrects where that is not so."""
    total = called.torch_bytes + sum(sum(launch.given.values()) for launch in called.launches)
    return total + READS.get(called.op, lambda called: 0)(called)


def _swapped_reads(called):
    """Corrects for scores: loss and gradient read the V crops that they are given, and the A assign crops of them as targets."""
    rows = sum(map(nbytes, tensors(called.arguments["scores"]))) // len(called.arguments["scores"])
    return rows * len(called.arguments["assign"]) * (1 + len(called.backward))


def _lars_reads(called):
    """The sums read params and grads of the layers that are adapted before the update reads all lists."""
    read, adapt = [called.arguments[name] for name in ("params", "grads")], called.arguments["adapt"]
    return floor_bytes(called) + sum(nbytes(x) for tensors in read for x, wanted in zip(tensors, adapt, strict=True) if wanted)


READS = {"swapped_prediction": _swapped_reads, "ema_update_": floor_bytes, "lars_update_": _lars_reads}
