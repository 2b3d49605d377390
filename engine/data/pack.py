"""How does a source become tar shards that WebDataset, DALI and this engine read?"""

import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fuseer.engine.data.sources import Source, whole_bytes
from fuseer.engine.data.tar import CLASSES, index_text, walked_members

_READ_ERRORS = (OSError, EOFError)


@dataclass
class Packed:
    """What came of it; left_out: path -> reason of images that could not be read."""

    images: int = 0
    shards: int = 0
    bytes: int = 0
    left_out: dict[str, str] = field(default_factory=dict)


def pack(source: Source, out: Path, *, shard_bytes: int, max_broken_share: float, advance: Callable[[int], None]) -> Packed:
    """Writes the images of `source`, byte for byte and in its order, as out/000000.tar, 000001.tar, … with a `.idx` beside each.

    A shard is closed once it holds `shard_bytes`. An image keeps its name below the root, with _ for dots and blanks, which tell samples
    and columns apart there, and _2, _3, … where two would be one; its label is a member .cls, and classes.json names the classes.
    Every shard is read back and compared (CRC-32) before the next is begun, and all is written beside `out`, which appears at the
    end and whole. An image that cannot be read is left out and named; one that does not decode goes along. `advance(n)` is called
    after n more images. Raises ValueError for an `out` that is not empty, a shard size below 1, and an image that has more than
    `max_broken_share` of all, and more than one, unread before it; RuntimeError where a shard reads back differently.
    """
    if shard_bytes < 1:
        raise ValueError(f"data pack: shard_size must be at least 1 byte; got {shard_bytes}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"data pack: out={out} exists and is not an empty folder; name another")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    folder = aside / "whole"
    try:
        folder.mkdir()
        packed, shard = Packed(), None
        for sample in range(len(source)):
            try:
                with source.opened(sample) as place:
                    data = whole_bytes(place)
            except _READ_ERRORS as error:
                packed.left_out[source.paths[sample]] = getattr(error, "strerror", None) or str(error)
                _check_share(packed, source, max_broken_share)
            else:
                shard = shard or _Shard(folder / f"{packed.shards:06d}.tar")
                shard.add(_key(source, sample), data, int(source.labels[sample]))
                packed.images, packed.bytes = packed.images + 1, packed.bytes + len(data)
            if shard and (shard.bytes >= shard_bytes or sample == len(source) - 1):
                shard.close()
                packed.shards, shard = packed.shards + 1, None
            advance(1)
        if not packed.images:
            raise ValueError(f"data pack: none of the {len(source)} images could be read")
        if source.classes:
            _written(folder / CLASSES, json.dumps(source.classes).encode())
        os.rename(folder, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return packed


class _Shard:
    def __init__(self, path: Path):
        self.path, self.bytes = path, 0
        self._tar = tarfile.TarFile(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")
        self._keys: set[str] = set()
        self._added: list[tuple[bytes, int, int]] = []

    def add(self, name: tuple[str, str], data: bytes, label: int) -> None:
        key, suffix = name
        unique, number = key, 1
        while unique in self._keys:
            number += 1
            unique = f"{key}_{number}"
        self._keys.add(unique)
        self._member(f"{unique}.{suffix}", data)
        if label >= 0:
            self._member(f"{unique}.cls", str(label).encode())
        self.bytes += len(data)

    def close(self) -> None:
        self._tar.close()
        with open(self.path, "rb") as opened:
            os.fsync(opened.fileno())
            members = walked_members(opened.fileno())
            read = [(m.name, m.size, zlib.crc32(os.pread(opened.fileno(), m.size, m.offset))) for m in members]
        if read != self._added:
            raise RuntimeError(f"data pack: {self.path} does not read back as it was written; mend the disk, and pack anew")
        _written(self.path.with_suffix(".idx"), index_text(iter(members)))

    def _member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        self._added.append((os.fsencode(name), len(data), zlib.crc32(data)))


def _key(source: Source, sample: int) -> tuple[str, str]:
    """(key, suffix) of an image's members."""
    name = os.fsdecode(source.paths.name(sample))
    if source.members:
        shard = os.path.relpath(source.members.shards[source.members.numbers[sample]], source.root)
        name = name.removeprefix(f"{shard}/")
    *folders, base = (part for part in name.split("/") if part not in ("", ".", ".."))
    stem, _, suffix = base.rpartition(".")
    return "/".join(re.sub(r"\s", "_", part) for part in (*folders, stem.replace(".", "_"))), suffix.lower()


def _check_share(packed: Packed, source: Source, allowed: float) -> None:
    if len(packed.left_out) > max(allowed * len(source), allowed > 0):
        path, reason = next(iter(packed.left_out.items()))
        raise ValueError(
            f"data pack: {len(packed.left_out)} of {len(source)} images cannot be read, more than max_broken_share={allowed:g} allows; "
            f"the first: {path}: {reason}; nothing was written"
        )


def _written(path: Path, data: bytes) -> None:
    with open(path, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())
