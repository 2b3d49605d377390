"""Is the demo set unpacked whole, once, and mended when damaged?"""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fuseer.engine.data import bundled
from fuseer.engine.data.sources import open_source


def unpack(cache_dir: str, answers) -> None:
    answers.put(open_source("demo", cache_dir=Path(cache_dir)).fingerprint())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Unpacked by two processes at the same time."""
    folder = tmp_path_factory.mktemp("cache")
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    ranks = [spawn.Process(target=unpack, args=(str(folder), answers)) for _ in range(2)]
    for rank in ranks:
        rank.start()
    assert len({answers.get(timeout=120) for _ in ranks}) == 1
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    return folder


def test_it_is_the_first_images_of_fashion_mnist(cache):
    assert len(list(cache.glob("demo-*"))) == 1 and not list(cache.glob("unpacking-*"))
    train, test = open_source("demo", cache_dir=cache), open_source("demo", "test", cache)
    assert (len(train), len(test)) == (10_000, 2_000)
    assert train.classes == test.classes == sorted(bundled.CLASSES)
    rows = bundled.rows_by_split("demo")
    assert [len(rows[split]) for split in ("train", "test")] == [10_000, 2_000]
    for source, table in ((train, rows["train"]), (test, rows["test"])):
        assert (np.bincount(source.labels)[[source.classes.index(name) for name in bundled.CLASSES]] == np.bincount(table[:, 0])).all()
        for i in range(0, len(source), 499):
            row = table[int(Path(source.paths[i]).stem)]
            assert source.classes[source.labels[i]] == bundled.CLASSES[row[0]]
            image = Image.open(source.paths[i])
            assert image.mode == "L" and (np.asarray(image).reshape(-1) == row[1:]).all()


def test_the_archive_is_small_and_licensed():
    folder = Path(bundled.__file__).parent / "demo"
    assert (folder / bundled.ARCHIVE).stat().st_size <= 6_000_000
    licence = (folder / "LICENSE-fashion-mnist").read_text()
    assert "2017, Zalando SE" in licence and "WITHOUT WARRANTY OF ANY KIND" in licence


def test_any_damage_is_mended_and_only_then_written(tmp_path, monkeypatch):
    rows = {split: np.repeat(np.arange(40, dtype=np.uint8)[:, None] % 10, 785, axis=1) for split in ("train", "test")}
    digest = bundled.digest_of(bundled.png_files(rows))
    monkeypatch.setattr(bundled, "_bundled", lambda name: json.dumps({"demo": digest}).encode())
    monkeypatch.setattr(bundled, "rows_by_split", lambda name: rows)
    cache = tmp_path
    folder = bundled.unpacked("demo", cache)
    stamp = folder.stat().st_ino
    assert bundled.unpacked("demo", cache).stat().st_ino == stamp
    victims = sorted(folder.rglob("*.png"))
    good = victims[7].read_bytes()
    for damage in (
        lambda: victims[7].write_bytes(good[:400] + bytes([good[400] ^ 1]) + good[401:]),
        lambda: victims[7].unlink(),
        lambda: (folder / "train" / "Bag" / "extra.png").write_bytes(good),
    ):
        damage()
        assert bundled.unpacked("demo", cache) == folder and bundled.folder_digest(folder) == digest
        assert victims[7].read_bytes() == good and not (folder / "train" / "Bag" / "extra.png").exists()
        assert not list(cache.glob("unpacking-*"))
    assert folder.stat().st_ino != stamp


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="data.path=demo: cannot unpack into .*file/cache: "):
        open_source("demo", cache_dir=tmp_path / "file" / "cache")


def test_the_whole_set_names_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "DEBIAN_FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match="apt install dataset-fashion-mnist, or use demo"):
        open_source("demo-full", cache_dir=tmp_path / "cache")
