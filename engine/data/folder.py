"""Which images, and which tar shards, lie below a folder?"""

import os
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from fuseer.engine.data.images import IMAGE_SUFFIXES, Paths, Source, Stamp

_SUFFIXES = frozenset(suffix[1:].encode() for suffix in IMAGE_SUFFIXES)
# folders are listed side by side, for on a network file system each is a round trip
_THREADS = 16


@dataclass
class Scanned:
    """The images below a folder; its tar shards; every folder listed with its stamp. No image and no shard is an empty `source`."""

    source: Source
    shards: list[str]
    folders: list[str]
    stamps: list[Stamp]


@dataclass
class _Folder:
    path: bytes
    name: bytes = b""
    above: tuple = ()
    stamp: Stamp | None = None
    images: list[bytes] = field(default_factory=list)
    shards: list[bytes] = field(default_factory=list)
    folders: list["_Folder"] = field(default_factory=list)


def scan(root: str) -> Scanned:
    """Lists `root` to any depth. Links are followed, never twice around a loop; names that start with a dot are passed over.

    Images are sorted by the bytes of their names; a class is a first-level sub-folder with images, and images above the class folders have
    label -1. Nothing but folders and links is looked at: whether an image is a file is told when it is read. Raises ValueError for
    a folder that cannot be listed.
    """
    top = _Folder(os.fsencode(root))
    every, level = [], [top]
    with ThreadPoolExecutor(_THREADS) as pool:
        while level:
            every += level
            level = [folder for found in pool.map(_listed, level) for folder in found]
    every = [folder for folder in every if folder.stamp]
    parts: list[bytes] = []
    counted = [(name, _count(below, parts)) for name, below in _in_order(top, b"")]
    classes = sorted({name for name, count in counted if name is not None and count})
    number = {name: i for i, name in enumerate(classes)}
    labels = np.repeat(np.array([number.get(name, -1) for name, _ in counted], np.int64), [count for _, count in counted])
    source = Source(root, Paths.of_block(root, b"".join(parts)), labels, [os.fsdecode(name) for name in classes])
    shards = sorted(b"%s/%s" % (folder.path, name) for folder in every for name in folder.shards)
    return Scanned(source, [os.fsdecode(path) for path in shards], [os.fsdecode(folder.path) for folder in every], [f.stamp for f in every])


def holds_images(root: str) -> bool:
    """Whether an image or a shard lies below `root`, to any depth; stops at the first."""
    level = [_Folder(os.fsencode(root))] if os.path.isdir(root) else []
    while level:
        folder = level.pop()
        if next(_entries(folder), None) is not None:
            return True
        level += _listed(folder)
    return False


def _entries(folder: _Folder) -> Iterator[bytes]:
    """Names of images and shards in the folder itself, as they come."""
    entries, _ = _opened(folder)
    with entries:
        for entry in entries:
            suffix = _suffix(entry.name)
            if suffix in _SUFFIXES or (suffix == b"tar" and entry.is_file()):
                yield entry.name


def _listed(folder: _Folder) -> list[_Folder]:
    """Fills the folder in and returns its sub-folders; none, and no stamp, where it is its own ancestor."""
    # the stamp is of before the listing: who adds a file meanwhile has it listed, or has changed the stamp
    entries, status = _opened(folder)
    with entries:
        here = (status.st_dev, status.st_ino)
        if here in folder.above:
            return []
        folder.stamp, above = Stamp.of(status), (*folder.above, here)
        for entry in entries:
            suffix = _suffix(entry.name)
            if suffix is None:
                continue
            # a folder named like an image is left to the reader, which names it as broken
            if suffix in _SUFFIXES:
                folder.images.append(entry.name)
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folder.folders.append(_Folder(entry.path, entry.name, above))
            elif suffix == b"tar":
                folder.shards.append(entry.name)
    folder.images.sort()
    return folder.folders


def _opened(folder: _Folder) -> tuple:
    try:
        status = os.stat(folder.path)
        return os.scandir(folder.path), status
    except OSError as error:
        shown = os.fsdecode(folder.path)
        raise ValueError(f"data.path: cannot list the folder {shown} ({error.strerror}); make it readable or move it away") from error


def _suffix(name: bytes) -> bytes | None:
    """The suffix in lower case, empty where there is none; None for a hidden name."""
    if name[:1] == b".":
        return None
    _, dot, suffix = name.rpartition(b".")
    return suffix.lower() if dot else b""


def _in_order(folder: _Folder, prefix: bytes) -> Iterator[tuple[bytes | None, tuple]]:
    """The folder's children in the order of their whole names: (None, run of images) or (sub-folder's name, the sub-folder)."""
    first = 0
    for child in sorted(folder.folders, key=lambda child: child.name + b"/"):
        end = bisect_left(folder.images, child.name + b"/", first)
        if end > first:
            yield None, (prefix, folder.images[first:end])
        yield child.name, (prefix + child.name + b"/", child)
        first = end
    if first < len(folder.images):
        yield None, (prefix, folder.images[first:])


def _count(below: tuple, parts: list[bytes]) -> int:
    """Appends /name\\0 of every image in `below` to `parts`; returns how many they are."""
    prefix, what = below
    if isinstance(what, _Folder):
        return sum(_count(inner, parts) for _, inner in _in_order(what, prefix))
    parts.append(b"/" + prefix + (b"\0/" + prefix).join(what) + b"\0")
    return len(what)
