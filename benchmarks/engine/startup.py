"""How long does a source of a million images take to open, the first time and after that, and how much memory?

python -m benchmarks.engine.startup [images=1000000] [repeats=3] [forget=true] [folder=FOLDER] [store=true]

One set in three shapes: a folder of 1000 class folders of empty files, a list file of them, and 100 tar shards of empty images with labels
(1.5 KB an image), with and without a `.idx` beside each. Every opening is a process of its own; the import of fuseer, which loads torch, is
not counted, nor its memory. `forget` drops the system's cache of files before each, where the process may (as root on Linux).
"""

import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from fuseer.engine.data.sources import open_source
from fuseer.engine.data.tar import index_text, walked_members

OPTIONS = {"images": "1000000", "repeats": "3", "forget": "true", "folder": "", "store": "true"}
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
CLASSES, SHARDS = 1000, 100
FIRST, AGAIN = "first", "again"


def make_folder(root: Path, images: int) -> Path:
    for number in range(CLASSES):
        place = root / f"n{number:08d}"
        place.mkdir(parents=True)
        for i in range(number, images, CLASSES):
            os.close(os.open(f"{place}/n{number:08d}_{i // CLASSES:06d}.JPEG", os.O_CREAT))
    return root


def make_list(file: Path, folder: Path, images: int) -> Path:
    with file.open("w", encoding="utf-8") as opened:
        for i in range(images):
            number = i % CLASSES
            opened.write(f"{folder}/n{number:08d}/n{number:08d}_{i // CLASSES:06d}.JPEG\t{number}\n")
    return file


def make_shards(root: Path, images: int, indexed: bool) -> Path:
    root.mkdir()
    for shard in range(SHARDS):
        path = root / f"{shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(shard, images, SHARDS):
                for kind, data in (("jpg", b""), ("cls", b"%d" % (i % CLASSES))):
                    member = tarfile.TarInfo(f"{i:09d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        if indexed:
            with path.open("rb") as opened:
                path.with_suffix(".idx").write_bytes(index_text(iter(walked_members(opened.fileno()))))
    return root


def age(*roots: Path) -> None:
    """An index of what has changed within two seconds is not kept for good."""
    for root in roots:
        for path in [root, *(Path(entry) for entry in os.scandir(root))] if root.is_dir() else [root]:
            os.utime(path, ns=(0, 10**18))


def forgotten(asked: bool) -> bool:
    """Whether the system has forgotten what it read of the disk."""
    if not (asked and os.access(DROP_CACHES, os.W_OK)):
        return False
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def opened(path: Path, cache: Path) -> dict:
    """In a process of its own: seconds, memory at its peak and thereafter above what the imports took, images."""
    command = [sys.executable, "-m", "benchmarks.engine.startup", "open", str(path), str(cache)]
    return json.loads(subprocess.run(command, cwd=measure.ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def open_here(path: str, cache: str) -> None:
    page, before = resource.getpagesize(), Path("/proc/self/statm").read_text().split()
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began = time.perf_counter()
    source = open_source(path, cache_dir=Path(cache))
    print_of = source.fingerprint()
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    after = Path("/proc/self/statm").read_text().split()
    # resident less shared: a kept index is mapped from the disk, and one copy serves every process
    held = page * (int(after[1]) - int(after[2]) - int(before[1]) + int(before[2]))
    facts = {"seconds": seconds, "peak": peak - peak_before, "held": held, "images": len(source), "fingerprint": print_of}
    measure.say(json.dumps(facts))


def measured(shapes: dict[str, Path], repeats: int, forget: bool, folder: Path) -> list[dict]:
    found: dict[tuple[str, str], list[dict]] = {}
    cold = True
    for turn in range(repeats):
        for name, path in shapes.items():
            cache = folder / f"cache-{turn}"
            for opening in (FIRST, AGAIN):
                cold = forgotten(forget) and cold
                found.setdefault((name, opening), []).append(opened(path, cache))
    for name in shapes:
        prints = {one["fingerprint"] for opening in (FIRST, AGAIN) for one in found[name, opening]}
        if len(prints) > 1:
            raise RuntimeError(f"startup: {name} was not the same source each time")
    machine = measure.header()
    return [
        {
            "op": "startup",
            "case": f"{facts[0]['images']:,} images, {name}",
            "program": opening,
            "seconds": float(f"{statistics.median(one['seconds'] for one in facts):.3g}"),
            "slowest": float(f"{max(one['seconds'] for one in facts):.3g}"),
            "peak_mb": round(max(one["peak"] for one in facts) / 1e6),
            "held_mb": round(max(one["held"] for one in facts) / 1e6),
            "disk": "forgotten before" if cold else "in the system's cache",
            "repeats": repeats,
            **machine,
        }
        for (name, opening), facts in found.items()
    ]


def table(found: list[dict]) -> str:
    """The results as docs/benchmarks.md has them."""
    lines = ["| source | opened | seconds (slowest) | peak, MB | held, MB | files |", "|---|---|---|---|---|---|"]
    for row in found:
        times = f"{row['seconds']:.3g} ({row['slowest']:.3g})"
        lines.append(f"| {row['case']} | {row['program']} | {times} | {row['peak_mb']} | {row['held_mb']} | {row['disk']} |")
    return "\n".join(lines) if found else ""


def main(words: list[str]) -> None:
    options = measure.options("startup", OPTIONS, words)
    images, folder = int(options["images"]), Path(tempfile.mkdtemp(prefix="startup-", dir=options["folder"] or None))
    try:
        tree = make_folder(folder / "folder", images)
        shapes = {
            "folder": tree,
            "list": make_list(folder / "list.txt", tree, images),
            "shards": make_shards(folder / "shards", images, indexed=False),
            "shards with .idx": make_shards(folder / "indexed", images, indexed=True),
        }
        age(*shapes.values())
        found = measured(shapes, int(options["repeats"]), options["forget"] == "true", folder)
    finally:
        shutil.rmtree(folder)
    measure.say(table(found))
    if options["store"] == "true":
        measure.store("startup", found, place=("op", "case", "program", "device"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["open"]:
        open_here(*sys.argv[2:])
    else:
        main(sys.argv[1:])
