"""Is a list file read as it was meant, and every bad line named by its number?"""

import os

import numpy as np
import pytest
from PIL import Image

from fuseer.engine.data.sources import Reader, open_source


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b c.png", "sub/é.png", "sub/x 12.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 5), len(name), np.uint8)).save(tmp_path / name)
    Image.fromarray(np.zeros((4, 5), np.uint8)).save(os.fsencode(tmp_path) + b"/\xff.png", "PNG")
    return tmp_path


def listed(folder, text):
    (folder / "list.txt").write_bytes(text)
    return open_source(str(folder / "list.txt"))


def test_lines_are_paths_with_or_without_labels(folder):
    elsewhere = folder.parent / "elsewhere.png"
    text = b"# comment\r\n\xff.png\r\n\nb c.png 3\n\nsub/x 12.png\t1\nsub/\xc3\xa9.png  0\na.png\t\n"
    source = listed(folder, b"\xef\xbb\xbf" + text + os.fsencode(folder) + b"/sub/../a.png")
    assert [os.fsencode(path[len(source.root) + 1 :]) for path in source.paths] == [
        b"\xff.png", b"b c.png", b"sub/x 12.png", b"sub/\xc3\xa9.png", b"a.png", b"sub/../a.png",
    ]  # fmt: skip
    assert source.labels.tolist() == [-1, 3, 1, 0, -1, -1] and source.classes == ["0", "1", "2", "3"]
    reader = Reader(source, 0.0)
    assert [reader.read(i, 0).sample for i in range(6)] == list(range(6))
    named = listed(folder, b"a.png\tdog\nb c.png\tbig cat\nsub/\xc3\xa9.png\n")
    assert named.classes == ["big cat", "dog"] and named.labels.tolist() == [1, 0, -1]
    absolute = listed(folder, b"a.png\n" + os.fsencode(elsewhere) + b"\n")
    assert list(absolute.paths) == [str(folder / "a.png"), str(elsewhere)]


def test_bad_lines_are_named(folder):
    for text, words in (
        (b"a.png\nb c.png cat\nx\na.png\n", r"line 2 is no image path, for 'b c.png cat'.*; line 3 .*; line 4 repeats 'a.png' of line 1"),
        (b"a.png\t1\nb c.png\tcat\n", r"line 2 has the label 'cat', and others are whole numbers"),
        (b"a.png 1000000\n", "line 1 has the label '1000000'; labels lie below 1,000,000"),
        (b"# nothing\n\n", "names no images; write one path a line"),
        (b"x/1.png\nx/2.png\n", r"x/1\.png and others do not exist; paths are relative to the list's own folder"),
        (b"x\n" * 9, "and 6 more such lines"),
    ):
        with pytest.raises(ValueError, match=words):
            listed(folder, text)


def test_a_vanished_file_of_a_list_is_replaced(folder):
    source = listed(folder, b"a.png\ngone.png\nb c.png\n")
    reader = Reader(source, 0.5)
    assert reader.read(1, 0).sample != 1 and list(reader.broken.values()) == ["No such file or directory"]
