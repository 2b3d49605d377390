"""Which images are there, what are the bytes of each, and which of them make up a micro-batch?"""

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fuseer.engine.data.bundled import DEBIAN_FOLDER, FULL, unpacked
from fuseer.engine.data.decodable import DECODE_ERRORS, Examined, decodable, examine
from fuseer.engine.data.philox import ORDER_STREAM, REPLACEMENT_STREAM, uniforms, words

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)
_HELD_OUT = {"test": ("test", "val"), "val": ("val", "test")}
_ROUNDS = 8
_DRAWS = 16
_FIRST_IMAGES = 1000
_SOUND, _BROKEN = 1, 2
_SEEN = np.dtype([("bytes", "i8"), ("mtime", "i8"), ("height", "i4"), ("width", "i4"), ("turn", "i1"), ("convert", "?"), ("state", "i1")])


@dataclass(frozen=True)
class Source:
    """The images below `root`, sorted by the bytes of their names.

    paths are absolute; labels [len] int64, -1 where unknown, else the index into `classes` (folder names, sorted by bytes).
    """

    root: str
    paths: list[str] = field(repr=False)
    labels: np.ndarray = field(repr=False)
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        """32 hex digits of the names below `root`: equal for a moved copy, different once an image is added, removed or renamed."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            digest.update(os.fsencode(path[len(self.root) :]) + b"\0")
        return digest.hexdigest()


def open_source(path: str, split: str | None = None, cache_dir: Path | None = None) -> Source:
    """The images of a folder, flat or one folder per class, or of the bundled set ('demo'), or of all of Fashion-MNIST ('demo-full').

    Sub-folders are searched to any depth, symbolic links are followed (never twice around a loop), names that start with a dot and
    files without an image suffix are passed over. A class is a first-level sub-folder; images above the class folders have label -1.
    Where `path` has both `train` and one of `test` and `val` with images, split=None or 'train' means the former and 'test' or 'val'
    the latter; elsewhere split=None and 'train' mean the whole folder. The demo sets are unpacked once below `cache_dir`
    (~/.cache/fuseer when None), safely under several processes, and unpacked anew if damaged.

    Raises ValueError for a folder that is missing, is no folder, or holds no images (of that split); RuntimeError where a demo set
    cannot be unpacked.
    """
    if split not in (None, "train", "test", "val"):
        raise ValueError(f"data: split must be train, test or val; got {split}")
    if path in ("demo", FULL):
        root = unpacked(path, cache_dir or Path.home() / ".cache" / "fuseer")
    else:
        root = Path(path).expanduser().absolute()
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            raise ValueError(f"data.path: {root} {what}; give a folder of images, or 'demo'")
    found = _of_split(root, split)
    if not found.paths:
        raise ValueError(f"data.path: no images below {root}; looked for files ending in {' '.join(sorted(IMAGE_SUFFIXES))}")
    return found


def full_demo_set_is_here() -> bool:
    """Whether open_source('demo-full') can succeed: Debian's package is installed."""
    return (DEBIAN_FOLDER / "train-images-idx3-ubyte.gz").is_file()


def _of_split(root: Path, split: str | None) -> Source:
    held_out = [root / name for name in _HELD_OUT.get(split or "test", ("test", "val")) if _has_images(root / name)]
    if held_out and _has_images(root / "train"):
        return _scan(held_out[0] if split in _HELD_OUT else root / "train")
    if split in _HELD_OUT:
        raise ValueError(f"data.path: {root} has no {split} split; it needs sub-folders train and {split} with images")
    return _scan(root)


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and next(_names(str(folder), "", ()), None) is not None


def _scan(root: Path) -> Source:
    names = sorted(_names(str(root), "", ()), key=os.fsencode)
    above = [name.partition("/")[0] if "/" in name else None for name in names]
    classes = sorted({folder for folder in above if folder is not None}, key=os.fsencode)
    number = {folder: i for i, folder in enumerate(classes)}
    labels = np.array([number.get(folder, -1) for folder in above], dtype=np.int64)
    return Source(str(root), [f"{root}/{name}" for name in names], labels, classes)


def _names(folder: str, prefix: str, above: tuple) -> Iterator[str]:
    """Names of images below `folder`; `above` holds (device, inode) of the folders on the way down, which ends loops of links."""
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise ValueError(f"data.path: cannot list the folder {folder} ({error.strerror}); make it readable or move it away") from error
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        # a folder named like an image is left to the reader, which names it as broken
        if os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            yield prefix + entry.name
        elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            yield from _names(entry.path, f"{prefix}{entry.name}/", (*above, here))


class Sample(NamedTuple):
    """An encoded image that decodes everywhere, upright height and width in pixels, which sample it is, and its label."""

    data: bytes
    height: int
    width: int
    sample: int
    label: int


class Reader:
    """Reads the samples of `source` for the pipelines, and replaces the broken ones. Thread-safe.

    Each file is decoded in full by Pillow when first read, and again when its size or modification time changes. A broken one is
    replaced by a sample drawn from (seed, epoch, sample asked for) alone, so neither rank nor history changes a batch. `broken` maps
    path -> reason for those met by this process so far; `on_broken(path, reason)` is called once for each.

    Reading stops with RuntimeError once more than `max_broken_share` of the distinct images seen are broken, counting at least
    min(1000, len(source)) images as seen and, unless the share is 0, allowing one; or once no image is left.
    """

    def __init__(self, source, max_broken_share: float, seed: int = 0, on_broken: Callable[[str, str], None] | None = None):
        self.source, self.max_broken_share, self.seed, self.on_broken = source, max_broken_share, seed, on_broken
        self.broken: dict[str, str] = {}
        self._seen = np.zeros(len(source), dtype=_SEEN)
        self._seen_count = 0
        self._lock = threading.Lock()

    def read(self, sample: int, epoch: int) -> Sample:
        """The sample, or its replacement in this epoch."""
        for candidate in self._candidates(sample, epoch):
            read = self._try(candidate)
            if read is not None:
                return read
        raise RuntimeError(f"data: all {len(self.source)} images are broken; {self._first_broken()}")

    def _candidates(self, sample: int, epoch: int) -> Iterator[int]:
        count = len(self.source)
        yield int(sample)
        drawn = (uniforms(self.seed, epoch, [sample], REPLACEMENT_STREAM, _DRAWS)[0] * count).astype(np.int64)
        yield from map(int, drawn)
        yield from ((int(drawn[-1]) + step) % count for step in range(1, count + 1))

    def _try(self, sample: int) -> Sample | None:
        path, seen = self.source.paths[sample], self._seen[sample].copy()
        status = None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe named x.jpg must not block
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise IsADirectoryError("is not a file")
                known = seen["state"] and seen["bytes"] == status.st_size and seen["mtime"] == status.st_mtime_ns
                if known and seen["state"] == _BROKEN:
                    return None
                data = _all_bytes(descriptor, status.st_size)
            finally:
                os.close(descriptor)
            found = Examined(*seen.item()[2:6]) if known else examine(data)
            data = decodable(data, found)
        except DECODE_ERRORS as error:
            self._remember(sample, status, None, _reason(error))
            return None
        if not known:
            self._remember(sample, status, found, "")
        return Sample(data, found.height, found.width, sample, int(self.source.labels[sample]))

    def _remember(self, sample: int, status: os.stat_result | None, found: Examined | None, reason: str) -> None:
        path = self.source.paths[sample]
        with self._lock:
            self._seen_count += self._seen[sample]["state"] == 0
            size, mtime = (status.st_size, status.st_mtime_ns) if status else (-1, -1)
            self._seen[sample] = (size, mtime, *(found or (0, 0, 1, False)), _SOUND if found else _BROKEN)
            if found:
                self.broken.pop(path, None)
                return
            if path in self.broken:
                return
            self.broken[path] = reason
            if self.on_broken:
                self.on_broken(path, reason)
            self._check_share()

    def _check_share(self) -> None:
        seen = max(self._seen_count, min(_FIRST_IMAGES, len(self.source)))
        if len(self.broken) > max(self.max_broken_share * seen, self.max_broken_share > 0):
            raise RuntimeError(
                f"data: {len(self.broken)} of the {self._seen_count} images read so far are broken, more than "
                f"data.max_broken_share={self.max_broken_share:g} allows; {self._first_broken()}; mend or remove them, or raise the share"
            )

    def _first_broken(self) -> str:
        first = [f"{shown(path)}: {reason}" for path, reason in list(self.broken.items())[:3]]
        return f"the first: {'; '.join(first)}"


def shown(path: str) -> str:
    """`path` as printable text, whatever bytes its name is made of."""
    return path if path.isprintable() else ascii(path)[1:-1]


def _all_bytes(descriptor: int, size: int) -> bytes:
    parts, missing = [], size
    while missing > 0 and (part := os.read(descriptor, missing)):
        parts.append(part)
        missing -= len(part)
    if missing or not size:
        raise EOFError("is empty" if not size else f"ended {missing} bytes early")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _reason(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).strip()
    if "cannot identify image file" in text:
        return "is no image of a known format"
    return f"{type(error).__name__}: {text}" if not isinstance(error, (OSError, EOFError)) else text or type(error).__name__


class SampleIndex:
    """The one global order of the samples: which of them micro-step m of this rank takes, by arithmetic alone.

    In epoch e the samples 0..count-1 are permuted by (seed, e); optimizer step t of the epoch takes the positions [t G, (t+1) G) of the
    permutation, G = batch_size; each of its accumulation steps takes the next B W of these, and rank r the r-th B of them,
    B = G / (W accumulation_steps). So a step sees the same samples for any W and any accumulation; a sample comes at most once per
    epoch, and exactly once when G divides count. Memory is O(1) in count: a Feistel network, walked until it lands below count
    (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, accumulation_steps: int = 1):
        if batch_size < 1 or count < batch_size:
            raise ValueError(f"batch_size must lie between 1 and the number of images; got batch_size={batch_size} and {count} images")
        if batch_size % (world_size * accumulation_steps):
            raise ValueError(
                f"batch_size must be a multiple of ranks x accumulation_steps; got {batch_size} for {world_size} x {accumulation_steps}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, {world_size}); got {rank}")
        self.count, self.batch_size, self.seed, self.rank = count, batch_size, seed, rank
        self.world_size, self.accumulation_steps = world_size, accumulation_steps
        self.batch_per_rank = batch_size // (world_size * accumulation_steps)
        self.steps_per_epoch = count // batch_size

    def epoch(self, micro_step: int) -> int:
        return micro_step // self.accumulation_steps // self.steps_per_epoch

    def samples(self, micro_step: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(epoch, positions within it, samples at these positions), int64 [B] each."""
        step, part = divmod(micro_step, self.accumulation_steps)
        epoch, step = divmod(step, self.steps_per_epoch)
        first = step * self.batch_size + (part * self.world_size + self.rank) * self.batch_per_rank
        positions = np.arange(first, first + self.batch_per_rank)
        return epoch, positions, permuted(positions, self.count, self.seed, epoch)


def permuted(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of [0, count) keyed by (seed, epoch), at `positions` int64 [B] -> int64 [B]."""
    keys = words(seed, epoch, [0], ORDER_STREAM, 2 * _ROUNDS)[0].view(np.uint64)
    bits = max(2, (count - 1).bit_length())
    out = np.asarray(positions).astype(np.uint64)
    walking = np.arange(len(out))
    while walking.size:
        out[walking] = _feistel(out[walking], bits, keys)
        walking = walking[out[walking] >= np.uint64(count)]
    return out.astype(np.int64)


def _feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of [0, 2**bits): the halves differ by a bit where `bits` is odd, and an even number of rounds swaps them back."""
    left_bits, right_bits = bits // 2, bits - bits // 2
    left, right = x >> np.uint64(right_bits), x & np.uint64((1 << right_bits) - 1)
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & np.uint64((1 << left_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return left << np.uint64(right_bits) | right


def _mix(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """MurmurHash3's 64-bit finalizer of x and a round key; its high half."""
    x = x ^ key
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x >> np.uint64(32)
