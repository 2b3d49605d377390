"""How are weights updated, and which part of a flat ZeRO partition belongs to which parameter?"""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fuseer.engine.config import OptimConfig


class Piece(NamedTuple):
    """`numel` elements of parameter `name`, from its flat offset `offset`, stand in the optimizer's tensor `holder` from `start`.

    Without ZeRO the holder is the parameter itself; under stages 1 and 2 it is this rank's fp32 partition of the group.
    """

    name: str
    parameter: nn.Parameter
    holder: torch.Tensor
    start: int
    offset: int
    numel: int

    def of(self, flat_like: torch.Tensor) -> torch.Tensor:
        """This piece of a tensor shaped like the holder (the weights, a momentum), as a flat view."""
        return flat_like.view(-1).narrow(0, self.start, self.numel)


class Tags:
    """Mix-in that has a torch optimizer honour parameter tags, each tagged parameter being a group of its own.

    `p.frozen = True`: the parameter stays exactly as it is, no decay, no momentum. `p.unit_rows = True`: after each applied update
    its rows (first dimension) are normalised to unit length. Under ZeRO 1 and 2 the fp32 partition is what is normalised, and rows
    that straddle ranks cost one all-reduce of as many floats as there are rows.
    """

    def bind(self, pieces: list[Piece], group: dist.ProcessGroup | None, partitioned: bool) -> None:
        """Learns the layout once DeepSpeed has made it, and creates all state now, so that none is missing from a checkpoint."""
        self.pieces, self.partitioned, self._group = pieces, partitioned, group
        self.pieces_of: dict[str, list[Piece]] = {}
        for piece in pieces:
            self.pieces_of.setdefault(piece.name, []).append(piece)
        for param_group in self.param_groups:
            for tensor in param_group["params"]:
                self.create_state(tensor, param_group)
        self.state_names = sorted({key for state in self.state.values() for key in state})

    @torch.no_grad()
    def step(self, closure=None):
        visible = self.param_groups
        self.param_groups = [group for group in visible if not getattr(group["tagged"], "frozen", False)]
        loss = super().step(closure)
        for group in self.param_groups:
            if getattr(group["tagged"], "unit_rows", False):
                self._normalise_rows(group)
        self.param_groups = visible
        return loss

    def _normalise_rows(self, group: dict) -> None:
        parameter = group["tagged"]
        if not self.partitioned:
            parameter.copy_(F.normalize(parameter.flatten(1), dim=1).view_as(parameter))
            return
        pieces = self.pieces_of.get(group["name"], [])
        rows, width = parameter.shape[0], parameter.numel() // parameter.shape[0]
        squares = torch.zeros(rows, dtype=torch.float32, device=parameter.device)
        row_of = [torch.arange(p.offset, p.offset + p.numel, device=parameter.device) // width for p in pieces]
        for piece, row in zip(pieces, row_of, strict=True):
            squares.index_add_(0, row, piece.of(piece.holder).float().square())
        dist.all_reduce(squares, group=self._group)
        scale = squares.sqrt_().clamp_min_(1e-12)
        for piece, row in zip(pieces, row_of, strict=True):
            piece.of(piece.holder).div_(scale[row])


class SGD(Tags, torch.optim.SGD):
    """torch's SGD with momentum, honouring tags."""

    def create_state(self, tensor: torch.Tensor, group: dict) -> None:
        if group["momentum"]:
            self.state[tensor].setdefault("momentum_buffer", torch.zeros_like(tensor))


class AdamW(Tags, torch.optim.AdamW):
    """torch's AdamW, honouring tags."""

    def create_state(self, tensor: torch.Tensor, group: dict) -> None:
        state = self.state[tensor]
        state.setdefault("step", torch.tensor(0.0))
        state.setdefault("exp_avg", torch.zeros_like(tensor))
        state.setdefault("exp_avg_sq", torch.zeros_like(tensor))


class LARC(Tags, torch.optim.SGD):
    """SGD whose gradients are rescaled per tensor: g ← trust·|p|/(|g| + wd·|p| + eps)·(g + wd·p); 1·g where |p| or |g| is 0.

    As SwAV and SEER use apex's LARC(clip=False): every parameter, biases and norms included. In a group with `adapt` False the factor
    is 1: g + wd·p. Norms are per tensor, so ZeRO must not have flattened the parameters. No host sync.
    Source: methods of facebookresearch/swav main_swav.py; NVIDIA apex LARC.
    """

    create_state = SGD.create_state

    def __init__(self, params, *, trust_coefficient: float, eps: float, weight_decay: float, **sgd):
        super().__init__([{"adapt": True, "decay": weight_decay, **group} for group in params], weight_decay=0.0, **sgd)
        self.trust_coefficient, self.eps = trust_coefficient, eps

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            live = [p for p in group["params"] if p.grad is not None]
            if live and not getattr(group["tagged"], "frozen", False):
                self._rescale(live, [p.grad for p in live], group["decay"], group["adapt"])
        return super().step(closure)

    def _rescale(self, live: list[torch.Tensor], grads: list[torch.Tensor], decay: float, adapt: bool) -> None:
        if not adapt:
            torch._foreach_add_(grads, live, alpha=decay)
            return
        p_norms = torch.stack(torch._foreach_norm(live))
        g_norms = torch.stack(torch._foreach_norm(grads))
        adapted = (p_norms > 0) & (g_norms > 0)
        rates = self.trust_coefficient * p_norms / (g_norms + decay * p_norms + self.eps)
        torch._foreach_add_(grads, torch._foreach_mul(live, (decay * adapted).unbind()))
        torch._foreach_mul_(grads, torch.where(adapted, rates, 1.0).unbind())


def build_optimizer(module: nn.Module, config: OptimConfig) -> SGD | AdamW | LARC:
    """The configured optimizer over groups {name, params, tagged}: one for all plain weights, a second one for the thin ones (at most
    one dimension) where the configuration treats these otherwise, and one for each tagged parameter, which ZeRO then keeps in a
    partition of its own."""
    plain, thin, tagged = [], [], []
    apart = {} if config.decays_thin else {"decay" if config.name == "larc" else "weight_decay": 0.0}
    apart |= {} if config.adapt_thin else {"adapt": False}
    for name, parameter in module.named_parameters():
        is_thin = parameter.ndim <= 1 and bool(apart)
        if hasattr(parameter, "unit_rows") or hasattr(parameter, "frozen"):
            tagged.append({"name": name, "params": [parameter], "tagged": parameter, **(apart if is_thin else {})})
        else:
            (thin if is_thin else plain).append(parameter)
    groups = [{"name": "weights", "params": plain, "tagged": None}]
    groups += [{"name": "norms and biases", "params": thin, "tagged": None, **apart}] if thin else []
    groups += tagged
    if config.name == "adamw":
        return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return LARC(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        trust_coefficient=config.trust_coefficient,
        eps=config.eps,
    )


def layout(module: nn.Module, zero_optimizer) -> list[Piece]:
    """Where every parameter's elements stand on this rank, after `deepspeed.initialize`; checked against the weights themselves.

    `zero_optimizer` is DeepSpeed's optimizer under stages 1 and 2, None without ZeRO. Raises RuntimeError when a piece does not hold
    the values of its parameter, which means that DeepSpeed's layout is not the one read here.
    """
    pieces = []
    for name, parameter in module.named_parameters():
        if zero_optimizer is None:
            pieces.append(Piece(name, parameter, parameter, 0, 0, parameter.numel()))
            continue
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        flat = zero_optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        hp, lp = mapping.hp_fragment_address, mapping.lp_fragment_address
        piece = Piece(name, parameter, flat, hp.start, lp.start, hp.numel)
        if not torch.equal(piece.of(flat), parameter.detach().flatten().narrow(0, lp.start, hp.numel).float()):
            raise RuntimeError(
                f"optim: ZeRO's partition does not hold {name} where its own map says; this DeepSpeed lays parameters out otherwise"
            )
        pieces.append(piece)
    return pieces
