"""Do shards hold what the folder held, whole or not at all, and does a check find what is broken?"""

import os

import numpy as np
import pytest
from PIL import Image

from fuseer.engine.cli import main
from fuseer.engine.data.check import check
from fuseer.engine.data.pack import _Shard, pack
from fuseer.engine.data.sources import Reader, open_source
from tests.engine.data.test_tar import png


@pytest.fixture
def folder(tmp_path):
    names = ["cat/a.1.png", "cat/a.2.png", "cat/a_1.png", "dog x/b c.png", "top.PNG", "dog x/a.bmp", "dog x/a.png"]
    for i, name in enumerate([*names, os.fsdecode(b"dog x/\xff.png")]):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(png(i))
    return tmp_path / "set"


def packed(folder, out, share=0.0, shard_bytes=400):
    return pack(open_source(str(folder)), out, shard_bytes=shard_bytes, max_broken_share=share, advance=lambda count: None)


def test_shards_hold_the_bytes_and_labels_of_the_folder(folder, tmp_path):
    found = packed(folder, tmp_path / "out")
    before, after = open_source(str(folder)), open_source(str(tmp_path / "out"))
    assert (found.images, found.shards, found.left_out) == (8, len(after.members.shards), {}) and found.shards > 2
    assert after.classes == before.classes == ["cat", "dog x"] and after.labels.tolist() == before.labels.tolist()
    one, other = Reader(before, 0.0), Reader(after, 0.0)
    assert [one.read(i, 0).data for i in range(8)] == [other.read(i, 0).data for i in range(8)]
    assert [os.fsencode(path).partition(b".tar/")[2] for path in after.paths] == [
        b"cat/a_1.png", b"cat/a_2.png", b"cat/a_1_2.png",
        b"dog_x/a.bmp", b"dog_x/a_2.png", b"dog_x/b_c.png", b"dog_x/\xff.png", b"top.png",
    ]  # fmt: skip
    packed(tmp_path / "out", tmp_path / "again", shard_bytes=10**6)
    again = open_source(str(tmp_path / "again"))
    assert again.labels.tolist() == before.labels.tolist() and again.classes == before.classes and len(again.members.shards) == 1
    third = Reader(again, 0.0)
    assert [one.read(i, 0).data for i in range(8)] == [third.read(i, 0).data for i in range(8)]
    assert len(set(again.paths)) == 8
    assert sorted(os.listdir(tmp_path)) == ["again", "out", "set"]


def test_dali_reads_our_shards(folder, tmp_path):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    (folder / "top.PNG").unlink()
    packed(folder, tmp_path / "out", shard_bytes=10**6)
    source = open_source(str(tmp_path / "out"))

    @pipeline_def(batch_size=7, num_threads=1, device_id=None)
    def graph():
        paths = [str(tmp_path / "out" / f"000000.{kind}") for kind in ("tar", "idx")]
        return tuple(fn.readers.webdataset(paths=paths[:1], index_paths=paths[1:], ext=["png;bmp", "cls"]))

    images, classes = graph().run()
    reader = Reader(source, 0.0)
    assert [bytes(np.array(images.at(i))) for i in range(7)] == [png_bytes(source, i) for i in range(7)]
    assert [int(bytes(np.array(classes.at(i)))) for i in range(7)] == source.labels.tolist() == [reader.read(i, 0).label for i in range(7)]


def png_bytes(source, i):
    with source.opened(i) as place:
        return os.pread(place.descriptor, place.bytes, place.offset)


def test_packing_is_all_or_nothing(folder, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_bytes(b"")
    with pytest.raises(ValueError, match="full exists and is not an empty folder; name another"):
        packed(folder, tmp_path / "full")
    with pytest.raises(ValueError, match="shard_size must be at least 1 byte; got 0"):
        packed(folder, tmp_path / "out", shard_bytes=0)
    source = open_source(str(folder))
    (folder / "cat/a.1.png").unlink()
    (folder / "cat/a.2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 8 images cannot be read.*a\.1\.png: No such file or directory; nothing was written"):
        pack(source, tmp_path / "out", shard_bytes=400, max_broken_share=0.1, advance=lambda count: None)
    found = pack(source, tmp_path / "some", shard_bytes=400, max_broken_share=0.25, advance=lambda count: None)
    assert found.images == 6 and list(found.left_out.values()) == ["No such file or directory", "is empty"]
    assert len(open_source(str(tmp_path / "some"))) == 6
    monkeypatch.setattr(_Shard, "_member", lambda self, *given, member=_Shard._member: (member(self, *given), self._added.pop())[0])
    with pytest.raises(RuntimeError, match="000000.tar does not read back as it was written"):
        packed(folder, tmp_path / "out", share=0.5)
    assert sorted(os.listdir(tmp_path)) == ["full", "set", "some"]


def damaged(folder):
    """The folder with seven broken images beside the whole ones -> their names."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "whole.jpg")
    half = (folder / "whole.jpg").read_bytes()[:1500]
    for name, data in (("cut.jpg", half), ("empty.png", b""), ("text.gif", b"text"), ("cut.png", png(1)[:60])):
        (folder / name).write_bytes(data)
    (folder / "folder.jpg").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.png")
    return {"cut.jpg", "cut.png", "empty.png", "folder.jpg", "gone.png", "pipe.png", "text.gif"}


@pytest.mark.parametrize("pipeline", ["torchvision", "dali"])
def test_check_finds_all_that_is_broken(folder, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali")
    bad, told = damaged(folder), []
    source = open_source(str(folder))
    found = check(source, pipeline=pipeline, threads=2, advance=told.append)
    assert {os.path.basename(source.paths[i]) for i in found} == bad and all(found.values())
    assert sum(told) == len(source) == 16


def test_what_only_the_pipelines_decoder_refuses_is_found(folder, monkeypatch):
    monkeypatch.setattr("fuseer.engine.data.check._pillow", lambda samples: ["odd" * (sample.sample == 3) for sample in samples])
    assert check(open_source(str(folder)), pipeline="torchvision", threads=1, advance=lambda count: None) == {3: "odd"}


def test_dali_names_one_of_a_batch_and_goes_on():
    pytest.importorskip("nvidia.dali")
    from fuseer.engine.data.check import _DaliDecoder
    from fuseer.engine.data.sources import Sample

    samples = [Sample(data, 6, 5, i, -1) for i, data in enumerate([png(0), b"\x89PNG no image", png(1), png(2)])]
    decode = _DaliDecoder(1)
    for _ in range(2):
        assert [bool(reason) for reason in decode(samples)] == [False, True, False, False]


def test_commands(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    damaged(folder)
    assert main(["data", "check", "path=set", "list=sound.txt", "pipeline=torchvision"]) == 1
    assert len((tmp_path / "broken.tsv").read_text().splitlines()) == 7
    assert "16 images decoded by Pillow and torchvision" in capsys.readouterr().out
    assert main(["data", "check", "path=sound.txt", "pipeline=torchvision", "report=none.tsv"]) == 0
    assert not (tmp_path / "none.tsv").exists()
    assert main(["data", "pack", "path=sound.txt", "out=shards", "shard_size=1KB"]) == 0
    listed, shards = open_source(str(tmp_path / "sound.txt")), open_source(str(tmp_path / "shards"))
    assert shards.classes == listed.classes == ["cat", "dog x"] and shards.labels.tolist() == listed.labels.tolist()
    capsys.readouterr()
    assert main(["data", "index", "path=shards"]) == 0
    said = capsys.readouterr().out
    assert "images     9 in" in said and "labels     7 of 2 classes, 3 to 4 images each; 2 images without" in said
    assert len(list((tmp_path / "home/.cache/fuseer").glob("index-*.safetensors"))) == 1
    (tmp_path / "shards/000000.tar").write_bytes(b"no tar" * 200)
    assert main(["data", "index", "path=shards"]) == 1 and "damaged    " in capsys.readouterr().out
    for words, said in (
        (["pack", "path=set", "out=x", "shard_size=1KiB"], "must be a number of bytes, or of KB, MB or GB, as in 256MB; got 1KiB"),
        (["pack", "path=set", "out=x", "max_broken_share=few"], "max_broken_share must be a number from 0 to 1; got few"),
        (["check", "path=shards", "list=x"], "can name files, not members of shards; leave it out"),
        (["check", "path=set", "pipeline=pil"], "pipeline must be auto, dali or torchvision; got pil"),
        (["index", "path=nowhere"], "does not exist; give a folder"),
    ):
        assert main(["data", *words]) == 2 and said in capsys.readouterr().err
