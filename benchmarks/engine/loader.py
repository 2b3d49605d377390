"""How many images a second do the pipelines turn into views, beside torchvision's and lightly's, and does their memory stay flat?

python -m benchmarks.engine.loader [images=256] [batch=32] [repeats=5] [cores=1,2] [case=NAME] [epochs=50] [store=true]

Every program reads the same JPEGs of 500 x 375 pixels, cut from installed photographs, and makes SwAV's views of them: random resized
crop, flip, jitter (0.8, 0.8, 0.8, 0.2) in 80 % of the views, grey in 20 %, blur with sigma 0.1 to 2 in 50 %, normalisation. The others run
in a DataLoader with one worker process for each core; fuseer's threads are as many; the process and its workers are held on those cores.
Programs take turns in one process: two batches to warm up, then the rest of the images is timed. epochs=0 leaves the memory out.
"""

import ctypes
import gc
import importlib
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import v2

from benchmarks import measure
from fuseer.engine.data.dali import DaliLoader
from fuseer.engine.data.sources import Reader, SampleIndex, open_source
from fuseer.engine.data.torchvision import TorchvisionLoader
from fuseer.engine.data.view import View

OPTIONS = {"images": "256", "batch": "32", "repeats": "5", "cores": "1,2", "case": "", "epochs": "50", "store": "true"}
CASES = {"2×224 + 4×96": (2, 4), "2×224 + 6×96": (2, 6), "2×224": (2, 0)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = (
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)
# Debian's tuxpaint-data, where it is installed
TEMPLATES = Path("/usr/share/tuxpaint/templates")


def photographs() -> list[Image.Image]:
    """Those that installed packages bring."""
    found = [Path(next(iter(importlib.import_module(name.split("/")[0]).__path__))).parent / name for name in PHOTOGRAPHS]
    return [Image.open(path).convert("RGB") for path in [*found, *sorted(TEMPLATES.glob("*.jpg"))]]


def write_images(folder: Path, count: int) -> float:
    """Writes `count` different cuts of the photographs, 500 x 375, quality 92; their mean size in kilobytes."""
    pictures, draw, sizes = photographs(), random.Random(0), []
    for i in range(count):
        picture = pictures[i % len(pictures)]
        width = draw.uniform(0.75, 1) * min(picture.width, picture.height * 4 / 3)
        left, top = draw.uniform(0, picture.width - width), draw.uniform(0, picture.height - 0.75 * width)
        cut = picture.resize((500, 375), Image.Resampling.LANCZOS, box=(left, top, left + width, top + 0.75 * width))
        path = folder / f"{i:04d}.jpg"
        (cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i // len(pictures) % 2 else cut).save(path, quality=92)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes) / 1e3


class OfficialBlur:
    """SwAV's PILRandomGaussianBlur: Pillow's blur, three boxes in place of a Gaussian."""

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))) if random.random() <= 0.5 else image


class Pictures(Dataset):
    """View after view of an image that is decoded once, by transforms of Pillow images or of uint8 tensors."""

    def __init__(self, paths: list[str], counts: tuple[int, int], tensor: bool):
        self.paths, self.tensor = paths, tensor
        blur = v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], 0.5) if tensor else OfficialBlur()
        ends = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.transforms = []
        for size, scale, count in ((224, (0.14, 1.0), counts[0]), (96, (0.05, 0.14), counts[1])):
            jitter = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
            changes = [v2.RandomResizedCrop(size, scale, antialias=True), v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2), blur]
            self.transforms += [v2.Compose([*changes, *([] if tensor else [v2.PILToTensor()]), *ends])] * count

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        if self.tensor:
            image = decode_jpeg(read_file(self.paths[i]), ImageReadMode.RGB)
        else:
            with Image.open(self.paths[i]) as opened:
                image = opened.convert("RGB")
        return [transform(image) for transform in self.transforms]


class Named(Dataset):
    """What lightly's MultiViewCollate takes: (views, label, file name)."""

    def __init__(self, paths: list[str], transform: Callable):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB")), -1, self.paths[i]


class WholeGraph(DaliLoader):
    """All in DALI's CPU operators."""

    def batches(self, start: int) -> Iterator:
        return self.by_graph(start)


def of_fuseer(kind, source, counts: tuple[int, int], batch: int, cores: int) -> Iterator:
    views = [View(size=224, count=counts[0], scale=(0.14, 1.0)), View(size=96, count=max(1, counts[1]), scale=(0.05, 0.14))]
    reader, index = Reader(source, 0.0), SampleIndex(len(source), batch, 0)
    loader = kind(reader, index, views[: 1 + (counts[1] > 0)], mean=MEAN, std=STD, seed=0, threads=cores)
    stream = loader.batches(0)
    try:
        yield from stream
    finally:
        stream.close()
        loader.close()


def of_torch(dataset: Dataset, batch: int, cores: int, collate=None) -> Iterator:
    while True:
        yield from DataLoader(dataset, batch, shuffle=True, num_workers=cores, collate_fn=collate, drop_last=True)


def programs(source, counts: tuple[int, int], batch: int, cores: int) -> dict[str, Callable[[], Iterator]]:
    """{name: function that starts its stream of batches}."""
    paths = list(source.paths)
    ours = {"fuseer dali": DaliLoader, "fuseer torchvision": TorchvisionLoader, "dali operators": WholeGraph}
    found = {name: partial(of_fuseer, kind, source, counts, batch, cores) for name, kind in ours.items()}
    for name, tensor in (("torchvision pil", False), ("torchvision tensor", True)):
        found[name] = partial(of_torch, Pictures(paths, counts, tensor), batch, cores)
    if measure.version("lightly") != "absent":
        from lightly.data.multi_view_collate import MultiViewCollate
        from lightly.transforms.swav_transform import SwaVTransform

        found["lightly"] = partial(of_torch, Named(paths, SwaVTransform(crop_counts=counts)), batch, cores, MultiViewCollate())
    return found


def seconds_of(start: Callable[[], Iterator], batches: int) -> float:
    """Of `batches` batches, after two; the program's threads and processes have ended when it returns."""
    stream = start()
    for _ in range(2):
        next(stream)
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - began
    stream.close()
    gc.collect()
    return seconds


def speeds(source, case: str, batch: int, cores: int, repeats: int) -> list[dict]:
    """One row a program: images a second, and over torchvision's on Pillow."""
    every = os.sched_getaffinity(0)
    if len(every) < cores:
        return []
    os.sched_setaffinity(0, set(sorted(every)[:cores]))
    try:
        started = programs(source, CASES[case], batch, cores)
        batches, seconds = len(source) // batch - 2, {name: [] for name in started}
        for turn in range(repeats):
            names = list(started)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds[name].append(seconds_of(started[name], batches))
    finally:
        os.sched_setaffinity(0, every)
    rates = {name: [batches * batch / each for each in taken] for name, taken in seconds.items()}
    medians = {name: statistics.median(each) for name, each in rates.items()}
    shared = {"repeats": repeats, "images": len(source), "batch": batch}
    return [
        {
            "op": "loader",
            "case": case,
            "program": name,
            "loader_cores": cores,
            "images_per_second": float(f"{medians[name]:.4g}"),
            "slowest": float(f"{min(each):.4g}"),
            "fastest": float(f"{max(each):.4g}"),
            "over_torchvision_pil": float(f"{medians[name] / medians['torchvision pil']:.3g}"),
            **shared,
        }
        for name, each in rates.items()
    ]


def memory(source, batch: int, cores: int, epochs: int) -> list[dict]:
    """Resident megabytes of this process after every tenth of the epochs of each pipeline, once the first has passed."""
    found = []
    for name, kind in (("fuseer dali", DaliLoader), ("fuseer torchvision", TorchvisionLoader)):
        stream = of_fuseer(kind, source, CASES["2×224"], batch, cores)
        after = []
        for epoch in range(epochs):
            for _ in range(len(source) // batch):
                next(stream)
            if epoch % max(1, epochs // 10) == 0:
                gc.collect()
                ctypes.CDLL(None).malloc_trim(0)
                after.append(resident())
        stream.close()
        grown = round(statistics.median(after[-3:]) - statistics.median(after[1:4]), 1)
        told = {"op": "loader_memory", "case": f"{epochs} epochs of 2×224", "program": name, "images": len(source)}
        found.append({**told, "megabytes": after, "grown": grown})
    return found


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def table(rows: list[dict]) -> str:
    lines = ["| views | cores | program | images/s (slowest, fastest) | over torchvision on Pillow |", "|---|---|---|---|---|"]
    for row in rows:
        told = f"{row['images_per_second']:.0f} ({row['slowest']:.0f}, {row['fastest']:.0f})"
        lines.append(f"| {row['case']} | {row['loader_cores']} | {row['program']} | {told} | {row['over_torchvision_pil']:.2f} |")
    return "\n".join(lines)


def read(words: list[str]) -> dict[str, str]:
    options = measure.options("loader", OPTIONS, words)
    if options["case"] not in ("", *CASES):
        raise ValueError(f"loader: case must be one of {', '.join(CASES)}; got {options['case']}")
    return options


def main(words: list[str]) -> None:
    options = read(words)
    torch.set_num_threads(1)
    images, batch, repeats = (int(options[name]) for name in ("images", "batch", "repeats"))
    machine = measure.header()
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        kilobytes = write_images(Path(folder), images)
        source = open_source(folder)
        measure.say(f"{images} JPEGs of 500 x 375 pixels, {kilobytes:.0f} KB in the mean")
        for case in [options["case"]] if options["case"] else CASES:
            for cores in map(int, options["cores"].split(",")):
                found = [{**row, "kilobytes": round(kilobytes, 1), **machine} for row in speeds(source, case, batch, cores, repeats)]
                measure.say(table(found))
                if options["store"] == "true":
                    measure.store("loader", found, place=("op", "case", "program", "loader_cores", "device"))
        if int(options["epochs"]):
            found = [{**row, **machine} for row in memory(source, batch, 2, int(options["epochs"]))]
            for row in found:
                measure.say(f"{row['program']}: {row['case']}: {row['megabytes']} MB, grown by {row['grown']} MB")
            if options["store"] == "true":
                measure.store("loader_memory", found, place=("op", "case", "program", "device"))


if __name__ == "__main__":
    measure.settle_threads()
    main(sys.argv[1:])
