"""Which images does a source hold, and where do the bytes of each lie?"""

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)
_OPEN_SHARDS = 128


class Paths(Sequence):
    """`root` joined with each of many names, kept as one block of bytes: /name\\0/name\\0…, and the place of every zero.

    A million names of 30 characters take 40 MB, as str objects 130 MB. An index gives a str, a slice a list of them.
    """

    def __init__(self, root: str, block: np.ndarray, ends: np.ndarray):
        self.root, self.block, self.ends = root, block, ends

    @classmethod
    def of_block(cls, root: str, block: bytes) -> "Paths":
        whole = np.frombuffer(block, np.uint8)
        return cls(root, whole, np.flatnonzero(whole == 0))

    @classmethod
    def of_names(cls, root: str, names: Iterable[bytes]) -> "Paths":
        return cls.of_block(root, b"".join(b"/%s\0" % name for name in names))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, at):
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        return f"{self.root}/{os.fsdecode(self.name(at))}"

    def name(self, at: int) -> bytes:
        """The name below `root`."""
        at = int(at) + (len(self) if at < 0 else 0)
        if not 0 <= at < len(self):
            raise IndexError(f"data: image {at} of {len(self)}")
        first = self.ends[at - 1] + 1 if at else 0
        return self.block[first + 1 : self.ends[at]].tobytes()

    def only(self, chosen: Iterable[int]) -> "Paths":
        return Paths.of_names(self.root, (self.name(i) for i in chosen))


class Stamp(NamedTuple):
    """What tells that a file or folder is as it was: inode, bytes (0 for a folder) and modification time in ns."""

    inode: int
    bytes: int
    mtime: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        return cls(status.st_ino, 0 if stat.S_ISDIR(status.st_mode) else status.st_size, status.st_mtime_ns)


class Members:
    """The images inside tar shards: image i is the `sizes[i]` bytes from `offsets[i]` on of shards[numbers[i]].

    A shard is opened when first read, must still bear the stamp it had when it was indexed (OSError otherwise), and stays open, as one of
    at most 128, until another takes its place. Thread-safe: the descriptor is closed once nobody reads from it.
    """

    def __init__(self, shards: list[str], stamps: np.ndarray, numbers: np.ndarray, offsets: np.ndarray, sizes: np.ndarray):
        self.shards, self.stamps, self.numbers, self.offsets, self.sizes = shards, stamps, numbers, offsets, sizes
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def only(self, chosen: np.ndarray) -> "Members":
        return Members(self.shards, self.stamps, self.numbers[chosen], self.offsets[chosen], self.sizes[chosen])

    def shard(self, number: int) -> "_Descriptor":
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        found = _Descriptor(self.shards[number])
        if Stamp.of(os.fstat(found.number))[1:] != tuple(self.stamps[number].tolist())[1:]:
            raise OSError("its shard has changed since it was indexed; start anew, or run fuseer data index")
        with self._lock:
            self._open[number] = found
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return found


class _Descriptor:
    """An open file that closes with its last reference."""

    def __init__(self, path: str):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


class Place(NamedTuple):
    """`bytes` bytes from `offset` on of an open file that was last changed at `mtime` (ns)."""

    descriptor: int
    offset: int
    bytes: int
    mtime: int


@dataclass(frozen=True)
class Source:
    """Images below `root` in an order that does not change: files, sorted by the bytes of their names or as listed, or members of shards.

    paths: absolute, a member's being that of its shard followed by its name; labels [len] int64, -1 where unknown, else the index into
    `classes`; damaged: path -> reason of shards of which images are missing.
    """

    root: str
    paths: Paths = field(repr=False)
    labels: np.ndarray = field(repr=False)
    classes: list[str] = field(repr=False)
    members: Members | None = field(default=None, repr=False)
    damaged: dict[str, str] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """32 hex digits of the names below `root` in their order, and of the places in shards.

        Equal for a moved copy, different once an image is added, removed or renamed, or a shard is packed in another way.
        """
        digest = hashlib.blake2b(np.ascontiguousarray(self.paths.block), digest_size=16)
        if self.members:
            digest.update(np.stack([self.members.offsets, self.members.sizes], 1).astype("<i8").tobytes())
        return digest.hexdigest()

    def only(self, chosen: Sequence[int]) -> "Source":
        """The images `chosen`, in that order, under the same classes."""
        at = np.asarray(chosen, dtype=np.int64)
        members = self.members.only(at) if self.members else None
        return replace(self, paths=self.paths.only(at), labels=self.labels[at], members=members)

    @contextmanager
    def opened(self, sample: int) -> Iterator[Place]:
        """Where the bytes of an image lie, open for reading; OSError where there is no file."""
        if self.members:
            shard = self.members.shard(int(self.members.numbers[sample]))
            mtime = int(self.members.stamps[self.members.numbers[sample], 2])
            yield Place(shard.number, int(self.members.offsets[sample]), int(self.members.sizes[sample]), mtime)
            return
        descriptor = os.open(self.paths[sample], os.O_RDONLY | os.O_NONBLOCK)  # a pipe named x.jpg must not block
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError("is not a file")
            yield Place(descriptor, 0, status.st_size, status.st_mtime_ns)
        finally:
            os.close(descriptor)
