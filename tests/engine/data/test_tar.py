"""Are images and labels found at the right bytes of tar shards, whoever wrote them, and is a damaged one named?"""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from fuseer.engine.data import images
from fuseer.engine.data.sources import Reader, open_source
from fuseer.engine.data.tar import expanded, index_text, indexed_members, walked_members


def png(seed, size=(6, 5)):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def written(path, files, format=tarfile.GNU_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def names(source):
    return [path[len(source.root) + 1 :] for path in source.paths]


def members(path):
    with open(path, "rb") as opened:
        return walked_members(opened.fileno())


LONG = "a/" + "very long name " * 12 + ".png"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_finds_them(tmp_path, format):
    files = {"a/1.png": b"x" * 512, "b/é.jpg": b"y" * 513, "deep/" * 20 + "n.png": b"", "./c/2.cls": b"7"}
    files |= {} if format == tarfile.USTAR_FORMAT else {LONG: b"z" * 5, os.fsdecode(b"\xff\xfe.png"): b"bytes"}
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            member = tarfile.TarInfo(f"no file {kind}")
            member.type, member.linkname = kind, "a/1.png"
            tar.addfile(member)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        told = [(os.fsencode(m.name).removeprefix(b"./"), m.offset_data, m.size) for m in tar if m.isreg()]
    assert [tuple(member) for member in members(path)] == told and len(told) == len(files)


def test_samples_are_grouped_and_labelled(tmp_path):
    first = {"0001.png": png(1), "0001.cls": b"2\n", "0001.mask.png": png(9), "0002.JPG": png(2), "0002.cls": b"0", "0003.txt": b"no image"}
    second = {"0001.json": json.dumps({"label": 1}).encode(), "0001.webp": png(3), ".hidden.png": b"", "0004.png": png(4)}
    written(tmp_path / "s/b.tar", second)
    written(tmp_path / "s/a.tar", first)
    source = open_source(str(tmp_path / "s"))
    assert names(source) == ["a.tar/0001.png", "a.tar/0002.JPG", "b.tar/0001.webp", "b.tar/0004.png"]
    assert source.labels.tolist() == [2, 0, 1, -1] and source.classes == ["0", "1", "2"] and not source.damaged
    (tmp_path / "s/classes.json").write_text(json.dumps(["x", "y", "z"]))
    assert open_source(str(tmp_path / "s")).classes == ["x", "y", "z"]
    (tmp_path / "s/classes.json").write_text(json.dumps(["x"]))
    with pytest.raises(ValueError, match="classes.json must be a list of at least 3 class names"):
        open_source(str(tmp_path / "s"))
    few = source.only([3, 0])
    assert names(few) == ["b.tar/0004.png", "a.tar/0001.png"] and few.labels.tolist() == [-1, 2]
    reader = Reader(few, 0.0)
    assert [reader.read(i, 0).data for i in (0, 1)] == [Reader(source, 0.0).read(i, 0).data for i in (3, 0)]


def test_any_tar_of_images_will_do(tmp_path):
    path = written(tmp_path / "set.tar", {"./dog/a.1.png": png(1), "./dog/a.2.png": png(2), "./1.2/b.png": png(3), "top.png": png(4)})
    source = open_source(str(path))
    assert names(source) == ["set.tar/dog/a.1.png", "set.tar/dog/a.2.png", "set.tar/1.2/b.png", "set.tar/top.png"]
    assert source.classes == ["1.2", "dog"] and source.labels.tolist() == [1, 1, 0, -1]
    reader = Reader(source, 0.0)
    assert np.array_equal(
        [np.asarray(Image.open(io.BytesIO(reader.read(i, 0).data))) for i in range(4)],
        [np.asarray(Image.open(io.BytesIO(png(i)))) for i in (1, 2, 3, 4)],
    )


def test_what_cannot_be_meant_is_refused(tmp_path):
    for files, words in (
        ({"1.png": png(1), "1.jpg": png(2)}, r"two images in one sample, 1\.png and 1\.jpg; rename one"),
        ({"1.png": png(1), "1.cls": b"3", "2.png": png(2), "2.cls": b"dog"}, r"x\.tar/2\.png has the label 'dog', and others are whole"),
        ({"1.png": png(1), "1.cls": b"10000000"}, r"x\.tar/1\.png has the label '10000000'; labels lie below 1,000,000"),
        ({"1.txt": b"text"}, r"no images in .*x\.tar; no member"),
    ):
        with pytest.raises(ValueError, match=words):
            open_source(str(written(tmp_path / "x.tar", files)))
    (tmp_path / "z.tar").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    with pytest.raises(ValueError, match=r"z\.tar is compressed \(gzip\)"):
        open_source(str(tmp_path / "z.tar"))


def test_braces_name_many_shards(tmp_path):
    for i in range(8, 12):
        written(tmp_path / f"s-{i:03d}.tar", {"1.png": png(i)})
    assert names(open_source(str(tmp_path / "s-{009..011}.tar"))) == [f"s-{i:03d}.tar/1.png" for i in (9, 10, 11)]
    assert expanded("a{1..2}/{08..10}.tar") == [f"a{i}/{j}.tar" for i in (1, 2) for j in ("08", "09", "10")]
    assert expanded("{9..11}") == ["9", "10", "11"]
    with pytest.raises(ValueError, match="counts down; write {1..3}"):
        expanded("{3..1}.tar")
    with pytest.raises(ValueError, match=r"s-012\.tar does not exist; give"):
        open_source(str(tmp_path / "s-{011..012}.tar"))


def test_an_idx_is_dalis_and_is_believed_only_if_right(tmp_path):
    wds2idx = pytest.importorskip("wds2idx")
    path = written(tmp_path / "x.tar", {f"d.1/{i}.{kind}": png(i) if kind == "png" else b"1" for i in range(20) for kind in ("png", "cls")})
    with wds2idx.IndexCreator(str(path), str(tmp_path / "x.idx"), verbose=False) as creator:
        creator.create_index()
    assert (tmp_path / "x.idx").read_bytes() == index_text(iter(members(path)))

    def believed():
        with open(path, "rb") as opened:
            return indexed_members(str(path), opened.fileno())

    assert believed() == members(path)
    text = (tmp_path / "x.idx").read_text()
    for wrong in (text.replace("v1.2", "v1.1"), text[:-1], text[:-25], text.replace(" 512 ", " 513 "), text.replace(" 20\n", " 19\n"), ""):
        (tmp_path / "x.idx").write_text(wrong)
        assert believed() == [] and len(open_source(str(path))) == 20
    # one that lacks its end looks right, and the tar is read on from there
    (tmp_path / "x.idx").write_text(text[: text.rindex(" cls")] + "\n")
    source = open_source(str(path))
    assert len(source) == 20 and (source.labels == 1).all()
    (tmp_path / "x.idx").write_text(text)
    os.utime(tmp_path / "x.idx", ns=(0, 0))
    assert believed() == []
    os.utime(tmp_path / "x.idx")
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("e/new.png")
        member.size = 10
        tar.addfile(member, io.BytesIO(bytes(10)))
    os.utime(tmp_path / "x.idx")
    assert names(open_source(str(path)))[-1] == "x.tar/e/new.png"


def test_damaged_shards_give_what_they_have_and_are_named(tmp_path):
    files = {f"{i}.png": png(i) for i in range(6)}
    whole = written(tmp_path / "0.tar", files).read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[: members(tmp_path / "0.tar")[4].offset + 20])
    (tmp_path / "2.tar").write_bytes(whole[: members(tmp_path / "0.tar")[4].offset - 512])
    at = members(tmp_path / "0.tar")[3].offset - 512
    (tmp_path / "3.tar").write_bytes(whole[:at] + b"\xaa" * 1024 + whole[at + 1024 :])
    (tmp_path / "4.tar").write_bytes(b"no tar" * 500)
    (tmp_path / "5.tar").write_bytes(b"")
    source = open_source(str(tmp_path))
    assert [sum(name.startswith(f"{i}.tar") for name in names(source)) for i in range(6)] == [6, 4, 4, 3, 0, 0]
    assert {os.path.basename(path): reason for path, reason in source.damaged.items()} == {
        "1.tar": "is cut off within 4.png, its file 5",
        "2.tar": "is cut off after 4 files: it lacks the zeros that end a tar",
        "3.tar": f"is no tar at byte {at}, after 3 files",
        "4.tar": "is no tar at byte 0, after 0 files",
        "5.tar": "is empty",
    }
    told = []
    reader = Reader(source, 0.5, on_broken=lambda path, reason: told.append(path))
    assert told == list(source.damaged) and reader.broken == source.damaged
    assert all(reader.read(i, 0).sample == i for i in range(len(source)))
    with pytest.raises(RuntimeError, match="0 of the 0 images read so far are broken and 5 shards are damaged, more than .*=0.01"):
        Reader(source, 0.01)


def test_a_shard_that_changes_or_vanishes_does_not_end_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_OPEN_SHARDS", 3)
    for i in range(8):
        written(tmp_path / f"{i}.tar", {f"{j}.png": png(10 * i + j) for j in range(5)})
    source = open_source(str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    reader = Reader(source, 0.5)
    first = [reader.read(i, 0).data for i in range(40)]
    assert len(os.listdir("/proc/self/fd")) == before + 3
    written(tmp_path / "2.tar", {f"{j}.png": png(99) for j in range(6)})
    (tmp_path / "3.tar").unlink()
    reader = Reader(open_source(str(tmp_path)), 0.5)
    (tmp_path / "4.tar").unlink()
    assert len(reader.source) == 36
    old = Reader(source, 0.5)
    used = [old.read(i, 0) for i in range(40)]
    assert {i for i in range(40) if used[i].sample != i} == {*range(10, 25)}
    assert all(used[i].data == first[used[i].sample] for i in range(40))
    reasons = {os.path.dirname(path)[-5:]: reason for path, reason in old.broken.items()}
    assert reasons["2.tar"].startswith("its shard has changed since it was indexed") and "No such file" in reasons["3.tar"]
    del old, reader, source
    assert len(os.listdir("/proc/self/fd")) <= before


def test_fingerprint_tells_places(tmp_path):
    small, large = {"1.png": png(1), "2.png": png(2)}, {"1.png": png(1), "2.png": png(2, (9, 9))}
    first = open_source(str(written(tmp_path / "a/x.tar", small))).fingerprint()
    assert open_source(str(written(tmp_path / "b/x.tar", small))).fingerprint() == first
    assert open_source(str(written(tmp_path / "c/x.tar", large))).fingerprint() != first
    assert open_source(str(written(tmp_path / "d/y.tar", small))).fingerprint() != first
