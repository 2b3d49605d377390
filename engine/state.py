"""What is the state of a run, which elements of it does this rank hold, and how are they taken back?"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from fuseer.engine.distributed import Ranks
from fuseer.engine.partitions import Piece, shape_of
from fuseer.engine.shards import Part, Shards, share, whole

# the kinds of state, as the file of a process alone is called
MODEL, OPTIMIZER, TEACHER, RNG = "model.safetensors", "optimizer.safetensors", "teacher.safetensors", "rng.safetensors"
# elements of small buffers that are reduced at once: 16 MiB in fp32
REDUCED = 2**22


class Kept(NamedTuple):
    """A module, where this rank holds the fp32 numbers of its parameters, and its buffers that differ between ranks by design."""

    module: nn.Module
    pieces_of: dict[str, list[Piece]]
    partitioned: bool
    sharded: dict[str, int]

    @property
    def parameters(self) -> dict[str, tuple[str, nn.Parameter]]:
        """Parameters under every name that they have, each with the first one, by which layouts call it."""
        first = {parameter: name for name, parameter in self.module.named_parameters()}
        return {name: (first[parameter], parameter) for name, parameter in self.module.named_parameters(remove_duplicate=False)}


def kept_modules(method: nn.Module, optimizer, teachers) -> dict[str, Kept]:
    kept = {MODEL: Kept(method, optimizer.pieces_of, optimizer.partitioned, method.sharded)}
    if teachers is not None and teachers.state_dict():
        kept[TEACHER] = Kept(teachers, teachers.pieces_of, teachers.partitioned, {})
    return kept


@torch.no_grad()
def parts(method: nn.Module, optimizer, teachers, ranks: Ranks) -> dict[str, list[Part]]:
    """{kind: what this rank writes of it}; every rank must call.

    Parameters and optimizer state are taken in at least fp32 from where the optimizer keeps them, each rank its own pieces; of what
    all ranks have alike, each an equal share. Float buffers are written once, as their mean where ranks hold them differently; these
    ranks then write their own too, beside their generators, so that a run on as many ranks goes on bitwise. Buffers in `method.sharded`
    are joined in rank order. No rank gathers weights.
    """
    found, own = {}, _generators(ranks)
    for kind, kept in kept_modules(method, optimizer, teachers).items():
        alike, apart = _module_parts(kept, ranks)
        means, differing = _means({name: value for name, value in alike.items() if isinstance(value, torch.Tensor)}, ranks)
        whole_parts = [whole(name, means[name]) if name in means else value for name, value in alike.items()]
        found[kind] = apart + share(whole_parts, ranks.rank, ranks.world_size)
        own += [whole(_own_name(kind, name, ranks), alike[name]) for name in differing]
    found[OPTIMIZER] = list(_optimizer_parts(method, optimizer, ranks))
    found[RNG] = own
    return found


def _module_parts(kept: Kept, ranks: Ranks) -> tuple[dict[str, Part | torch.Tensor], list[Part]]:
    """What all ranks have, parameters as parts and float buffers as they are, and what this one writes by itself."""
    parameters, alike, apart = kept.parameters, {}, []
    somewhere = _held_somewhere(kept, ranks)
    for name, tensor in kept.module.state_dict().items():
        if name in parameters:
            first, parameter = parameters[name]
            dtype, shape = _wide(parameter.dtype), tuple(shape_of(parameter))
            pieces = kept.pieces_of.get(first, [])
            if first in somewhere:
                apart += [Part(name, dtype, shape, piece.offset, piece.holder, piece.start, piece.numel) for piece in pieces]
            elif hasattr(parameter, "ds_tensor"):
                begin, shard = _shard(parameter)
                if shard.numel():
                    apart.append(Part(name, dtype, shape, begin, shard, 0, shard.numel()))
            else:
                alike[name] = whole(name, pieces[0].holder.view(shape) if pieces else parameter, dtype)
        elif name in kept.sharded:
            apart += _rows(name, tensor, kept.sharded[name], ranks)
        elif tensor.is_floating_point():
            alike[name] = tensor
        elif ranks.is_first:
            apart.append(whole(name, tensor))
    return alike, apart


def _held_somewhere(kept: Kept, ranks: Ranks) -> set[str]:
    """Parameters of which ZeRO has cut pieces, be they on this rank or on others."""
    if not kept.partitioned:
        return set()
    parameters = dict(kept.module.named_parameters())
    held = torch.tensor([name in kept.pieces_of for name in parameters], dtype=torch.int32, device=ranks.device)
    if ranks.group is not None:
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return {name for name, is_held in zip(parameters, held.tolist(), strict=True) if is_held}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _shard(parameter: nn.Parameter) -> tuple[int, torch.Tensor]:
    """Where this rank's shard of a parameter under ZeRO 3 begins, and the shard without its padding."""
    begin = min(parameter.ds_tensor.numel() * parameter.ds_zero_partition_rank, parameter.ds_numel)
    return begin, parameter.ds_tensor.narrow(0, 0, min(parameter.ds_tensor.numel(), parameter.ds_numel - begin))


def _runs(tensor: torch.Tensor, dim: int, total: int, rank: int) -> Iterator[tuple[int, int, int]]:
    """(offset in the joined tensor, start in this one, length) of the runs that a rank's rows make, joined to `total` along `dim`."""
    length = tensor.shape[dim:].numel()
    stride = length // tensor.shape[dim] * total if tensor.shape[dim] else 0
    for at in range(tensor.shape[:dim].numel()):
        yield at * stride + rank * length, at * length, length


def _rows(name: str, tensor: torch.Tensor, dim: int, ranks: Ranks) -> list[Part]:
    shape = list(tensor.shape)
    shape[dim] *= ranks.world_size
    if not tensor.numel():
        return [Part(name, tensor.dtype, tuple(shape), 0, tensor, 0, 0)] * ranks.is_first
    if ranks.world_size == 1:
        return [whole(name, tensor)]
    return [Part(name, tensor.dtype, tuple(shape), *run[:1], tensor, *run[1:]) for run in _runs(tensor, dim, shape[dim], ranks.rank)]


def _means(buffers: dict[str, torch.Tensor], ranks: Ranks) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The mean over ranks of every buffer, an element that is equal everywhere as it is, and which buffers are not equal everywhere."""
    means, differing = dict(buffers), []
    if ranks.group is None:
        return means, differing
    for names in _in_batches(buffers):
        sizes = [buffers[name].numel() for name in names]
        flat = torch.cat([buffers[name].reshape(-1) for name in names]).to(ranks.device)
        low, high = flat.clone(), flat.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        # of three equal numbers the mean need not be the number
        alike = low == high
        found = [name for name, same in zip(names, alike.split(sizes), strict=True) if not same.all()]
        if found:
            total = flat.clone()
            dist.all_reduce(total)
            mean = torch.where(alike, flat, total / ranks.world_size).split(sizes)
            means |= {name: value.view(buffers[name].shape) for name, value in zip(names, mean, strict=True)}
            differing += found
    return means, differing


def _in_batches(buffers: dict[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names of successive buffers of one dtype, REDUCED elements at a time: a network has hundreds of small ones."""
    names, room = [], REDUCED
    for name, buffer in buffers.items():
        if names and (buffer.numel() > room or buffer.dtype != buffers[names[0]].dtype):
            yield names
            names, room = [], REDUCED
        names.append(name)
        room -= buffer.numel()
    if names:
        yield names


def _own_name(kind: str, name: str, ranks: Ranks) -> str:
    return f"{kind.partition('.')[0]}/{name}.{ranks.rank}"


def _generators(ranks: Ranks) -> list[Part]:
    found = [whole(f"cpu.{ranks.rank}", torch.get_rng_state())]
    if ranks.device.type == "cuda":
        found.append(whole(f"cuda.{ranks.rank}", torch.cuda.get_rng_state()))
    return found


def _optimizer_parts(method: nn.Module, optimizer, ranks: Ranks) -> Iterable[Part]:
    """State of what is trained, as {state/parameter}; counts are scalars of whoever holds the parameter's beginning."""
    apart, alike = [], []
    for name, parameter in method.named_parameters():
        dtype, shape = _wide(parameter.dtype), tuple(shape_of(parameter))
        for piece in optimizer.pieces_of.get(name, []):
            for key in optimizer.state_names:
                state = optimizer.state[piece.holder][key]
                if key == "step":
                    if piece.offset == 0 and (optimizer.partitioned or ranks.is_first):
                        apart.append(whole(f"step/{name}", state, torch.float32))
                elif optimizer.partitioned:
                    apart.append(Part(f"{key}/{name}", dtype, shape, piece.offset, state, piece.start, piece.numel))
                else:
                    alike.append(whole(f"{key}/{name}", state.view(shape), dtype))
    return apart + share(alike, ranks.rank, ranks.world_size)


def compare(saved: dict[str, list[int]], kept: Kept, place: Path, ranks: Ranks) -> None:
    """Raises ValueError where saved names and shapes are not those of the module."""
    parameters = kept.parameters
    own = {
        name: list(shape_of(parameters[name][1]) if name in parameters else tensor.shape)
        for name, tensor in kept.module.state_dict().items()
    }
    strange, missing = sorted(saved.keys() - own.keys()), sorted(own.keys() - saved.keys())
    if strange or missing:
        raise ValueError(f"checkpoint: {place} is of another model; it lacks {missing[:3]} and has {strange[:3]} besides")
    for name in sorted(saved):
        there, here = list(saved[name]), list(own[name])
        if name in kept.sharded:
            dim = kept.sharded[name]
            rows, wanted = there.pop(dim), here.pop(dim) * ranks.world_size
            if rows < wanted:
                raise ValueError(f"checkpoint: {name} has {rows} rows, {wanted} are wanted; keep its length when resuming")
        if there != here:
            raise ValueError(f"checkpoint: {name} is {saved[name]} in {place} and {own[name]} in this model")


def compare_teachers(saved: dict[str, list[int]] | None, kept: Kept | None, place: Path, ranks: Ranks) -> None:
    if (saved is None) != (kept is None):
        names = ", ".join(sorted({name.partition(".")[0] for name in (kept.module.state_dict() if saved is None else saved)}))
        has, wants = ("a teacher", "none") if saved is not None else ("no teacher", "one")
        raise ValueError(f"checkpoint: {place} holds {has} and this method has {wants} ({names}); keep the method, or start anew")
    if saved is not None:
        compare(saved, kept, place, ranks)


def compare_optimizer(saved: dict[str, list[int]], optimizer, place: Path) -> None:
    kinds = sorted({name.partition("/")[0] for name in saved})
    if kinds != optimizer.state_names:
        raise ValueError(
            f"checkpoint: {place} holds the optimizer state {kinds}, this optimizer has {optimizer.state_names}; keep optim.name"
        )
    missing = sorted({f"{key}/{name}" for name in optimizer.pieces_of for key in optimizer.state_names} - saved.keys())
    if missing:
        raise ValueError(f"checkpoint: {place} was trained with other parameters frozen; it lacks {missing[:3]}; keep what is frozen")


@torch.no_grad()
def take_module(shards: Shards, kind: str, kept: Kept, ranks: Ranks, own: Shards | None) -> None:
    """Weights where the optimizer (or a teacher) keeps them and where they run, and buffers.

    `own` holds what ranks wrote for themselves, where there are as many of them as then. One tensor at a time is in memory.
    """
    parameters, rows = kept.parameters, shards.shapes()
    own_names = own.shapes() if own is not None else {}
    for name, tensor in kept.module.state_dict().items():
        if name in parameters:
            first, parameter = parameters[name]
            for piece in kept.pieces_of.get(first, []):
                if piece.holder is not parameter:
                    shards.fill(piece.of(piece.holder), name, piece.offset)
            if hasattr(parameter, "ds_tensor"):
                begin, shard = _shard(parameter)
                shards.fill(shard, name, begin)
            # under ZeRO 3 small parameters are whole beside their shards, all others empty
            if list(parameter.shape) == rows[name]:
                parameter.copy_(shards.whole(name))
        elif name in kept.sharded:
            dim, flat = kept.sharded[name], torch.empty_like(tensor, memory_format=torch.contiguous_format).view(-1)
            for offset, start, length in _runs(tensor, dim, rows[name][dim], ranks.rank):
                shards.fill(flat.narrow(0, start, length), name, offset)
            tensor.copy_(flat.view(tensor.shape))
        elif _own_name(kind, name, ranks) in own_names:
            tensor.copy_(own.whole(_own_name(kind, name, ranks)))
        else:
            tensor.copy_(shards.whole(name))


@torch.no_grad()
def take_optimizer(shards: Shards, method: nn.Module, optimizer) -> None:
    shapes = shards.shapes()
    for name, _ in method.named_parameters():
        for piece in optimizer.pieces_of.get(name, []):
            for key in optimizer.state_names:
                state = optimizer.state[piece.holder][key]
                if list(state.shape) == shapes[f"{key}/{name}"]:
                    state.copy_(shards.whole(f"{key}/{name}"))
                else:
                    shards.fill(piece.of(state), f"{key}/{name}", piece.offset)


def take_generators(own: Shards, ranks: Ranks) -> None:
    """The state of this rank's generators. A checkpoint of a CPU run has none for a GPU, and there they go on as they are."""
    names = own.shapes()
    torch.set_rng_state(own.whole(f"cpu.{ranks.rank}").clone())
    if ranks.device.type == "cuda" and f"cuda.{ranks.rank}" in names:
        torch.cuda.set_rng_state(own.whole(f"cuda.{ranks.rank}").clone())
