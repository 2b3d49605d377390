"""How does a run survive: what is saved, in which files, and how is it taken back?

A checkpoint is a folder `ckpt/step_00001200/` of safetensors and JSON, keyed by parameter name, so that any ZeRO stage and number of
ranks can load it, and loading never executes code. It is written beside its place and renamed when complete.
"""

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn

from fuseer.engine import tensor_file
from fuseer.engine.distributed import Ranks
from fuseer.engine.partitions import Piece, shape_of
from fuseer.engine.tensor_file import Entry

FORMAT = 2
MODEL, OPTIMIZER, TEACHER, RNG = "model.safetensors", "optimizer.safetensors", "teacher.safetensors", "rng.safetensors"
INTEGERS = {4: torch.int32, 8: torch.int64}


class _Kept(NamedTuple):
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


def save(folder: Path, step: int, *, method: nn.Module, optimizer, ranks: Ranks, meta: dict, keep: int, teachers=None) -> Path:
    """Writes checkpoint `step` below `folder`; every rank must call.

    Parameters and optimizer state are gathered by name to rank 0, tensor by tensor, and written as they come: fp32, from the optimizer's
    own copy where the weights are half precision or, under ZeRO 3, in shards. BatchNorm statistics that ranks hold differently are saved
    as their mean; buffers named in `method.sharded` are joined in rank order. `teachers` get a file of their own where there are any.
    meta.json tells which rank held what. The newest `keep` checkpoints stay. Raises RuntimeError where the ranks' pieces of a parameter
    are not the parameter.
    """
    kept = _kept(method, optimizer, teachers)
    segments = {name: _segments(part, ranks) for name, part in kept.items()}
    contents = {name: (_entries(part, ranks), _whole_model(part, segments[name], ranks)) for name, part in kept.items()}
    contents[OPTIMIZER] = (_state_entries(method, optimizer), _whole_states(method, optimizer))
    random = _gather_rng(ranks)
    contents[RNG] = ([Entry(name, row.dtype, row.shape) for name, row in random.items()], iter(random.values()))
    place, part = folder / f"step_{step:08d}", folder / f".part_{step:08d}"
    if ranks.is_first:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    for name, (entries, tensors) in contents.items():
        if ranks.is_first:
            tensor_file.write(part / name, entries, tensors)
            _flush(part / name)
        else:
            deque(tensors, maxlen=0)  # takes part in gathering
    if ranks.is_first:
        files = {name: {"bytes": (part / name).stat().st_size, "sha256": _sha256(part / name)} for name in contents}
        facts = {"format": FORMAT, "step": step, "world_size": ranks.world_size, "counters": method.counters(), **meta}
        _write(part / "meta.json", _json({**facts, "files": files, "segments": segments}))
        shutil.rmtree(place, ignore_errors=True)
        part.rename(place)
        _flush(folder)
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return place


def complete(folder: Path) -> list[Path]:
    """Checkpoints below `folder` whose files all have the recorded size, oldest first."""
    return sorted(path for path in folder.glob("step_*") if _is_complete(path))


def latest(folder: Path) -> Path:
    """The newest complete checkpoint. Raises ValueError when there is none: a run asked to resume never starts afresh in silence."""
    found = complete(folder)
    if not found:
        raise ValueError(f"checkpoint: {folder} holds no complete one, so there is nothing to go on from; start anew in another folder")
    return found[-1]


def load(place: Path, *, method: nn.Module, optimizer, ranks: Ranks, teachers=None) -> dict:
    """Takes weights, buffers, teachers, optimizer state, counters and (with as many ranks as before) the generators back.

    Every rank reads the files and takes its own pieces, whatever stage and number of ranks wrote them. Returns the meta data.

    Raises ValueError when a file is damaged or its names and shapes are not those of this model.
    """
    meta = read_meta(place)
    for name, facts in meta["files"].items():
        if _sha256(place / name) != facts["sha256"]:
            raise ValueError(f"checkpoint: {place / name} is damaged (its checksum differs); remove {place} to go back to the one before")
    kept = _kept(method, optimizer, teachers)
    with ExitStack() as stack:
        files = {name: stack.enter_context(safe_open(place / name, "pt")) for name in meta["files"]}
        _compare(files[MODEL], kept[MODEL], place, ranks)
        _compare_teachers(files.get(TEACHER), kept.get(TEACHER), place, ranks)
        _compare_optimizer(files[OPTIMIZER], optimizer, place)
        for name, part in kept.items():
            _take_model(files[name], part, ranks)
        _take_states(files[OPTIMIZER], method, optimizer)
        same_world = meta["world_size"] == ranks.world_size
        method.load_counters(meta["counters"], same_world)
        if same_world:
            torch.set_rng_state(files[RNG].get_tensor(f"cpu.{ranks.rank}"))
            if ranks.device.type == "cuda":
                torch.cuda.set_rng_state(files[RNG].get_tensor(f"cuda.{ranks.rank}"))
    return meta


def save_weights(folder: Path, state: dict[str, torch.Tensor], facts: dict) -> Path:
    """Writes checkpoint 0 below `folder` of weights alone, which were not trained here: for `load_weights`, not for `load`."""
    place = folder / f"step_{0:08d}"
    place.mkdir(parents=True)
    tensor_file.write(place / MODEL, [Entry(name, value.dtype, tuple(value.shape)) for name, value in state.items()], iter(state.values()))
    file = {"bytes": (place / MODEL).stat().st_size, "sha256": _sha256(place / MODEL)}
    _write(place / "meta.json", _json({"format": FORMAT, "step": 0, "files": {MODEL: file}, **facts}))
    return place


def load_weights(place: Path, module: nn.Module, prefix: str) -> None:
    """Loads the part of a checkpoint's model whose names begin with `prefix`, strictly, into `module`; no ranks needed."""
    read_meta(place)
    with safe_open(place / MODEL, "pt") as file:
        names = [name for name in list(file.keys()) if name.startswith(prefix)]
        module.load_state_dict({name.removeprefix(prefix): file.get_tensor(name) for name in names})


def read_meta(place: Path) -> dict:
    meta = json.loads((place / "meta.json").read_text())
    if meta["format"] != FORMAT:
        raise ValueError(
            f"checkpoint: {place} has format {meta['format']}, this version reads {FORMAT}; go on with the version that wrote it"
        )
    return meta


def _kept(method: nn.Module, optimizer, teachers) -> dict[str, _Kept]:
    kept = {MODEL: _Kept(method, optimizer.pieces_of, optimizer.partitioned, method.sharded)}
    if teachers is not None and teachers.state_dict():
        kept[TEACHER] = _Kept(teachers, teachers.pieces_of, teachers.partitioned, {})
    return kept


def _segments(kept: _Kept, ranks: Ranks) -> dict[str, list[list[int]]]:
    """{parameter: [[rank, number of its flat tensor, start there, offset in the parameter, length], …]} of all ranks; {} without ZeRO."""
    if not kept.partitioned:
        return {}
    numbers: dict[torch.Tensor, int] = {}
    own = [
        (name, [ranks.rank, numbers.setdefault(piece.holder, len(numbers)), piece.start, piece.offset, piece.numel])
        for name, pieces in kept.pieces_of.items()
        for piece in pieces
    ]
    every = [None] * ranks.world_size
    dist.all_gather_object(every, own)
    segments: dict[str, list[list[int]]] = {}
    for name, row in (row for part in every for row in part):
        segments.setdefault(name, []).append(row)
    parameters = dict(kept.module.named_parameters())
    for name, rows in segments.items():
        end = 0
        for *_, offset, numel in sorted(rows, key=lambda row: row[3]):
            if offset != end:
                raise RuntimeError(f"checkpoint: of {name} element {min(offset, end)} is held by no rank or by several; nothing was saved")
            end += numel
        wanted = shape_of(parameters[name]).numel()
        if end != wanted:
            raise RuntimeError(f"checkpoint: of {name} the ranks hold {end} elements and it has {wanted}; nothing was saved")
    return segments


def _entries(kept: _Kept, ranks: Ranks) -> list[Entry]:
    """What the file of a module holds: parameters in at least fp32, buffers as they are."""
    parameters, entries = kept.parameters, []
    for name, tensor in kept.module.state_dict().items():
        shape = list(tensor.shape)
        if name in parameters:
            entries.append(_entry_of(name, parameters[name][1]))
            continue
        if name in kept.sharded:
            shape[kept.sharded[name]] *= ranks.world_size
        entries.append(Entry(name, tensor.dtype, tuple(shape)))
    return entries


def _entry_of(name: str, parameter: nn.Parameter) -> Entry:
    return Entry(name, torch.promote_types(parameter.dtype, torch.float32), tuple(shape_of(parameter)))


def _whole_model(kept: _Kept, segments: dict[str, list[list[int]]], ranks: Ranks) -> Iterator[torch.Tensor]:
    """The tensors of `_entries`, right on the first rank; every rank must go through all of them."""
    parameters = kept.parameters
    for name, tensor in kept.module.state_dict().items():
        if name in parameters:
            first, parameter = parameters[name]
            pieces, entry = kept.pieces_of.get(first, []), _entry_of(name, parameter)
            if parameter.dtype == entry.dtype and not hasattr(parameter, "ds_tensor"):
                yield parameter
            elif first in segments:
                yield _sum_of(entry, [(piece.offset, piece.of(piece.holder)) for piece in pieces], parameter.device)
            elif hasattr(parameter, "ds_tensor"):
                yield _sum_of(entry, [_shard(parameter)], parameter.device)
            else:
                yield (pieces[0].holder if pieces else parameter).to(entry.dtype)
        elif name in kept.sharded:
            yield _join(tensor, kept.sharded[name], ranks)
        elif tensor.is_floating_point() and ranks.world_size > 1:
            mean = tensor.clone()
            dist.all_reduce(mean)
            yield mean / ranks.world_size
        else:
            yield tensor


def _shard(parameter: nn.Parameter) -> tuple[int, torch.Tensor]:
    """Where this rank's shard of a parameter under ZeRO 3 begins, and the shard without its padding."""
    begin = min(parameter.ds_tensor.numel() * parameter.ds_zero_partition_rank, parameter.ds_numel)
    return begin, parameter.ds_tensor.narrow(0, 0, min(parameter.ds_tensor.numel(), parameter.ds_numel - begin))


def _sum_of(entry: Entry, parts: list[tuple[int, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """The whole tensor on the first rank, of what every rank has of it: flat parts and where they begin."""
    full = torch.zeros(torch.Size(entry.shape).numel(), dtype=entry.dtype, device=device)
    for begin, part in parts:
        full.narrow(0, begin, part.numel()).copy_(part)
    # bits of one rank meet zeros of the others: as integers they stay what they are, -0.0 and NaN included
    dist.reduce(full.view(INTEGERS[entry.dtype.itemsize]), 0)
    return full.view(entry.shape)


def _join(tensor: torch.Tensor, dim: int, ranks: Ranks) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(ranks.world_size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def _state_entries(method: nn.Module, optimizer) -> list[Entry]:
    """What the optimizer's file holds: {state/parameter}, counts as scalars."""
    return [
        Entry(f"{key}/{name}", torch.float32, ()) if key == "step" else _entry_of(f"{key}/{name}", parameter)
        for name, parameter in method.named_parameters()
        for key in optimizer.state_names
    ]


def _whole_states(method: nn.Module, optimizer) -> Iterator[torch.Tensor]:
    """The tensors of `_state_entries`, right on the first rank; every rank must go through all of them."""
    entries = iter(_state_entries(method, optimizer))
    for name, parameter in method.named_parameters():
        pieces = optimizer.pieces_of.get(name, [])
        for key in optimizer.state_names:
            entry, states = next(entries), [optimizer.state[piece.holder][key] for piece in pieces]
            if key == "step":
                count = states[0].to(parameter.device, torch.float32, copy=True) if states else torch.zeros((), device=parameter.device)
                if optimizer.partitioned:
                    dist.all_reduce(count, op=dist.ReduceOp.MAX)
                yield count
            elif optimizer.partitioned:
                parts = [(piece.offset, piece.of(state)) for piece, state in zip(pieces, states, strict=True)]
                yield _sum_of(entry, parts, parameter.device)
            else:
                yield states[0].to(entry.dtype) if states else torch.zeros(entry.shape, dtype=entry.dtype)


def _gather_rng(ranks: Ranks) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    joined = {name: _join(state.to(ranks.device).unsqueeze(0), 0, ranks).cpu() for name, state in states.items()}
    return {f"{name}.{rank}": row for name, rows in joined.items() for rank, row in enumerate(rows)}


def _compare(file, kept: _Kept, place: Path, ranks: Ranks) -> None:
    saved, own = set(file.keys()), {entry.name: entry for entry in _entries(kept, ranks)}
    strange, missing = sorted(saved - own.keys()), sorted(own.keys() - saved)
    if strange or missing:
        raise ValueError(f"checkpoint: {place} is of another model; it lacks {missing[:3]} and has {strange[:3]} besides")
    for name in sorted(saved):
        there, here = list(file.get_slice(name).get_shape()), list(own[name].shape)
        if name not in kept.sharded and there != here:
            raise ValueError(f"checkpoint: {name} is {there} in {place} and {here} in this model")
        if name in kept.sharded and there[kept.sharded[name]] < here[kept.sharded[name]]:
            dim = kept.sharded[name]
            raise ValueError(f"checkpoint: {name} has {there[dim]} rows, {here[dim]} are wanted; keep its length when resuming")


def _compare_teachers(file, kept: _Kept | None, place: Path, ranks: Ranks) -> None:
    if (file is None) != (kept is None):
        keys = file.keys() if file is not None else kept.module.state_dict()
        names = ", ".join(sorted({name.partition(".")[0] for name in keys}))
        has, wants = ("a teacher", "none") if file is not None else ("no teacher", "one")
        raise ValueError(f"checkpoint: {place} holds {has} and this method has {wants} ({names}); keep the method, or start anew")
    if file is not None:
        _compare(file, kept, place, ranks)


def _compare_optimizer(file, optimizer, place: Path) -> None:
    kinds = sorted({key.partition("/")[0] for key in list(file.keys())})
    if kinds != optimizer.state_names:
        raise ValueError(
            f"checkpoint: {place} holds the optimizer state {kinds}, this optimizer has {optimizer.state_names}; keep optim.name"
        )


@torch.no_grad()
def _take_model(file, kept: _Kept, ranks: Ranks) -> None:
    """Weights where the optimizer (or a teacher) keeps them and where they run, and buffers; one tensor at a time is in memory."""
    parameters = kept.parameters
    for name, tensor in kept.module.state_dict().items():
        saved = file.get_tensor(name)
        if name in parameters:
            first, parameter = parameters[name]
            for piece in kept.pieces_of.get(first, []):
                if piece.holder is not parameter:
                    piece.of(piece.holder).copy_(saved.flatten().narrow(0, piece.offset, piece.numel))
            if hasattr(parameter, "ds_tensor"):
                begin, shard = _shard(parameter)
                shard.copy_(saved.flatten().narrow(0, begin, shard.numel()))
            # under ZeRO 3 small parameters are whole beside their shards, all others empty
            if parameter.shape == saved.shape:
                parameter.copy_(saved)
            continue
        if name in kept.sharded:
            dim = kept.sharded[name]
            saved = saved.narrow(dim, ranks.rank * tensor.shape[dim], tensor.shape[dim])
        tensor.copy_(saved)


@torch.no_grad()
def _take_states(file, method: nn.Module, optimizer) -> None:
    for name, _ in method.named_parameters():
        for piece in optimizer.pieces_of.get(name, []):
            for key in optimizer.state_names:
                saved, state = file.get_tensor(f"{key}/{name}"), optimizer.state[piece.holder][key]
                if state.ndim == 0:
                    state.copy_(saved)
                else:
                    piece.of(state).copy_(saved.flatten().narrow(0, piece.offset, piece.numel))


def _is_complete(place: Path) -> bool:
    if not (place / "meta.json").is_file():
        return False
    try:
        files = json.loads((place / "meta.json").read_text())["files"]
    except (json.JSONDecodeError, KeyError):
        return False
    return all((place / name).is_file() and (place / name).stat().st_size == facts["bytes"] for name, facts in files.items())


def _json(facts: dict) -> str:
    """Indented, with a list of numbers on one line: a large run has thousands of segments."""
    return re.sub(r"\[[\s\d,]+\]", lambda found: re.sub(r"\s+", "", found[0]).replace(",", ", "), json.dumps(facts, indent=2))


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
