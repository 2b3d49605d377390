"""How does a run survive: what is saved, in which files, and how is it taken back?

A checkpoint is a folder `ckpt/step_00001200/` of safetensors and JSON, keyed by parameter name, so that any ZeRO stage and number of
ranks can load it, and loading never executes code. It is written beside its place and renamed when complete.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from fuseer.engine.distributed import Ranks

FORMAT = 1
TEACHER = "teacher.safetensors"
NO_TEACHERS = nn.ModuleDict()


def save(
    folder: Path, step: int, *, method: nn.Module, optimizer, ranks: Ranks, meta: dict, keep: int, teachers: nn.Module = NO_TEACHERS
) -> Path:
    """Writes checkpoint `step` below `folder`; every rank must call.

    Parameters and optimizer state are gathered by name to rank 0. BatchNorm statistics that ranks hold differently are saved as their
    mean; buffers named in `method.sharded` are joined in rank order. `teachers` get a file of their own where there are any.
    The newest `keep` checkpoints stay.
    """
    taught = _gather_model(teachers, {}, ranks)
    tensors = {
        "model.safetensors": _gather_model(method, method.sharded, ranks),
        **({TEACHER: taught} if taught else {}),
        "optimizer.safetensors": _gather_optimizer(method, optimizer, ranks),
        "rng.safetensors": _gather_rng(ranks),
    }
    place = folder / f"step_{step:08d}"
    if ranks.is_first:
        part = folder / f".part_{step:08d}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, content in tensors.items():
            save_file(content, part / name)
            _flush(part / name)
        files = {name: {"bytes": (part / name).stat().st_size, "sha256": _sha256(part / name)} for name in tensors}
        whole = {"format": FORMAT, "step": step, "world_size": ranks.world_size, "counters": method.counters(), **meta, "files": files}
        _write(part / "meta.json", json.dumps(whole, indent=2))
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


def load(place: Path, *, method: nn.Module, optimizer, ranks: Ranks, teachers: nn.Module = NO_TEACHERS) -> dict:
    """Takes weights, buffers, teachers, optimizer state, counters and (with as many ranks as before) the generators back.

    Returns the meta data.

    Raises ValueError when a file is damaged or its names and shapes are not those of this model.
    """
    meta = read_meta(place)
    for name, facts in meta["files"].items():
        if _sha256(place / name) != facts["sha256"]:
            raise ValueError(f"checkpoint: {place / name} is damaged (its checksum differs); remove {place} to go back to the one before")
    model, states = load_file(place / "model.safetensors"), load_file(place / "optimizer.safetensors")
    taught = load_file(place / TEACHER) if TEACHER in meta["files"] else {}
    _compare(model, method.state_dict(), method.sharded, place)
    _compare_teachers(taught, teachers, place)
    _compare_optimizer(states, optimizer, place)
    _scatter_model(model, method, method.sharded, ranks)
    _scatter_model(taught, teachers, {}, ranks)
    _scatter_optimizer(model, states, method, optimizer)
    same_world = meta["world_size"] == ranks.world_size
    method.load_counters(meta["counters"], same_world)
    if same_world:
        rng = load_file(place / "rng.safetensors")
        torch.set_rng_state(rng[f"cpu.{ranks.rank}"])
        if ranks.device.type == "cuda":
            torch.cuda.set_rng_state(rng[f"cuda.{ranks.rank}"])
    return meta


def load_weights(place: Path, module: nn.Module, prefix: str) -> None:
    """Loads the part of a checkpoint's model whose names begin with `prefix`, strictly, into `module`."""
    model = load_file(place / "model.safetensors")
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in model.items() if name.startswith(prefix)})


def read_meta(place: Path) -> dict:
    meta = json.loads((place / "meta.json").read_text())
    if meta["format"] != FORMAT:
        raise ValueError(f"checkpoint: {place} has format {meta['format']}, this version reads {FORMAT}")
    return meta


def _gather_model(module: nn.Module, sharded: dict[str, int], ranks: Ranks) -> dict[str, torch.Tensor]:
    tensors, buffers = {}, dict(module.named_buffers())
    for name, tensor in module.state_dict().items():
        tensor = tensor.detach()
        if name in sharded:
            tensor = _join(tensor, sharded[name], ranks)
        elif name in buffers and tensor.is_floating_point() and ranks.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
            tensor /= ranks.world_size
        tensors[name] = tensor.cpu().contiguous().clone()
    return tensors


def _join(tensor: torch.Tensor, dim: int, ranks: Ranks) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(ranks.world_size)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def _gather_optimizer(method: nn.Module, optimizer, ranks: Ranks) -> dict[str, torch.Tensor]:
    """{state/parameter: full tensor}; under ZeRO every rank adds its pieces to zeros and the sum over ranks is the whole."""
    tensors = {}
    for name, parameter in method.named_parameters():
        pieces = optimizer.pieces_of.get(name, [])
        for key in optimizer.state_names:
            if key == "step":
                steps = [optimizer.state[piece.holder][key] for piece in pieces] or [torch.zeros(())]
                full, operation = steps[0].to(ranks.device, copy=True), dist.ReduceOp.MAX
            else:
                full, operation = torch.zeros(parameter.shape, device=ranks.device), dist.ReduceOp.SUM
                for piece in pieces:
                    full.view(-1).narrow(0, piece.offset, piece.numel).copy_(piece.of(optimizer.state[piece.holder][key]))
            if optimizer.partitioned:
                dist.all_reduce(full, op=operation)
            tensors[f"{key}/{name}"] = full.cpu()
    return tensors


def _gather_rng(ranks: Ranks) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    joined = {name: _join(state.to(ranks.device).unsqueeze(0), 0, ranks).cpu() for name, state in states.items()}
    return {f"{name}.{rank}": row.clone() for name, rows in joined.items() for rank, row in enumerate(rows)}


def _compare(saved: dict[str, torch.Tensor], own: dict[str, torch.Tensor], sharded: dict[str, int], place: Path) -> None:
    strange, missing = sorted(saved.keys() - own.keys()), sorted(own.keys() - saved.keys())
    if strange or missing:
        raise ValueError(f"checkpoint: {place} is of another model; it lacks {missing[:3]} and has {strange[:3]} besides")
    for name, tensor in saved.items():
        if name not in sharded and tensor.shape != own[name].shape:
            raise ValueError(f"checkpoint: {name} is {list(tensor.shape)} in {place} and {list(own[name].shape)} in this model")


def _compare_teachers(saved: dict[str, torch.Tensor], teachers: nn.Module, place: Path) -> None:
    own = teachers.state_dict()
    if bool(saved) != bool(own):
        names = ", ".join(sorted({name.partition(".")[0] for name in saved or own}))
        has, wants = ("a teacher", "none") if saved else ("no teacher", "one")
        raise ValueError(f"checkpoint: {place} holds {has} and this method has {wants} ({names}); keep the method, or start anew")
    _compare(saved, own, {}, place)


def _compare_optimizer(states: dict[str, torch.Tensor], optimizer, place: Path) -> None:
    kinds = sorted({key.partition("/")[0] for key in states})
    if kinds != optimizer.state_names:
        raise ValueError(
            f"checkpoint: {place} holds the optimizer state {kinds}, this optimizer has {optimizer.state_names}; keep optim.name"
        )


@torch.no_grad()
def _scatter_model(model: dict[str, torch.Tensor], module: nn.Module, sharded: dict[str, int], ranks: Ranks) -> None:
    for name, tensor in module.state_dict().items():
        saved = model[name]
        if name in sharded:
            dim = sharded[name]
            rows = tensor.shape[dim]
            if saved.shape[dim] < rows * ranks.world_size:
                raise ValueError(
                    f"checkpoint: {name} has {saved.shape[dim]} rows, {rows * ranks.world_size} are wanted; keep its length when resuming"
                )
            saved = saved.narrow(dim, ranks.rank * rows, rows)
        tensor.copy_(saved)


@torch.no_grad()
def _scatter_optimizer(model: dict[str, torch.Tensor], states: dict[str, torch.Tensor], method: nn.Module, optimizer) -> None:
    for name, _ in method.named_parameters():
        for piece in optimizer.pieces_of.get(name, []):
            if piece.holder is not piece.parameter:
                piece.of(piece.holder).copy_(model[name].flatten().narrow(0, piece.offset, piece.numel))
            for key in optimizer.state_names:
                saved, state = states[f"{key}/{name}"], optimizer.state[piece.holder][key]
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
