"""Which modules hold what the ops need between calls, and which replace lightly's losses and apex's LARC by changing one import?"""

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


class LARC(torch.optim.Optimizer):
    """`optimizer` with every gradient g of a layer w replaced, before its step, by r (g + weight_decay w): apex.parallel.LARC, as it was.

        r = trust_coefficient |w| / (|g| + weight_decay |w| + eps), with `clip` min(r / lr, 1)

    Where |w| or |g| is 0 the gradient stays as it is. weight_decay and lr are those of the parameter's group; the inner optimizer
    decays nothing in that step, and has its groups' decay back afterwards. param_groups, state, defaults, state_dict, load_state_dict,
    zero_grad, add_param_group, __getstate__ and any other attribute are the inner optimizer's own; learning-rate schedulers take the
    wrapper or what it wraps. step(closure) scales what each call of the closure left, and returns what the inner step returns.
    Every parameter is adapted, biases and norms too; each tensor is a layer, so sharded parameters need `lars_update_` instead. No
    tensor is asked for by the host. The norms are taken here and not by `lars_update_`, which would make the step itself.
    Unlike apex's: a step may have a closure, schedulers take it, pickle and copy keep it, and a group that maximizes is refused.
    Raises TypeError for what is no optimizer; ValueError for coefficients and, at the step, for groups with maximize=True.
    Source: You et al. 2017; NVIDIA apex, apex/parallel/LARC.py, removed since.
    """

    # a GradScaler unscales before the step: a fused inner optimizer would do it after our scaling
    _step_supports_amp_scaling = False

    def __init__(self, optimizer, trust_coefficient=0.02, clip=True, eps=1e-8):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"LARC: optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
        checks.positive("LARC", "trust_coefficient", trust_coefficient)
        checks.not_negative("LARC", "eps", eps)
        self.optim = optimizer
        self.trust_coefficient = trust_coefficient
        self.eps = eps
        self.clip = clip

    def step(self, closure=None):
        if any(group.get("maximize") for group in self.param_groups):
            raise ValueError("LARC: no group may maximize, for its decay would grow the weights; got maximize=True; negate the loss")
        decays = [group.get("weight_decay", 0) for group in self.param_groups]
        for group in self.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = 0
        try:
            if closure is None:
                self._scale(decays)
                return self.optim.step()
            return self.optim.step(lambda: self._evaluated(closure, decays))
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                if "weight_decay" in group:
                    group["weight_decay"] = decay

    def _evaluated(self, closure, decays):
        loss = closure()
        self._scale(decays)
        return loss

    @torch.no_grad()
    def _scale(self, decays):
        for group, decay in zip(self.param_groups, decays, strict=True):
            alike = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.device, p.dtype, p.grad.dtype), []).append(p)
            for params in alike.values():
                self._scale_alike(params, [p.grad for p in params], group["lr"], decay)

    def _scale_alike(self, params, grads, lr, decay):
        """Of tensors of one device and dtype, in a few multi-tensor operators."""
        dtype = dispatch.compute_dtype(params[0].dtype)
        w, g = (torch.stack(torch._foreach_norm(tensors, 2, dtype)) for tensors in (params, grads))
        ratios = self.trust_coefficient * w / (g + decay * w + self.eps)
        if self.clip:
            ratios = (ratios / lr).clamp_max(1.0)
        if decay:
            torch._foreach_add_(grads, params, alpha=decay)
        # a gradient of zeros stays one, decay or not; where the weights are zeros there was nothing to add
        ratios = torch.where(g == 0, 0.0, torch.where(w == 0, 1.0, ratios))
        torch._foreach_mul_(grads, list(ratios.unbind()))

    param_groups = property(lambda self: self.optim.param_groups, lambda self, groups: setattr(self.optim, "param_groups", groups))
    state = property(lambda self: self.optim.state, lambda self, state: setattr(self.optim, "state", state))

    def __getattr__(self, name):
        if name == "optim":
            raise AttributeError(name)
        return getattr(self.optim, name)

    def state_dict(self):
        return self.optim.state_dict()

    def load_state_dict(self, state_dict):
        self.optim.load_state_dict(state_dict)

    def zero_grad(self, *args, **kwargs):
        self.optim.zero_grad(*args, **kwargs)

    def add_param_group(self, param_group):
        self.optim.add_param_group(param_group)

    def __getstate__(self):
        return self.optim.__getstate__()

    def __setstate__(self, state):
        self.optim.__setstate__(state)

    def __reduce__(self):
        return LARC, (self.optim, self.trust_coefficient, self.clip, self.eps)

    def __repr__(self):
        return repr(self.optim)


def _bank(size):
    """The Queue of a memory bank of lightly's size: None for 0 rows, else of (rows, width)."""
    rows, *width = (size,) if isinstance(size, int) else size
    if rows and len(width) != 1 or len(width) > 1:
        raise ValueError(f"NTXentLoss: memory_bank_size must be 0 or (rows, width of the embeddings); got {size}")
    return Queue(rows, *width) if rows else None


def _all_ranks(wanted):
    """The group of all ranks where it is wanted and there is one; else None, which means this process alone."""
    return dist.group.WORLD if wanted and dist.is_available() and dist.is_initialized() else None
