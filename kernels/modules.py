"""Which modules hold what the ops need between calls, and which replace lightly's losses by changing one import?"""

import torch
import torch.distributed as dist
from torch import nn

from fuseer.kernels import checks, dispatch
from fuseer.kernels.info_nce import info_nce
from fuseer.kernels.nt_xent import nt_xent
from fuseer.kernels.swapped_prediction import swapped_prediction

SMALLEST_TEMPERATURE = 1e-8


class Queue(nn.Module):
    """The last `length` keys pushed, as a ring of rows [Q, D] on the device: MoCo's dictionary, for `info_nce(query, queue.rows, …)`.

    rows [Q, D]: random unit rows until they are overwritten, oldest first; keys are stored as they are given, so push unit keys
    where unit rows are wanted. pointer []: the place of the oldest row, int64, on the device, never read by the host. Both are
    buffers: they are saved, loaded, moved and (rows alone) cast with the module. Nothing here is differentiable. A queue is this
    process's own: ranks hold the same rows where they start from the same seed and push the same gathered keys.
    Raises ValueError for length or width < 1 and keys that are not [B, D]; TypeError for other dtypes.
    Source: He et al. 2020, main_moco.py _dequeue_and_enqueue, which allows only batch sizes that divide Q.
    """

    def __init__(self, length, width):
        super().__init__()
        checks.at_least("Queue", "length", length, 1)
        checks.at_least("Queue", "width", width, 1)
        self.register_buffer("rows", nn.functional.normalize(torch.randn(length, width), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, keys):
        """Overwrites the oldest rows by keys [B, D], any B, cast to the rows' dtype; of more than Q the last Q stay."""
        checks.tensor("Queue", "keys", keys, "[B, D]")
        Q, D = self.rows.shape
        checks.shape("Queue", "keys", keys, "[B, D]", (keys.shape[0], D))
        checks.same_device("Queue", "rows", self.rows, "keys", keys)
        dropped = max(0, keys.shape[0] - Q)
        places = torch.arange(dropped, keys.shape[0], device=keys.device).add_(self.pointer).remainder_(Q)
        self.rows.index_copy_(0, places, keys[dropped:].to(self.rows.dtype))
        self.pointer.add_(keys.shape[0]).remainder_(Q)

    def extra_repr(self):
        return "length={}, width={}".format(*self.rows.shape)


class NTXentLoss(nn.Module):
    """nt_xent(out0, out1), SimCLR's loss; with a memory bank info_nce(out0, bank, positive=out1), MoCo's: lightly's NTXentLoss.

    memory_bank_size: 0 for none, else (rows, width), as lightly 1.6 wants it. temperature: any number but 0, negative ones too.
    forward(out0 [N, D], out1 [N, D]) -> scalar, a mean over 2N rows, over N with a bank; rows are normalised here. With a bank out1
    are the keys: the loss is that of the bank as it was, and where out0 requires a gradient the unit keys then enter the bank.
    gather_distributed=True takes negatives from, and gathers keys of, all ranks of a torch.distributed that is initialised when
    forward is called; alone it changes nothing. Ranks may differ in N; averaging gradients over ranks gives that of the global mean.
    Unlike lightly's: keys that wrap around the bank's end stay (there they are dropped, and the next batch starts at row 0); the
    bank is saved with the module (as a Queue, rows and pointer); a key that requires a gradient is refused, for only the query gets
    one; half inputs give a float32 loss.
    Raises ValueError for |temperature| < 1e-8, for a bank without a width, for shapes and for keys with a gradient; TypeError for
    dtypes.
    """

    def __init__(self, temperature=0.5, memory_bank_size=0, gather_distributed=False):
        super().__init__()
        if abs(temperature) < SMALLEST_TEMPERATURE:
            raise ValueError(f"NTXentLoss: temperature must be at least {SMALLEST_TEMPERATURE:g} away from 0; got {temperature}")
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.memory_bank = _bank(memory_bank_size)

    def forward(self, out0, out1):
        group = _all_ranks(self.gather_distributed)
        if self.memory_bank is None:
            return nt_xent(out0, out1, temperature=self.temperature, group=group)
        if out1.requires_grad:
            raise ValueError("NTXentLoss: out1 must not require a gradient where a memory bank makes it keys; got one that does; detach it")
        # a half query meets the bank in the bank's dtype: casting N rows is cheap, casting the bank would copy it on every call
        dtype = torch.promote_types(out0.dtype, self.memory_bank.rows.dtype)
        query, keys, rows = (x.to(dtype) for x in (out0, out1, self.memory_bank.rows))
        loss = info_nce(query, rows, positive=keys, temperature=self.temperature, group=group)
        if out0.requires_grad:
            unit = nn.functional.normalize(keys, dim=1)
            self.memory_bank.push(dispatch.gather_rows(unit, dispatch.group_name("NTXentLoss", group))[0])
        return loss

    def extra_repr(self):
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"


class SwaVLoss(nn.Module):
    """swapped_prediction over two lists of crops, the high-resolution ones being assigned: lightly's SwaVLoss.

    forward(high_resolution_outputs, low_resolution_outputs, queue_outputs=None) -> scalar: lists of scores [B, K], one per crop, and
    of [Q, K], one per high-resolution crop. sinkhorn_gather_distributed=True makes codes from the rows of all ranks of a
    torch.distributed that is initialised when forward is called; alone it changes nothing. B may then differ between ranks;
    averaging gradients over ranks gives that of the global mean.
    The crops are read where they lie: none is copied or stacked.
    Unlike lightly's: the loss has no axis, is float32 for half inputs, and stays finite at any finite score.
    Raises ValueError for fewer than 2 crops, no assigned one, or shapes that differ; TypeError for dtypes.
    """

    def __init__(self, temperature=0.1, sinkhorn_iterations=3, sinkhorn_epsilon=0.05, sinkhorn_gather_distributed=False):
        super().__init__()
        self.temperature = temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_gather_distributed = sinkhorn_gather_distributed

    def forward(self, high_resolution_outputs, low_resolution_outputs, queue_outputs=None):
        assigned = len(high_resolution_outputs)
        return swapped_prediction(
            [*high_resolution_outputs, *low_resolution_outputs],
            assign=tuple(range(assigned)),
            epsilon=self.sinkhorn_epsilon,
            iterations=self.sinkhorn_iterations,
            temperature=self.temperature,
            queue_scores=None if queue_outputs is None else queue_outputs[:assigned],
            group=_all_ranks(self.sinkhorn_gather_distributed),
        )

    def extra_repr(self):
        names = ("temperature", "sinkhorn_iterations", "sinkhorn_epsilon", "sinkhorn_gather_distributed")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _bank(size):
    """The Queue of a memory bank of lightly's size: None for 0 rows, else of (rows, width)."""
    rows, *width = (size,) if isinstance(size, int) else size
    if rows and len(width) != 1 or len(width) > 1:
        raise ValueError(f"NTXentLoss: memory_bank_size must be 0 or (rows, width of the embeddings); got {size}")
    return Queue(rows, *width) if rows else None


def _all_ranks(wanted):
    """The group of all ranks where it is wanted and there is one; else None, which means this process alone."""
    return dist.group.WORLD if wanted and dist.is_available() and dist.is_initialized() else None
