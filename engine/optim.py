"""How are weights updated?"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fuseer.engine.config import OptimConfig
from fuseer.engine.partitions import Piece, shape_of
from fuseer.kernels.functional import lars_update_


class Tags:
    """Mix-in that has a torch optimizer honour parameter tags, each tagged parameter being a group of its own.

    `p.frozen = True`: the parameter stays exactly as it is, no decay, no momentum. `p.unit_rows = True`: after each applied update
    its rows (first dimension) are divided by their length, taken in float64, or by 1e-12 where that is less. Under ZeRO the fp32
    partition is what is normalised, and rows that straddle ranks cost one all-reduce of as many numbers as there are rows.
    Groups are {name, names, params, tagged}: `names` those of the parameters, also once ZeRO has put flat tensors in their place.

    A step changes nothing, neither weights nor state, while `skip` (None, or a scalar tensor on the device) is not 0; and without ZeRO,
    where DeepSpeed does not look, when a gradient is not finite or its norm is none in fp32. `thrown` is that flag of the last step, a
    bool scalar on the device; None where nobody would throw one away. The host reads it for SGD and AdamW on a CPU alone.
    """

    skip: torch.Tensor | None = None
    thrown: torch.Tensor | None = None

    def bind(self, pieces: list[Piece], group: dist.ProcessGroup | None, partitioned: bool) -> None:
        """Learns the layout once DeepSpeed has made it, and creates all state now, so that none is missing from a checkpoint."""
        self.pieces, self.partitioned, self._group = pieces, partitioned, group
        self.pieces_of: dict[str, list[Piece]] = {}
        group_of = {name: param_group for param_group in self.param_groups for name in param_group["names"]}
        for piece in pieces:
            self.pieces_of.setdefault(piece.name, []).append(piece)
            self.create_state(piece.holder, group_of[piece.name])
        # stages 1, 2: a partition that holds no piece here has state as well; stage 3 shows its tensors only during a step
        for param_group in self.param_groups:
            for tensor in param_group["params"]:
                self.create_state(tensor, param_group)

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure and torch.enable_grad()(closure)()
        visible = self.param_groups
        # ZeRO 3 shows one sub-group a call, and the other groups empty
        self.param_groups = [group for group in visible if group["params"] and not getattr(group["tagged"], "frozen", False)]
        self.thrown = self._flag()
        self._update()
        for group in self.param_groups:
            if getattr(group["tagged"], "unit_rows", False):
                self._normalise_rows(*group["names"], group["tagged"])
        self.param_groups = visible
        return loss

    def _flag(self) -> torch.Tensor | None:
        """Whether this step is thrown away, as a scalar on the device; None where nobody would."""
        flag = None if self.skip is None else (self.skip != 0).squeeze()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.partitioned or not grads:
            return flag
        infinite = torch.stack(torch._foreach_norm(grads)).isfinite().logical_not_().any()
        return infinite if flag is None else infinite.logical_or_(flag)

    def _update(self) -> None:
        if self.defaults["fused"]:
            # where torch's fused updates look for what its gradient scaler found
            self.found_inf = None if self.thrown is None else self.thrown.float()
        elif self.thrown is not None and self.thrown:
            return
        super().step()

    def _normalise_rows(self, name: str, parameter: nn.Parameter) -> None:
        rows, width = shape_of(parameter)[0], shape_of(parameter)[1:].numel()
        norms = torch.zeros(rows, dtype=torch.float64, device=parameter.device)
        places = []
        for piece in self.pieces_of.get(name, []):
            row, lead = divmod(piece.offset, width)
            part = F.pad(piece.of(piece.holder).double(), (lead, -(lead + piece.numel) % width)).view(-1, width)
            norms[row : row + len(part)] += part.square().sum(1)
            places.append((piece, slice(row, row + len(part)), lead))
        if self.partitioned:
            dist.all_reduce(norms, group=self._group)
        norms = norms.sqrt_().clamp_min_(1e-12)
        if self.thrown is not None:
            norms = torch.where(self.thrown, 1.0, norms)
        for piece, here, lead in places:
            lengths = norms[here, None].expand(-1, width).flatten().narrow(0, lead, piece.numel)
            piece.of(piece.holder).div_(lengths.to(piece.holder.dtype))


class SGD(Tags, torch.optim.SGD):
    """torch's SGD with momentum, honouring tags."""

    @property
    def state_names(self) -> list[str]:
        return ["momentum_buffer"] if self.defaults["momentum"] else []

    def create_state(self, tensor: torch.Tensor, group: dict) -> None:
        for name in self.state_names:
            self.state[tensor].setdefault(name, torch.zeros_like(tensor))


class AdamW(Tags, torch.optim.AdamW):
    """torch's AdamW, honouring tags."""

    state_names = ["exp_avg", "exp_avg_sq", "step"]

    def create_state(self, tensor: torch.Tensor, group: dict) -> None:
        state = self.state[tensor]
        state.setdefault("step", torch.zeros((), device=tensor.device))
        state.setdefault("exp_avg", torch.zeros_like(tensor))
        state.setdefault("exp_avg_sq", torch.zeros_like(tensor))


class Variant(NamedTuple):
    """One published LARS. `spares(name, parameter, owner)`: is a parameter neither decayed nor adapted? `owner` is its module."""

    denominator: str
    eps: float
    lr_in_momentum: bool
    spares: Callable[[str, nn.Parameter, nn.Module], bool]


def _is_bias_or_norm(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    return name.endswith("bias") or "Norm" in type(owner).__name__


VARIANTS = {
    "larc": Variant("sum", 1e-8, False, lambda name, parameter, owner: False),
    "mocov3": Variant("norm_of_sum", 0.0, False, lambda name, parameter, owner: parameter.ndim <= 1),
    "simclr": Variant("norm_of_sum", 0.0, True, _is_bias_or_norm),
    "byol": Variant("norm_of_sum", 0.0, False, _is_bias_or_norm),
    "paws": Variant("sum", 1e-8, True, lambda name, parameter, owner: "bias" in name or "bn" in name),
}


class LARS(Tags, torch.optim.Optimizer):
    """SGD with momentum whose gradients are rescaled layer by layer (`fuseer.kernels.functional.lars_update_`), exact under ZeRO 0 to 3.

    `variant` is one of the published five, which differ in the ratio, in where lr enters and in which parameters they spare:

        larc    trust |w| / (|g| + wd |w| + 1e-8)   lr outside the momentum   spares none                       apex LARC: SwAV, SEER
        mocov3  trust |w| / |g + wd w|              outside                   at most one dimension             MoCo v3, MAE
        simclr  trust |w| / |g + wd w|              inside                    biases and norms                  SimCLR
        byol    trust |w| / |g + wd w|              outside                   biases and norms                  BYOL
        paws    trust |w| / (|g| + wd |w| + 1e-8)   inside                    names with "bias" or "bn" in them PAWS

    A spared parameter (group with `adapt` False) is neither decayed nor adapted. A layer is a whole parameter, in whatever pieces ZeRO
    keeps it: each call of step() costs one all-reduce of 3 float64 a layer of the groups it was shown, and none where these are not
    adapted. A parameter without gradient is left alone, but DeepSpeed gives what no forward used gradient 0: mocov3, simclr and byol then
    still shrink it, by lr · trust of its length.
    Momenta have the dtype of the weights.
    Raises ValueError for an unknown variant. Sources: NVIDIA apex LARC; moco-v3 optimizer.py; simclr lars_optimizer.py; byol
    optimizers.py; suncet lars.py.
    """

    state_names = ["momentum_buffer"]

    def __init__(self, params, *, lr: float, momentum: float, weight_decay: float, trust_coefficient: float, variant: str = "larc"):
        if variant not in VARIANTS:
            raise ValueError(f"LARS: variant must be one of {', '.join(VARIANTS)}; got {variant!r}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "adapt": True})
        self.trust_coefficient, self.variant = trust_coefficient, VARIANTS[variant]

    def create_state(self, tensor: torch.Tensor, group: dict) -> None:
        if "momentum_buffer" not in self.state[tensor]:
            self.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)

    def bind(self, pieces: list[Piece], group: dist.ProcessGroup | None, partitioned: bool) -> None:
        super().bind(pieces, group, partitioned)
        layer_of = {name: layer for param_group in self.param_groups for layer, name in enumerate(param_group["names"])}
        rows: dict[torch.Tensor, list] = {}
        for piece in pieces:
            rows.setdefault(piece.holder, []).append((0, piece.start, piece.numel, layer_of[piece.name]))
        self._segments = {flat: torch.tensor(table, dtype=torch.int64) for flat, table in rows.items()}

    def _update(self) -> None:
        for group in self.param_groups:
            live = [tensor for tensor in group["params"] if tensor.grad is not None]
            # ZeRO hands over one flat tensor a group, whose layers are spread over ranks: no rank may stay away
            for tensors in [[flat] for flat in live] if self.partitioned else [live]:
                self._update_layers(tensors, group)

    def _update_layers(self, tensors: list[torch.Tensor], group: dict) -> None:
        segments, layers = None, len(tensors)
        if self.partitioned:
            segments, layers = self._segments.get(tensors[0], torch.empty(0, 4, dtype=torch.int64)), len(group["names"])
            self.create_state(tensors[0], group)
        lars_update_(
            tensors,
            [tensor.grad for tensor in tensors],
            [self.state[tensor]["momentum_buffer"] for tensor in tensors],
            lr=group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            trust_coefficient=self.trust_coefficient,
            eps=self.variant.eps,
            denominator=self.variant.denominator,
            adapt=[group["adapt"]] * layers,
            lr_in_momentum=self.variant.lr_in_momentum,
            skip=self.thrown,
            segments=segments,
            group=self._group if self.partitioned and group["adapt"] else None,
        )


def build_optimizer(module: nn.Module, config: OptimConfig) -> SGD | AdamW | LARS:
    """The configured optimizer over groups {name, names, params, tagged}: one for all plain weights, a second one for the parameters
    that the configuration treats otherwise, and one for each tagged parameter, which ZeRO then keeps in a partition of its own."""
    plain, spared, tagged = {}, {}, []
    apart = {"weight_decay": 0.0, **({"adapt": False} if config.name == "lars" else {})}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_spared = _is_spared(name, parameter, module, config)
        if hasattr(parameter, "unit_rows") or hasattr(parameter, "frozen"):
            tagged.append({"name": name, "names": [name], "params": [parameter], "tagged": parameter, **(apart if is_spared else {})})
        else:
            (spared if is_spared else plain)[name] = parameter
    groups = [
        {"name": title, "names": list(members), "params": list(members.values()), "tagged": None, **options}
        for title, members, options in (("weights", plain, {}), ("norms and biases", spared, apart))
        if members
    ] + tagged
    # on a CPU a fused update rounds the last elements of a tensor otherwise, so that ZeRO's flat ones would end in other bits
    fused = any(parameter.is_cuda for parameter in module.parameters()) or None
    if config.name == "adamw":
        return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused)
    inertia = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    if config.name == "sgd":
        return SGD(groups, **inertia, fused=fused)
    return LARS(groups, **inertia, trust_coefficient=config.trust_coefficient, variant=config.variant)


def _is_spared(name: str, parameter: nn.Parameter, module: nn.Module, config: OptimConfig) -> bool:
    if config.name == "lars":
        return VARIANTS[config.variant].spares(name, parameter, module.get_submodule(name.rpartition(".")[0]))
    return parameter.ndim <= 1 and not config.decays_thin
