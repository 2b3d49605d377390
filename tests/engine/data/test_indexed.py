"""Does a kept index hold exactly as long as nothing that it tells has changed?"""

import os
import threading
import time

import pytest

from fuseer.engine.data import indexed, sources
from fuseer.engine.data.sources import open_source
from tests.engine.data.test_tar import png, written

HOUR = 3600 * 10**9


@pytest.fixture
def made(monkeypatch):
    """The keys of indices that were made, not taken from the cache; every size is kept."""
    monkeypatch.setattr(indexed, "KEPT_FROM", 1)
    found = []
    for name in ("_of_folder", "_of_shards", "read_list"):
        original = getattr(sources, name)
        monkeypatch.setattr(sources, name, lambda *given, original=original, name=name: (found.append(name), original(*given))[1])
    return found


def settled(folder):
    """Makes all that is there an hour old, as stamps see it."""
    then = time.time_ns() - HOUR
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, ns=(then, then))


def same(a, b):
    return list(a.paths) == list(b.paths) and a.labels.tolist() == b.labels.tolist() and a.classes == b.classes and a.root == b.root


def test_folders(tmp_path, made):
    root, cache = tmp_path / "set", tmp_path / "cache"
    for name in ("cat/0.png", "cat/1.png", "dog/deep/2.png", os.fsdecode(b"dog/\xff.png"), "top.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    settled(root)
    first = open_source(str(root), cache_dir=cache)
    again = open_source(str(root), cache_dir=cache)
    assert same(first, again) and first.fingerprint() == again.fingerprint() and made == ["_of_folder"]
    changes = (
        lambda: (root / "dog/deep/3.png").write_bytes(b""),
        lambda: (root / "cat/1.png").unlink(),
        lambda: (root / "top.png").rename(root / "tip.png"),
        lambda: (root / "cat").rename(root / "cow"),
        lambda: (root / "eel").mkdir(),
    )
    for i, change in enumerate(changes):
        before = open_source(str(root), cache_dir=cache)
        assert len(made) == 1 + i
        change()
        after = open_source(str(root), cache_dir=cache)
        assert len(made) == 2 + i and (i == 4 or not same(before, after))
        settled(root)
        open_source(str(root), cache_dir=cache, fresh=True)
        made.pop()
    (root / "dog/deep/2.png").write_bytes(b"another content is the reader's concern")
    open_source(str(root), cache_dir=cache)
    assert len(made) == 6


def test_an_index_of_what_has_just_changed_is_not_believed(tmp_path, made):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/1.png").write_bytes(b"")
    for _ in range(2):
        open_source(str(tmp_path / "set"), cache_dir=tmp_path / "cache")
    assert made == ["_of_folder"] * 2


def test_lists_and_shards(tmp_path, made):
    root, cache = tmp_path / "set", tmp_path / "cache"
    for i in range(2):
        written(root / f"{i}.tar", {"1.png": png(i), "1.cls": b"0", "2.png": png(i + 5), "2.cls": b"1"})
    (root / "list.txt").write_text("a.png 1\n")
    (root / "a.png").write_bytes(b"")
    for path, name in ((root / "{0..1}.tar", "_of_shards"), (root / "list.txt", "read_list")):
        settled(root)
        made.clear()
        first, again = (open_source(str(path), cache_dir=cache) for _ in range(2))
        assert same(first, again) and made == [name] and first.fingerprint() == again.fingerprint()
        if name == "_of_shards":
            with first.opened(3) as here, again.opened(3) as there:
                assert here[1:] == there[1:]
            written(root / "1.tar", {"1.png": png(8)})
        else:
            path.write_text("a.png 2\n")
        changed = open_source(str(path), cache_dir=cache)
        assert made == [name] * 2 and not same(first, changed)


def test_a_damaged_or_unwritable_cache_costs_time_only(tmp_path, made):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/1.png").write_bytes(b"")
    settled(tmp_path / "set")
    cache = tmp_path / "cache"
    open_source(str(tmp_path / "set"), cache_dir=cache)
    (file,) = cache.glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-3], whole[:40], b"", b"\xff" * 100, whole.replace(b'"format":"1"', b'"format":"0"')):
        file.write_bytes(damaged)
        made.clear()
        assert len(open_source(str(tmp_path / "set"), cache_dir=cache)) == 1 and made == ["_of_folder"]
        assert file.stat().st_size == len(whole)
    made.clear()
    (tmp_path / "file").write_bytes(b"")
    for _ in range(2):
        assert len(open_source(str(tmp_path / "set"), cache_dir=tmp_path / "file")) == 1
    assert made == ["_of_folder"] * 2


def test_of_many_processes_one_makes_the_index(tmp_path, made, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/1.png").write_bytes(b"")
    settled(tmp_path / "set")
    quick = sources._of_folder
    monkeypatch.setattr(sources, "_of_folder", lambda root: (time.sleep(0.2), quick(root))[1])
    # file locks bind open files, so that threads stand for processes
    threads = [threading.Thread(target=open_source, args=(str(tmp_path / "set"), None, tmp_path / "cache")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == ["_of_folder"]
