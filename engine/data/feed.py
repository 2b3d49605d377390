"""Which bytes and which drawn parameters make up micro-batch m, read ahead of time?"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, fields
from itertools import count
from typing import Any, Literal

import numpy as np
import torch

from fuseer.engine.data.draw import Drawn, draw
from fuseer.engine.data.pixels import scale_of
from fuseer.engine.data.view import View

_PART = 32


@dataclass(eq=False)
class Feed:
    """What both pipelines are made from: encoded samples and the parameters of all their views, prepared ahead in threads.

    reader: `sources.Reader`; index: `sources.SampleIndex`; mean and std per channel on the scale 0..1; seed of the augmentation; device
    of the crops, None for the CPU; threads that read, decode and augment; prefetch_batches prepared ahead of the one in use; masks:
    `masks.open_masks`, needed where a view has its background replaced, by the mean colour.
    A micro-batch is prepared in parts of at most 32 samples, in any order by any thread; what comes of them, errors included,
    arrives in the one order of `index`. Raises ValueError for a count below 1,
    and for such a view without masks.
    """

    reader: Any
    index: Any
    views: list[View]
    _: KW_ONLY
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    seed: int
    device: torch.device | int | None = None
    threads: int = 1
    prefetch_batches: int = 2
    dtype: Literal["float32", "float16"] = "float32"
    masks: Callable[[Any], np.ndarray] | None = None

    def __post_init__(self):
        if self.threads < 1 or self.prefetch_batches < 1:
            raise ValueError(f"data: threads and prefetch_batches must be at least 1; got {self.threads} and {self.prefetch_batches}")
        if self.masks is None and any(view.background_removal for view in self.views):
            raise ValueError("data: a view has background_removal above 0, and nothing says what the background is; set data.masks")
        self.device = torch.device("cpu" if self.device is None else self.device)
        self.dtype_of_crops = {"float32": torch.float32, "float16": torch.float16}[self.dtype]
        self.scale = scale_of(self.mean, self.std)
        self.fill = np.rint(self.scale[0]).astype(np.uint8)
        self._parts = -(-self.index.batch_per_rank // _PART)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fuseer-data")

    def prepared(self, start: int, work: Callable) -> Iterator[tuple[int, list]]:
        """(epoch, [work(samples, drawn) of each part]) of micro-steps start, start + 1, … without end.

        samples: list of `sources.Sample`; drawn[i][j]: `Drawn` of the j-th view that views[i] asks for.
        """

        def part(micro_step: int, number: int):
            epoch, _, asked = self.index.samples(micro_step)
            asked = asked[number * _PART : (number + 1) * _PART]
            samples = [self.reader.read(sample, epoch) for sample in asked]
            return work(samples, self._draw(samples, asked, epoch))

        done = self._ordered(part, ((micro_step, number) for micro_step in count(start) for number in range(self._parts)))
        for micro_step in count(start):
            yield self.index.epoch(micro_step), [next(done) for _ in range(self._parts)]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def masks_of(self, samples: list, drawn: list[list[Drawn]]) -> list[np.ndarray | None]:
        """uint8 [height, width] of each sample of which some view replaces the background, 128 and above where it stays."""
        wanted = np.zeros(len(samples), bool)
        for view, copies in zip(self.views, drawn, strict=True):
            for copy in copies if view.background_removal else ():
                wanted |= copy.remove
        return [self.masks(sample) if use else None for sample, use in zip(samples, wanted, strict=True)]

    def _draw(self, samples: list, asked: np.ndarray, epoch: int) -> list[list[Drawn]]:
        sizes = [(sample.height, sample.width) for sample in samples]
        drawn, first = [], 0
        for view in self.views:
            drawn.append([draw(view, first + copy, sizes, asked, self.seed, epoch) for copy in range(view.count)])
            first += view.count
        return drawn

    def _ordered(self, work: Callable, jobs: Iterable[tuple]) -> Iterator:
        pending: deque = deque()
        try:
            for job in jobs:
                pending.append(self._pool.submit(work, *job))
                if len(pending) > self._parts * self.prefetch_batches:
                    yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def joined(parts: list[Drawn]) -> Drawn:
    """One `Drawn` of all samples of `parts`, in order."""
    return Drawn(**{field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Drawn)})


def slice_of(drawn: Drawn, rows: slice) -> Drawn:
    """The `Drawn` of some of its samples."""
    return Drawn(**{field.name: getattr(drawn, field.name)[rows] for field in fields(Drawn)})


def without_background(pixels: np.ndarray, mask: np.ndarray, fill: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] with `fill` [3] where mask [h, w] is below 128."""
    return np.where(mask[..., None] >= 128, pixels, fill)
