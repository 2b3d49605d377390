"""Which elements of a tensor stand in which rank's file, and how is a tensor read back from files that others wrote?"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from fuseer.engine import tensor_file
from fuseer.engine.tensor_file import Entry

# files that a reader keeps open: a thousand ranks leave more than a process may have
OPEN_FILES = 64


class Part(NamedTuple):
    """What one rank writes of tensor `name` [shape], in `dtype`: the elements from flat `offset` on, which are those of `source` flattened
    from `start` on, `numel` of them."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    source: torch.Tensor
    start: int
    numel: int

    @property
    def entry(self) -> Entry:
        """Whole tensors keep name and shape, so that the files of a process alone are plain safetensors; else name@offset, flat."""
        if self.numel == torch.Size(self.shape).numel():
            return Entry(self.name, self.dtype, self.shape)
        return Entry(f"{self.name}@{self.offset}", self.dtype, (self.numel,))

    def values(self) -> torch.Tensor:
        flat = self.source.detach().reshape(-1).narrow(0, self.start, self.numel)
        return flat.to(self.dtype).view(self.entry.shape)

    def kept(self) -> "Part":
        """The same part in memory of the host that nobody else writes to."""
        return self._replace(source=self.values().to("cpu", copy=True), start=0)


def whole(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Part:
    return Part(name, dtype or tensor.dtype, tuple(tensor.shape), 0, tensor, 0, tensor.numel())


def share(parts: Iterable[Part], rank: int, world_size: int) -> list[Part]:
    """This rank's share, as many bytes as the others' to an element, of whole parts that all ranks have alike and give in one order."""
    parts = list(parts)
    total = sum(part.numel * part.dtype.itemsize for part in parts)
    low, high = (total * at // world_size for at in (rank, rank + 1))
    found, end = [], 0
    for part in parts:
        begin, end = end, end + part.numel * part.dtype.itemsize
        # an element belongs to whom its first byte belongs
        first, last = (min(max(-((begin - edge) // part.dtype.itemsize), 0), part.numel) for edge in (low, high))
        if first < last or (part.numel == 0 and rank == 0):
            found.append(part._replace(offset=first, start=first, numel=last - first))
    return found


def file_of(kind: str, rank: int, world_size: int) -> str:
    """model.safetensors of a process alone, model.00003.safetensors of one rank among several."""
    return kind if world_size == 1 else kind.replace(".", f".{rank:05d}.", 1)


def write(folder: Path, kind: str, rank: int, world_size: int, parts: list[Part]) -> tuple[str, dict]:
    """Writes one rank's file of a kind; its name and facts."""
    name = file_of(kind, rank, world_size)
    return name, tensor_file.write(folder / name, [part.entry for part in parts], (part.values() for part in parts))


def table(rows: Iterable[tuple[int, list[tuple]]]) -> dict[str, dict]:
    """{name: {"shape", "pieces": [[rank, offset, numel], …]}} of (rank, its rows (name, shape, offset, numel)) of all ranks.

    Raises RuntimeError where the pieces of a tensor are not the tensor.
    """
    found: dict[str, dict] = {}
    for rank, own in rows:
        for name, shape, offset, numel in own:
            found.setdefault(name, {"shape": list(shape), "pieces": []})["pieces"].append([rank, offset, numel])
    for name, facts in found.items():
        facts["pieces"].sort(key=lambda row: row[1:])
        end = 0
        for _, offset, numel in facts["pieces"]:
            if offset != end:
                raise RuntimeError(f"of {name} element {min(offset, end)} is held by no rank or by several")
            end += numel
        wanted = torch.Size(facts["shape"]).numel()
        if end != wanted:
            raise RuntimeError(f"of {name} the ranks hold {end} elements and it has {wanted}")
    return found


class Shards:
    """The tensors of one kind in a checkpoint, whoever wrote them. Files are mapped: only the pages of what is asked for are read.

    `meta` is the checkpoint's; where it holds no table of this kind, one file holds whole tensors.
    """

    def __init__(self, place: Path, meta: dict, kind: str):
        self._kind, self._world = kind, meta.get("world_size", 1)
        self._file = functools.lru_cache(OPEN_FILES)(lambda name: safe_open(place / name, "pt"))
        self._table = meta.get("tensors", {}).get(kind)
        if self._table is None:
            self._world, lone = 1, self._file(kind)
            shapes = {name: list(lone.get_slice(name).get_shape()) for name in lone.keys()}  # noqa: SIM118 - it is no dict
            self._table = {name: {"shape": shape, "pieces": [[0, 0, torch.Size(shape).numel()]]} for name, shape in shapes.items()}

    def shapes(self) -> dict[str, list[int]]:
        return {name: facts["shape"] for name, facts in self._table.items()}

    def whole(self, name: str) -> torch.Tensor:
        """The tensor in one; not to be written to where it stands in one file."""
        shape, pieces = self._table[name]["shape"], self._table[name]["pieces"]
        if len(pieces) == 1:
            return self._piece(name, *pieces[0]).view(shape)
        return torch.cat([self._piece(name, *piece) for piece in pieces]).view(shape)

    def fill(self, target: torch.Tensor, name: str, offset: int) -> None:
        """Copies the tensor's elements from flat `offset` on into `target`, flat; reads no others."""
        end = offset + target.numel()
        for rank, begin, numel in self._table[name]["pieces"]:
            low, high = max(begin, offset), min(begin + numel, end)
            if low < high:
                piece = self._piece(name, rank, begin, numel)
                target.narrow(0, low - offset, high - low).copy_(piece.narrow(0, low - begin, high - low))

    def _piece(self, name: str, rank: int, offset: int, numel: int) -> torch.Tensor:
        is_whole = numel == torch.Size(self._table[name]["shape"]).numel()
        file = self._file(file_of(self._kind, rank, self._world))
        return file.get_tensor(name if is_whole else f"{name}@{offset}").view(-1)
