"""Is every sample dealt once an epoch, whatever the source, the ranks and the interruptions, and is nothing left behind?"""

import gc
import itertools
import os
import threading
import tracemalloc

import pytest

from fuseer.engine.data.dali import DaliLoader
from fuseer.engine.data.pack import pack
from fuseer.engine.data.sources import Reader, SampleIndex, open_source
from fuseer.engine.data.torchvision import TorchvisionLoader
from fuseer.engine.data.view import View
from tests.engine.data.test_tar import png
from tests.pipelines import needs_dali
from tests.ranks import on_ranks

BATCH, SEED = 12, 7
VIEW = View(size=4, count=1, scale=(1, 1), flip=0, jitter=0, grayscale=0, blur=0)
KINDS = [TorchvisionLoader, pytest.param(DaliLoader, marks=needs_dali)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The paths of one set of 60 images as a folder, as shards and as a list file, the first two images being broken."""
    folder = tmp_path_factory.mktemp("exact")
    (folder / "set").mkdir()
    for i in range(60):
        (folder / "set" / f"{i:02d}.png").write_bytes(png(i) if i > 1 else b"broken")
    source = open_source(str(folder / "set"))
    pack(source, folder / "shards", shard_bytes=2000, max_broken_share=0, advance=lambda count: None)
    (folder / "list.txt").write_text("".join(f"{path}\n" for path in source.paths))
    return [str(folder / name) for name in ("set", "shards", "list.txt")]


def made(kind, path, rank=0, world_size=1, broken_share=0.5):
    source = open_source(path)
    index = SampleIndex(len(source), BATCH, SEED, rank, world_size)
    return kind(Reader(source, broken_share, SEED), index, [VIEW], mean=(0, 0, 0), std=(1, 1, 1), seed=SEED, threads=2)


def taken(kind, path, rank, world_size, first, count):
    """[(epoch, samples, sums of the pixels)] of the micro-steps first … first + count - 1 of one rank."""
    loader = made(kind, path, rank, world_size)
    stream = loader.batches(first)
    found = [(b.epoch, b.samples.tolist(), b.crops[0].double().sum((0, 2, 3, 4)).tolist()) for b in itertools.islice(stream, count)]
    stream.close()
    loader.close()
    return found


def as_ranks(rank, paths):
    """What this process sees as rank `rank` of worlds of 2, 3 and 4: two epochs of 5 steps, the second begun at step 3 by a world of 3."""
    found = {}
    for path in paths:
        if rank < 2:
            found[path, 2] = taken(TorchvisionLoader, path, rank, 2, 0, 10)
            found[path, "before"] = taken(TorchvisionLoader, path, rank, 2, 0, 8)
        if rank < 3:
            found[path, "after"] = taken(TorchvisionLoader, path, rank, 3, 8, 2)
        found[path, 4] = taken(TorchvisionLoader, path, rank, 4, 0, 10)
    return found


def joined(ranks, key):
    """Per step what all ranks together saw, in rank order."""
    steps = zip(*(found[key] for found in ranks if key in found), strict=True)
    return [(step[0][0], sum((part[1] for part in step), []), sum((part[2] for part in step), [])) for step in steps]


def test_ranks_share_an_epoch_and_a_resumed_run_goes_on_exactly(sources):
    ranks = on_ranks(4, as_ranks, sources)
    for path in sources:
        whole = taken(TorchvisionLoader, path, 0, 1, 0, 10)
        assert joined(ranks, (path, 2)) == joined(ranks, (path, 4)) == whole
        assert joined(ranks, (path, "before")) + joined(ranks, (path, "after")) == whole
        for epoch in (0, 1):
            asked = [SampleIndex(60, BATCH, SEED).samples(step)[2] for step in range(5 * epoch, 5 * epoch + 5)]
            seen = [sample for number, samples, _ in whole if number == epoch for sample in samples]
            assert sorted(sample for samples in asked for sample in samples) == list(range(60))
            # each broken image has one stand-in, and every other sample comes once as itself
            assert set(range(2, 60)) <= set(seen) and len(seen) == 60
            assert [s for s, a in zip(seen, itertools.chain(*asked), strict=True) if a > 1] == [a for a in itertools.chain(*asked) if a > 1]
    folder, shards, listed = ([samples for _, samples, _ in taken(TorchvisionLoader, path, 0, 1, 0, 10)] for path in sources)
    assert folder == shards == listed


@needs_dali
def test_dali_deals_the_same_samples(sources):
    for path in sources:
        dali, twin = (taken(kind, path, 1, 2, 3, 4) for kind in (DaliLoader, TorchvisionLoader))
        assert [step[:2] for step in dali] == [step[:2] for step in twin]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_and_an_early_end_leave_no_thread_and_no_file(sources, kind):
    for path in sources[:2]:
        taken(kind, path, 0, 1, 0, 1)  # what libraries open for good, they have opened
        gc.collect()
        threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
        loader = made(kind, path, broken_share=0.0)
        with pytest.raises(RuntimeError, match="broken, more than data.max_broken_share=0 allows"):
            list(itertools.islice(loader.batches(0), 6))
        loader.close()
        loader = made(kind, path)
        stream = loader.batches(0)
        next(stream)
        stream.close()
        loader.close()
        del loader, stream
        gc.collect()
        assert set(threading.enumerate()) <= threads
        assert len(os.listdir("/proc/self/fd")) <= files


def test_fifty_epochs_take_no_more_than_five(sources):
    readers = [Reader(open_source(path), 0.5) for path in sources]
    held = []
    tracemalloc.start()
    try:
        for epoch in range(51):
            for reader in readers:
                for sample in range(60):
                    reader.read(sample, epoch)
            if epoch in (5, 50):
                gc.collect()
                held.append((tracemalloc.get_traced_memory()[0], len(os.listdir("/proc/self/fd")), threading.active_count()))
    finally:
        tracemalloc.stop()
    assert held[1][1:] == held[0][1:] and held[1][0] - held[0][0] < 20_000
