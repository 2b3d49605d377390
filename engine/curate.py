"""What can be done to a set of images before it is trained on: counted, checked, packed?"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.progress import MofNCompleteColumn, Progress

from fuseer.engine.data.check import check
from fuseer.engine.data.pack import pack
from fuseer.engine.data.sources import Source, index_folder, open_source, shown
from fuseer.engine.distributed import cores
from fuseer.engine.log import console, say

_NAMED = 10
_THREADS = 16
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def index_images(path: str, split: str | None) -> int:
    """Makes and keeps the index of `path` anew, and says what is in it; 1 where a shard is damaged, else 0."""
    began = time.perf_counter()
    source = open_source(path, split, fresh=True)
    labelled, shards = int((source.labels >= 0).sum()), source.members.shards if source.members else []
    if source.members:
        size = int(source.members.sizes.sum())
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            size = sum(pool.map(_size_of, source.paths, chunksize=64))
    where = f" in {len(shards):,} shards" if shards else ""
    say(f"images     {len(source):,}{where}, {size / 1e9:.3g} GB, below {shown(source.root or '/')}")
    say(f"labels     {labelled:,} of {len(source.classes):,} classes{_spread(source)}" if labelled else "labels     none")
    say(f"index      {source.fingerprint()}, kept in {index_folder()}, made in {time.perf_counter() - began:.1f} s")
    _tell_damaged(source)
    return int(bool(source.damaged))


def check_images(path: str, split: str | None, *, pipeline: str, threads: int, report: Path, clean: Path | None) -> int:
    """Decodes every image of `path`; the broken go to the file `report`, the sound to the list `clean`; 1 where one is broken, else 0.

    A line of the report is path, tab, reason; the file is written only where there is something to report. The list is one that `data=`
    takes, with class names; shards cannot be listed.
    """
    if pipeline not in ("auto", "dali", "torchvision"):
        raise ValueError(f"data check: pipeline must be auto, dali or torchvision; got {pipeline}")
    source = open_source(path, split)
    if clean and source.members:
        raise ValueError(f"data check: list={clean} can name files, not members of shards; leave it out")
    if pipeline == "auto":
        pipeline = "dali" if find_spec("nvidia") and find_spec("nvidia.dali") else "torchvision"
    began = time.perf_counter()
    with _bar("checking", len(source)) as advance:
        broken = check(source, pipeline=pipeline, threads=threads or cores(), advance=advance)
    seconds = time.perf_counter() - began
    say(f"{len(source):,} images decoded by Pillow and {pipeline} in {seconds:.1f} s; {len(broken):,} broken")
    lines = [*source.damaged.items(), *((source.paths[at], reason) for at, reason in broken.items())]
    for name, reason in lines[:_NAMED]:
        say(f"  {shown(name)}: {reason}")
    if lines:
        _write(report, "".join(f"{shown(name)}\t{' '.join(reason.split())}\n" for name, reason in lines).encode())
        say(f"all of them with their reasons: {report}")
    if clean:
        _list(source, [at for at in range(len(source)) if at not in broken], clean)
    return int(bool(lines))


def pack_images(path: str, split: str | None, out: Path, *, shard_size: str, max_broken_share: str) -> int:
    """Packs `path` into shards in `out`; 1 where an image was left out because it cannot be read, else 0."""
    try:
        share = float(max_broken_share)
    except ValueError as error:
        raise ValueError(f"data pack: max_broken_share must be a number from 0 to 1; got {max_broken_share}") from error
    shard_bytes, source = _bytes(shard_size), open_source(path, split)
    with _bar("packing", len(source)) as advance:
        packed = pack(source, out, shard_bytes=shard_bytes, max_broken_share=share, advance=advance)
    say(f"{packed.images:,} images, {packed.bytes / 1e9:.3g} GB, in {packed.shards:,} shards, read back and compared: data={out}")
    for name, reason in list(packed.left_out.items())[:_NAMED]:
        say(f"  left out {shown(name)}: {reason}")
    _tell_damaged(source)
    return int(bool(packed.left_out or source.damaged))


def _spread(source: Source) -> str:
    counts, without = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes)), int((source.labels < 0).sum())
    return f", {counts.min():,} to {counts.max():,} images each" + (f"; {without:,} images without" if without else "")


def _bytes(size: str) -> int:
    number = size.rstrip("KMGB")
    if not number.isdecimal() or size[len(number) :] not in _UNITS:
        raise ValueError(f"data pack: shard_size must be a number of bytes, or of KB, MB or GB, as in 256MB; got {size}")
    return int(number) * _UNITS[size[len(number) :]]


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _tell_damaged(source: Source) -> None:
    for path, reason in source.damaged.items():
        say(f"damaged    {shown(path)}: {reason}")


def _list(source: Source, sound: list[int], file: Path) -> None:
    lines, unlisted = [], 0
    for at in sound:
        path, label = os.fsencode(source.paths[at]), source.labels[at]
        listable = not {*b"\t\n"} & {*path}
        unlisted += not listable
        if listable:
            lines.append(path + b"\t" + (os.fsencode(source.classes[label]) if label >= 0 else b"") + b"\n")
    _write(file, b"".join(lines))
    left = f"; {unlisted} sound ones have a tab or line break in their names and are left out" if unlisted else ""
    say(f"list of the {len(lines):,} sound images: data={file}{left}")


def _write(file: Path, data: bytes) -> None:
    aside = file.with_name(f".{file.name}.new")
    aside.write_bytes(data)
    os.replace(aside, file)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar in a terminal, else a line per tenth."""
    done = 0
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            bar.advance(task, count)
            if not console.is_terminal and 10 * before // total < 10 * done // total:
                say(f"{title} {done:,}/{total:,}")

        yield advance
