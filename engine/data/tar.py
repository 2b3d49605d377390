"""Which images, with which labels, lie where in a set of tar shards?"""

import json
import os
import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np

from fuseer.engine.data.images import IMAGE_SUFFIXES, Members, Paths, Source, Stamp
from fuseer.engine.data.listfile import numbered

BLOCK = 512
CLASSES = "classes.json"
_SUFFIXES = frozenset(suffix[1:].encode() for suffix in IMAGE_SUFFIXES)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
_JSON_KEYS = ("label", "cls", "class")
_THREADS = 8
_VERIFIED = 16


class Member(NamedTuple):
    """A regular file in a tar, whose `size` bytes begin at byte `offset`."""

    name: bytes
    offset: int
    size: int


@dataclass
class Shard:
    """The images of one tar: /name\\0 of each, offsets and sizes [n, 2], labels, and first-level folders; None where there is none.

    stamp: of the tar as it was read; damage: what is wrong with it, or empty; passed_over: samples without an image.
    """

    names: bytes = b""
    places: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    labels: list[bytes | None] = field(default_factory=list)
    folders: list[bytes | None] = field(default_factory=list)
    stamp: Stamp = Stamp(0, 0, 0)
    damage: str = ""
    passed_over: int = 0


def expanded(pattern: str) -> list[str]:
    """shards/{000..099}.tar as a hundred paths; several braces give every combination. A path without braces stays as it is."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    if int(last) < int(first):
        raise ValueError(f"data.path: {{{first}..{last}}} counts down; write {{{last}..{first}}}")
    width = len(first) if len(first) == len(last) or first.startswith("0") else 0
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [path for number in range(int(first), int(last) + 1) for path in expanded(f"{head}{number:0{width}d}{tail}")]


def read_shards(root: str, shards: list[str]) -> Source:
    """The images of tar files, shard by shard in the order given, member by member.

    Members are grouped as WebDataset does: consecutive ones whose names agree up to the first dot after the last slash are one sample. Its
    image is the member whose name goes on with an image suffix alone (x.jpg; x.mask.png is beside it); where there is none, every
    member that ends in an image suffix is an image of its own, so that any tar of images will do. Its label is the text of .cls, else
    "label", "cls" or "class" of .json; where no sample of the set has either, the first-level folder of the name. A file classes.json
    in `root` names the classes that numbers stand for.

    A `.idx` beside a shard, as DALI's wds2idx writes it, is used instead of reading the tar from header to header, if it is no older and
    16 of its entries are right. A tar that ends early or goes wrong in the middle gives the images before; a damaged one is named in
    `Source.damaged`. Raises ValueError for a sample with two images, a compressed tar, labels that do not fit together.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        read = list(pool.map(_shard, [os.fsencode(os.path.relpath(path, root)) for path in shards], shards))
    paths = Paths.of_block(root, b"".join(shard.names for shard in read))
    labels = [label for shard in read for label in shard.labels]
    by_folder = all(label is None for label in labels)
    if by_folder:
        labels = [folder for shard in read for folder in shard.folders]
    numbers, classes = numbered(labels, paths.__getitem__, as_names=by_folder)
    counts = [len(shard.places) for shard in read]
    places = np.concatenate([shard.places for shard in read])
    members = Members(
        shards,
        np.array([shard.stamp for shard in read], np.int64),
        np.repeat(np.arange(len(shards), dtype=np.int32), counts),
        places[:, 0].copy(),
        places[:, 1].copy(),
    )
    damaged = {path: shard.damage for path, shard in zip(shards, read, strict=True) if shard.damage}
    return Source(root, paths, numbers, classes if by_folder else _named(root, classes), members, damaged)


def _named(root: str, classes: list[str]) -> list[str]:
    file = os.path.join(root, CLASSES)
    if not os.path.isfile(file):
        return classes
    try:
        with open(file, encoding="utf-8") as opened:
            named = json.load(opened)
    except ValueError as error:
        raise ValueError(f"data.path: {file} is no JSON ({error}); it holds a list of class names") from error
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named) or len(named) < len(classes):
        raise ValueError(f"data.path: {file} must be a list of at least {len(classes)} class names, as labels go up to {len(classes) - 1}")
    return named


def _shard(name: bytes, path: str) -> Shard:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        return Shard(damage=error.strerror)
    try:
        stamp = Stamp.of(os.fstat(descriptor))
        members, damage = _members(path, descriptor)
        found = _grouped(path, descriptor, members)
    except OSError as error:
        return Shard(damage=error.strerror or str(error))
    finally:
        os.close(descriptor)
    images, labels, passed_over = found
    return Shard(
        b"".join(b"/%s/%s\0" % (name, image.name) for image in images),
        np.array([image[1:] for image in images], np.int64).reshape(-1, 2),
        labels,
        [image.name.partition(b"/")[0] if b"/" in image.name else None for image in images],
        stamp,
        damage,
        passed_over,
    )


def _members(path: str, descriptor: int) -> tuple[list[Member], str]:
    """The regular files of a tar, and what is wrong with it."""
    found, end = indexed_members(path, descriptor), 0
    if found:
        end = found[-1].offset + -(-found[-1].size // BLOCK) * BLOCK
    try:
        return found + walked_members(descriptor, end), ""
    except DamagedTar as error:
        kind = next((kind for magic, kind in _COMPRESSED.items() if os.pread(descriptor, 2, 0) == magic), None)
        if kind:
            raise ValueError(f"data.path: {path} is compressed ({kind}), and images are read from the middle; decompress it") from error
        return found + error.members, str(error)


def _grouped(path: str, descriptor: int, members: list[Member]) -> tuple[list[Member], list[bytes | None], int]:
    """Images, their labels, and how many samples have no image."""
    images, labels, passed_over, json_labels = [], [], 0, True
    for key, group in groupby(members, key=_key):
        if key is None:
            continue
        parts = {_extension(member.name): member for member in group}
        whole = [member for extension, member in parts.items() if extension in _SUFFIXES]
        if len(whole) > 1:
            first, second = (os.fsdecode(member.name) for member in whole[:2])
            raise ValueError(f"data.path: {path} has two images in one sample, {first} and {second}; rename one")
        found = whole or [member for extension, member in parts.items() if extension.rpartition(b".")[2] in _SUFFIXES]
        label = _class_text(descriptor, parts.get(b"cls")) if found else None
        if found and label is None and b"json" in parts and json_labels:
            label = _json_label(descriptor, parts[b"json"])
            # captions without a label: the others of this shard are not read
            json_labels = label is not None
        images += found
        labels += [label] * len(found)
        passed_over += not found
    return images, labels, passed_over


def _key(member: Member) -> bytes | None:
    folder, slash, base = member.name.rpartition(b"/")
    key, dot, _ = base.partition(b".")
    return folder + slash + key if key and dot else None


def _extension(name: bytes) -> bytes:
    return name.rpartition(b"/")[2].partition(b".")[2].lower()


def _class_text(descriptor: int, member: Member | None) -> bytes | None:
    return os.pread(descriptor, min(member.size, BLOCK), member.offset).strip() or None if member else None


def _json_label(descriptor: int, member: Member) -> bytes | None:
    try:
        record = json.loads(os.pread(descriptor, member.size, member.offset))
    except ValueError:
        return None
    found = [record[key] for key in _JSON_KEYS if key in record] if isinstance(record, dict) else []
    usable = found and isinstance(found[0], (int, str)) and not isinstance(found[0], bool)
    return os.fsencode(str(found[0])) if usable else None


class DamagedTar(Exception):
    """A tar goes wrong; `members` are those before."""

    def __init__(self, reason: str, members: list[Member]):
        super().__init__(reason)
        self.members = members


def walked_members(descriptor: int, at: int = 0) -> list[Member]:
    """The regular files of a tar from byte `at` on, from header to header: ustar, GNU (long names) and pax (long names).

    Raises `DamagedTar` where neither a header nor the zeros that end a tar follow.
    """
    found: list[Member] = []
    size_of_file = os.fstat(descriptor).st_size
    name = None
    while True:
        header = os.pread(descriptor, BLOCK, at)
        if len(header) < BLOCK:
            lost = "is empty" if not at and not header else f"is cut off after {len(found)} files: it lacks the zeros that end a tar"
            raise DamagedTar(lost, found)
        if header[0] == 0 and not any(header):
            return found
        kind, size = header[156:157], _size(header)
        if size is None:
            raise DamagedTar(f"is no tar at byte {at}, after {len(found)} files", found)
        data, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
        if kind == b"L":
            name = os.pread(descriptor, size, data).rstrip(b"\0")
        elif kind == b"x":
            name = _pax_path(os.pread(descriptor, size, data)) or name
        elif kind != b"g":
            whole, name = name or _short_name(header), None
            if data + size > size_of_file:
                raise DamagedTar(f"is cut off within {os.fsdecode(whole)}, its file {len(found) + 1}", found)
            if kind in b"0\0007":
                found.append(Member(whole.removeprefix(b"./"), data, size))


def _size(header: bytes) -> int | None:
    """The size that a tar header gives; None for what is no header."""
    text = header[124:136]
    try:
        size = int.from_bytes(text[1:], "big") if text[0] == 0x80 else int(text.strip(b" \0") or b"0", 8)
        if header[257:262] == b"ustar":
            return size
        told = int(header[148:156].strip(b" \0"), 8)
    except ValueError:
        return None
    return size if told == sum(header) - sum(header[148:156]) + 8 * 32 else None


def _short_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _pax_path(records: bytes) -> bytes | None:
    """The value of `path` among records of the form 'length key=value\\n'."""
    while records:
        length, blank, _ = records.partition(b" ")
        if not blank or not length.isdigit() or not int(length):
            return None
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            return value
        records = records[int(length) :]
    return None


def indexed_members(path: str, descriptor: int) -> list[Member]:
    """The members that a `.idx` of DALI's wds2idx (v1.2) beside the tar tells; none where there is no such file or it is not right."""
    file = path.removesuffix(".tar") + ".idx"
    try:
        status = os.fstat(descriptor)
        if os.stat(file).st_mtime_ns < status.st_mtime_ns:
            return []
        with open(file, "rb") as opened:
            version, *lines, end = opened.read().split(b"\n")
        words = [line.split(b" ") for line in lines]
        if end or version != b"v1.2 %d" % len(words) or any(len(line) % 4 for line in words):
            return []
        flat = [word for line in words for word in line]
        found = [Member(flat[i + 3].removeprefix(b"./"), int(flat[i + 1]), int(flat[i + 2])) for i in range(0, len(flat), 4)]
    except (OSError, ValueError):
        return []
    chosen = {0, len(found) - 1, *random.Random(0).sample(range(len(found)), min(_VERIFIED, len(found)))} if found else set()
    right = all(at.offset > 0 and _size(os.pread(descriptor, BLOCK, at.offset - BLOCK)) == at.size for at in (found[i] for i in chosen))
    return found if right and all(member.offset + member.size <= status.st_size for member in found) else []


def index_text(members: Iterator[Member]) -> bytes:
    """The `.idx` of a shard, in the words of DALI's wds2idx (v1.2). Names must hold no blanks."""
    lines = []
    for key, group in groupby(members, key=_key):
        if key is not None:
            lines.append(b" ".join(b"%s %d %d %s" % (_extension_as_is(m.name), m.offset, m.size, m.name) for m in group))
    return b"v1.2 %d\n" % len(lines) + b"".join(line + b"\n" for line in lines)


def _extension_as_is(name: bytes) -> bytes:
    return name.rpartition(b"/")[2].partition(b".")[2]
