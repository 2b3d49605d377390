"""Which part of a flat ZeRO partition belongs to which parameter?"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn


class Piece(NamedTuple):
    """`numel` elements of parameter `name`, from its flat offset `offset`, stand in the optimizer's tensor `holder` from `start`.

    Without ZeRO the holder is the parameter itself, or its fp32 master where weights are half; under stages 1 and 2 it is this rank's fp32
    partition of the group, under stage 3 the fp32 shards of the sub-group's parameters in a row. Under stage 3 the parameter itself is
    empty outside a forward: ask `shape_of`.
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


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's shape, also where ZeRO 3 has left an empty tensor in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager:
    """Inside, parameters that ZeRO 3 keeps in shards are whole on every rank, to be read; every rank must enter. Else nothing happens."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def layout(module: nn.Module, wrapper) -> list[Piece]:
    """Where every parameter's elements stand on this rank, after `deepspeed.initialize`; checked against the weights themselves.

    `wrapper` is DeepSpeed's optimizer around ours, None where there is none: in fp32 without ZeRO. Every rank must call: the pieces of
    all ranks must have as many elements as the parameters that are trained. Raises RuntimeError, on all ranks, when they have not or when
    a piece does not hold the values of its parameter, which means that DeepSpeed's layout is not the one read here.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if wrapper is None:
        return [Piece(name, parameter, parameter, 0, 0, parameter.numel()) for name, parameter in named]
    if hasattr(wrapper, "fp16_groups") and hasattr(wrapper, "fp32_groups"):
        return _masters(named, wrapper)
    _refuse(wrapper)
    find = _shard if hasattr(wrapper, "grad_position") else _fragment
    found = [find(name, parameter, wrapper) for name, parameter in named]
    pieces = [piece for piece in found if piece is not None and piece.numel]
    _check(named, {piece.name: piece for piece in pieces}, wrapper.dp_process_group)
    return pieces


def forget_gradients(zero_optimizer) -> None:
    """Zeroes the gradients that ZeRO 3 keeps of the step before, for which it writes 4 bytes an element of the shards.

    DeepSpeed 0.19.8 does not: a parameter that a forward used in one step and none in the next would be given the old gradient again,
    that of a step thrown away included, and with accumulation the new one would be added to it. Elsewhere nothing happens.
    """
    kept = getattr(zero_optimizer, "grad_partitions_flat_buffer", None)
    if kept is not None:
        kept.zero_()


def _masters(named: list[tuple[str, nn.Parameter]], wrapper) -> list[Piece]:
    """Stage 0 with half weights: an fp32 copy of every parameter, whole, on each rank."""
    pairs = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    master_of = {half: master for halves, masters in pairs for half, master in zip(halves, masters, strict=True)}
    pieces = [Piece(name, parameter, master_of[parameter], 0, 0, parameter.numel()) for name, parameter in named]
    _check(named, {piece.name: piece for piece in pieces}, None)
    return pieces


def _fragment(name: str, parameter: nn.Parameter, zero_optimizer) -> Piece | None:
    """Stages 1, 2: the group's parameters in a row are cut in one part a rank; a parameter may lie in several, or not in this one."""
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flat = _flat_partitions(zero_optimizer)[mapping.param_group_index]
    hp, lp = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Piece(name, parameter, flat, hp.start, lp.start, hp.numel)


def _flat_partitions(zero_optimizer) -> list[torch.Tensor] | None:
    """This rank's fp32 partition of every group; its second name is that of the stage 1 that sums bf16 gradients in fp32."""
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return next((getattr(zero_optimizer, name) for name in names if hasattr(zero_optimizer, name)), None)


def _shard(name: str, parameter: nn.Parameter, zero_optimizer) -> Piece:
    """Stage 3: every parameter is cut in one shard of equal length a rank; the last ones end in padding that holds anything."""
    sub_group, start, length = zero_optimizer.grad_position[zero_optimizer.get_param_id(parameter)]
    offset = length * dist.get_rank(parameter.ds_process_group)
    valid = min(max(parameter.ds_numel - offset, 0), length)
    return Piece(name, parameter, zero_optimizer.fp32_partitioned_groups_flat[sub_group], start, offset, valid)


def _refuse(zero_optimizer) -> None:
    """Names what cannot be mapped, where a value check would only say that something is wrong."""
    has = {name: getattr(zero_optimizer, name, False) for name in ("round_robin_gradients", "offload_optimizer", "swap_optimizer")}
    refused = {
        "round_robin_gradients=true": has["round_robin_gradients"],
        "offload_optimizer.ratio below 1": has["offload_optimizer"] and zero_optimizer.partial_offload != 1.0,
        "offload_optimizer.device=nvme": has["swap_optimizer"],
        type(zero_optimizer).__name__: not hasattr(zero_optimizer, "grad_position") and _flat_partitions(zero_optimizer) is None,
    }
    for option, given in refused.items():
        if given:
            raise RuntimeError(f"partitions: DeepSpeed must not run with {option}: where its weights stand cannot be told; leave it out")


def _holds(piece: Piece) -> bool:
    """Does the holder have the parameter's values there? Never raises: a rank that leaves alone keeps the others waiting."""
    flat = piece.parameter.detach().flatten()[piece.offset : piece.offset + piece.numel]
    return torch.equal(piece.holder.detach().view(-1)[piece.start : piece.start + piece.numel], flat.to(piece.holder.dtype))


def _check(named: list[tuple[str, nn.Parameter]], pieces: dict[str, Piece], group: dist.ProcessGroup | None) -> None:
    """Compares every piece with its parameter, and the length of all ranks' pieces with the parameters'; all ranks of `group` agree on
    the outcome, None where each holds the whole."""
    wrong, total = [], 0
    for name, parameter in named:
        total += shape_of(parameter).numel()
        # one parameter at a time is whole: the model itself may not fit
        with gathered([parameter]):
            if name in pieces and not _holds(pieces[name]):
                wrong.append(name)
    device = named[0][1].device if named else torch.device("cpu")
    counts = torch.tensor([len(wrong), sum(piece.numel for piece in pieces.values())], dtype=torch.int64, device=device)
    if group is not None:
        dist.all_reduce(counts, group=group)
    mistaken, held = counts.tolist()
    if mistaken or held != total:
        raise RuntimeError(
            f"partitions: DeepSpeed's fp32 weights are not laid out as read here: {mistaken} pieces"
            f"{f', {wrong[0]} among them,' if wrong else ''} do not hold their parameter's values and {held} of {total} elements are held; "
            "this DeepSpeed differs from 0.19.8, train with zero_stage=0 and precision=fp32 or bf16-autocast"
        )
