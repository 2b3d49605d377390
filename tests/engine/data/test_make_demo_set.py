"""Does the maker keep the first images with their labels, and say which bytes they unpack to?"""

import gzip
import io
import json
import lzma

import numpy as np
import pytest

from fuseer.engine.data import bundled, make_demo_set


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 50), ("t10k", 30)):
        images, labels = rng.integers(0, 9, (count, 784), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes(), 1))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes(), 1))
    return tmp_path


def test_the_first_rows_are_kept_and_digested(source, tmp_path):
    make_demo_set.make(source, tmp_path / "out", train_images=40, test_images=20)
    rows = np.load(io.BytesIO(lzma.decompress((tmp_path / "out" / bundled.ARCHIVE).read_bytes())), allow_pickle=False)
    full = {"train": bundled.idx_rows(source, "train"), "test": bundled.idx_rows(source, "t10k")}
    assert (rows == np.concatenate([full["train"][:40], full["test"][:20]])).all()
    digests = json.loads((tmp_path / "out" / bundled.DIGESTS).read_text())
    assert digests["demo"] == bundled.digest_of(bundled.png_files({"train": rows[:40], "test": rows[40:]}))
    assert digests["demo-full"] == bundled.digest_of(bundled.png_files(full)) != digests["demo"]
