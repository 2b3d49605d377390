"""Which images of a source are broken, and why?"""

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from fuseer.engine.data.sources import Reader, Sample, Source

_BATCH = 32
_AHEAD = 4


def check(source: Source, *, pipeline: str, threads: int, advance: Callable[[int], None]) -> dict[int, str]:
    """sample -> reason, of every image that a run with `pipeline` ('dali' or 'torchvision') would replace, or could not survive.

    Each is read and decoded in full as training does it when it first meets it, and the bytes that the pipeline would then be given are
    decoded by its own decoder. `threads` work side by side; `advance(n)` is called after n more images. Damaged shards stand in
    `source.damaged`, not here. Memory: a few batches of 32 encoded images.
    """
    reader = Reader(source, float("inf"))
    decode = _DaliDecoder(threads) if pipeline == "dali" else _pillow
    broken: dict[int, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for first, samples in _ordered(pool, reader, len(source)):
            found = [sample for sample in samples if sample is not None]
            for at, sample in enumerate(samples, first):
                if sample is None:
                    broken[at] = reader.broken[source.paths[at]]
            for sample, reason in zip(found, decode(found), strict=True):
                if reason:
                    broken[sample.sample] = reason
            advance(len(samples))
    return broken


def _ordered(pool: ThreadPoolExecutor, reader: Reader, count: int) -> Iterator[tuple[int, list[Sample | None]]]:
    """(first sample, batch) in order, a few batches read ahead."""
    pending: deque = deque()
    for first in range(0, count, _BATCH):
        pending.append((first, [pool.submit(reader.examined, i) for i in range(first, min(first + _BATCH, count))]))
        if len(pending) > _AHEAD:
            first, batch = pending.popleft()
            yield first, [future.result() for future in batch]
    for first, batch in pending:
        yield first, [future.result() for future in batch]


def _pillow(samples: list[Sample]) -> list[str]:
    """The reason for each that Pillow does not decode, empty for the others."""
    reasons = []
    for sample in samples:
        try:
            with Image.open(io.BytesIO(sample.data)) as image:
                image.load()
            reasons.append("")
        except (OSError, ValueError, SyntaxError) as error:
            reasons.append(str(error))
    return reasons


class _DaliDecoder:
    """The same by DALI, which does not promise that a pipeline survives a broken image: after a failure a new one is made."""

    def __init__(self, threads: int):
        self._threads = threads
        self._pipeline = None

    def __call__(self, samples: list[Sample]) -> list[str]:
        if not samples:
            return []
        try:
            self._run(samples)
        except RuntimeError as error:
            self._pipeline = None
            if len(samples) == 1:
                return [" ".join(str(error).split())[:200]]
            return [reason for sample in samples for reason in self([sample])]
        return [""] * len(samples)

    def _run(self, samples: list[Sample]) -> None:
        if self._pipeline is None:
            self._pipeline = _dali_pipeline(self._threads)
        self._pipeline.feed_input("encoded", [np.frombuffer(sample.data, np.uint8) for sample in samples])
        self._pipeline.run()


def _dali_pipeline(threads: int):
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=_BATCH, num_threads=threads, device_id=None, prefetch_queue_depth=1)
    def graph():
        return fn.decoders.image(fn.external_source(name="encoded"), device="cpu", output_type=types.RGB)

    pipeline = graph()
    pipeline.build()
    return pipeline
