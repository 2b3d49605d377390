"""What are the bytes of a sample, and which sample stands in for a broken one?"""

import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from fuseer.engine.data.decodable import DECODE_ERRORS, Examined, decodable, examine
from fuseer.engine.data.images import Place, Source
from fuseer.engine.data.philox import REPLACEMENT_STREAM, uniforms

_DRAWS = 16
_FIRST_IMAGES = 1000
_SOUND, _BROKEN = 1, 2
_SEEN = np.dtype([("bytes", "i8"), ("mtime", "i8"), ("height", "i4"), ("width", "i4"), ("turn", "i1"), ("convert", "?"), ("state", "i1")])


class Sample(NamedTuple):
    """An encoded image that decodes everywhere, upright height and width in pixels, which sample it is, and its label."""

    data: bytes
    height: int
    width: int
    sample: int
    label: int


class Reader:
    """Reads the samples of `source` for the pipelines, and replaces the broken ones. Thread-safe.

    Each image is decoded in full by Pillow when first read, and again when size or modification time of its file change. A broken one is
    replaced by a sample drawn from (seed, epoch, sample asked for) alone, so neither rank nor history changes a batch. `broken` maps
    path -> reason for those met by this process so far, and for the damaged shards of `source`, each of which counts as one broken image;
    `on_broken(path, reason)` is called once for each.

    Reading stops with RuntimeError once more than `max_broken_share` of the distinct images seen are broken, counting at least
    min(1000, len(source)) images as seen and, unless the share is 0, allowing one; or once no image is left.
    """

    def __init__(self, source: Source, max_broken_share: float, seed: int = 0, on_broken: Callable[[str, str], None] | None = None):
        self.source, self.max_broken_share, self.seed, self.on_broken = source, max_broken_share, seed, on_broken
        self.broken: dict[str, str] = {}
        self._seen = np.zeros(len(source), dtype=_SEEN)
        self._seen_count = 0
        self._lock = threading.Lock()
        for path, reason in source.damaged.items():
            self._tell(path, reason)
        if source.damaged:
            self._check_share()

    def read(self, sample: int, epoch: int) -> Sample:
        """The sample, or its replacement in this epoch."""
        for candidate in self._candidates(sample, epoch):
            read = self.examined(candidate)
            if read is not None:
                return read
        raise RuntimeError(f"data: all {len(self.source)} images are broken; {self._first_broken()}")

    def _candidates(self, sample: int, epoch: int) -> Iterator[int]:
        count = len(self.source)
        yield int(sample)
        drawn = (uniforms(self.seed, epoch, [sample], REPLACEMENT_STREAM, _DRAWS)[0] * count).astype(np.int64)
        yield from map(int, drawn)
        yield from ((int(drawn[-1]) + step) % count for step in range(1, count + 1))

    def examined(self, sample: int) -> Sample | None:
        """The sample itself; None where it is broken, with the reason in `broken`."""
        seen, place = self._seen[sample].copy(), None
        try:
            with self.source.opened(sample) as place:
                known = seen["state"] and seen["bytes"] == place.bytes and seen["mtime"] == place.mtime
                if known and seen["state"] == _BROKEN:
                    return None
                data = whole_bytes(place)
            found = Examined(*seen.item()[2:6]) if known else examine(data)
            data = decodable(data, found)
        except DECODE_ERRORS as error:
            self._remember(sample, place, None, _reason(error))
            return None
        if not known:
            self._remember(sample, place, found, "")
        return Sample(data, found.height, found.width, sample, int(self.source.labels[sample]))

    def _remember(self, sample: int, place: Place | None, found: Examined | None, reason: str) -> None:
        path = self.source.paths[sample]
        with self._lock:
            self._seen_count += self._seen[sample]["state"] == 0
            size, mtime = (place.bytes, place.mtime) if place else (-1, -1)
            self._seen[sample] = (size, mtime, *(found or (0, 0, 1, False)), _SOUND if found else _BROKEN)
            if found:
                self.broken.pop(path, None)
                return
            if path in self.broken:
                return
            self._tell(path, reason)
            self._check_share()

    def _tell(self, path: str, reason: str) -> None:
        self.broken[path] = reason
        if self.on_broken:
            self.on_broken(path, reason)

    def _check_share(self) -> None:
        seen = max(self._seen_count, min(_FIRST_IMAGES, len(self.source)))
        if len(self.broken) > max(self.max_broken_share * seen, self.max_broken_share > 0):
            damaged = len(self.source.damaged)
            shards = f" and {damaged} {'shards are' if damaged > 1 else 'shard is'} damaged" if damaged else ""
            raise RuntimeError(
                f"data: {len(self.broken) - damaged} of the {self._seen_count} images read so far are broken{shards}, more than "
                f"data.max_broken_share={self.max_broken_share:g} allows; {self._first_broken()}; mend or remove them, or raise the share"
            )

    def _first_broken(self) -> str:
        first = [f"{shown(path)}: {reason}" for path, reason in list(self.broken.items())[:3]]
        return f"the first: {'; '.join(first)}"


def shown(path: str) -> str:
    """`path` as printable text, whatever bytes its name is made of."""
    return path if path.isprintable() else ascii(path)[1:-1]


def whole_bytes(place: Place) -> bytes:
    """The bytes at a place, all of them; EOFError where there are none, or fewer."""
    parts, at, end = [], place.offset, place.offset + place.bytes
    while at < end and (part := os.pread(place.descriptor, end - at, at)):
        parts.append(part)
        at += len(part)
    if at < end or not place.bytes:
        raise EOFError("is empty" if not place.bytes else f"ended {end - at} bytes early")
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _reason(error: BaseException) -> str:
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)).strip()
    if "cannot identify image file" in text:
        return "is no image of a known format"
    return f"{type(error).__name__}: {text}" if not isinstance(error, (OSError, EOFError)) else text or type(error).__name__
