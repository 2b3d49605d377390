"""Does an index made earlier still hold, or must it be made anew?"""

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from fuseer.engine.data.images import Members, Paths, Source, Stamp
from fuseer.engine.log import say

KEPT_FROM = 20_000
_FORMAT = "1"
# a folder that changes twice within a tick of its file system's clock bears one stamp; 2 s is FAT's tick, the coarsest there is
_SETTLED_NS = 2 * 10**9
_SLOW_S = 2.0
_THREADS = 16


class Index(NamedTuple):
    """A source, and the files and folders that it was made from, with the stamps they bore."""

    source: Source
    witnesses: list[str]
    stamps: list[Stamp]


def kept(key: str, make: Callable[[], Index], cache_dir: Path, *, fresh: bool = False) -> Source:
    """What `make` gives, kept below `cache_dir` under `key` if it holds 20,000 images or more, or if `fresh`, which also makes it anew.

    A kept index holds as long as every witness bears its stamp, and had borne it for two seconds when the index was made. So a file or
    folder added, removed or renamed is noticed wherever the file system keeps modification times of folders, and so is any change of a
    list file or a shard; not a change inside an image, which the reader looks at itself. Processes wait for each other, so that one
    makes the index and the others take it. Where the cache cannot be written, the index is made each time.
    """
    digest = hashlib.blake2b(os.fsencode(key), digest_size=12).hexdigest()
    file = cache_dir / f"index-{digest}.safetensors"
    if not fresh and (found := _loaded(file)):
        return found
    with _alone(cache_dir / f"index-{digest[0]}.lock") as writable:
        if not fresh and (found := _loaded(file)):
            return found
        started, clock = time.time_ns(), time.perf_counter()
        index = make()
        if (seconds := time.perf_counter() - clock) > _SLOW_S:
            say(f"data: {key} indexed in {seconds:.1f} s: {len(index.source):,} images")
        if writable and (fresh or len(index.source) >= KEPT_FROM):
            _save(file, index, started)
    return index.source


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Waits until no other process is inside; False where the folder cannot be written."""
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(lock, "w")), fcntl.LOCK_EX)
            writable = True
        except OSError:
            writable = False
        yield writable


def _save(file: Path, index: Index, started: int) -> None:
    source, members = index.source, index.source.members
    arrays = {
        "names": source.paths.block,
        "ends": source.paths.ends,
        "labels": source.labels,
        "witnesses": np.frombuffer(b"".join(os.fsencode(path) + b"\0" for path in index.witnesses), np.uint8),
        "stamps": np.array(index.stamps, np.int64).reshape(-1, 3),
    }
    about = {"root": source.root, "classes": source.classes, "damaged": source.damaged, "started": started}
    if members:
        arrays |= {"numbers": members.numbers, "offsets": members.offsets, "sizes": members.sizes, "shard_stamps": members.stamps}
        about["shards"] = members.shards
    number, aside = tempfile.mkstemp(prefix=f"{file.stem}-", dir=file.parent)
    os.close(number)
    try:
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(whole, aside, {"format": _FORMAT, "about": json.dumps(about)})
        os.replace(aside, file)
    except OSError as error:
        os.unlink(aside)
        say(f"data: the index could not be kept in {file.parent} ({error.strerror or error}); the next run makes it again")


def _loaded(file: Path) -> Source | None:
    """The index in `file`, mapped into memory; None where there is none, it is damaged or no longer holds."""
    try:
        arrays, metadata = _mapped(file)
        about = json.loads(metadata["about"])
        if metadata["format"] != _FORMAT or not _holds(arrays["witnesses"].tobytes(), arrays["stamps"], about["started"]):
            return None
        members = None
        if "shards" in about:
            members = Members(about["shards"], arrays["shard_stamps"], arrays["numbers"], arrays["offsets"], arrays["sizes"])
        paths = Paths(about["root"], arrays["names"], arrays["ends"])
        return Source(about["root"], paths, arrays["labels"], about["classes"], members, about["damaged"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mapped(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file without reading them, and its metadata."""
    dtypes = {"U8": np.uint8, "I32": np.int32, "I64": np.int64}
    whole = np.asarray(np.memmap(file, np.uint8, "r"))
    begin = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:begin].tobytes())
    metadata, arrays = header.pop("__metadata__"), {}
    for name, entry in header.items():
        first, end = (begin + at for at in entry["data_offsets"])
        arrays[name] = whole[first:end].view(dtypes[entry["dtype"]]).reshape(entry["shape"])
    return arrays, metadata


def _holds(witnesses: bytes, stamps: np.ndarray, started: int) -> bool:
    if (stamps[:, 2] > started - _SETTLED_NS).any():
        return False
    with ThreadPoolExecutor(_THREADS) as pool:
        now = pool.map(lambda path: Stamp.of(os.stat(path)), witnesses.split(b"\0")[:-1], chunksize=64)
        return all(stamp == tuple(then) for stamp, then in zip(now, stamps.tolist(), strict=True))
