"""Is every image of a folder found once, read or replaced for good reasons, and dealt out by arithmetic?"""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from fuseer.engine.data.sources import Reader, SampleIndex, open_source, permuted, shown


def picture(path, seed=0, size=(8, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)


@pytest.fixture
def flat(tmp_path):
    for i in range(40):
        picture(tmp_path / f"{i:02d}.png", i)
    return tmp_path


def names(source):
    return [path[len(source.root) + 1 :] for path in source.paths]


def test_flat_folder_is_sorted_by_bytes_and_without_labels(tmp_path):
    for name in ("é.JPG", "b.png", "B.png", "a\nb.jpeg", "10.png", "9.png", ".hidden.png", "notes.txt", "x.tar"):
        (tmp_path / name).write_bytes(b"")
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.png", os.O_CREAT))
    source = open_source(str(tmp_path))
    assert names(source) == ["10.png", "9.png", "B.png", "a\nb.jpeg", "b.png", "é.JPG", os.fsdecode(b"\xff.png")]
    assert source.classes == [] and (source.labels == -1).all() and len(source) == 7
    assert all(shown(path).isprintable() and shown(path).encode() for path in source.paths)


def test_class_folders_any_depth_links_and_loops(tmp_path):
    root = tmp_path / "set"
    for name in ("dog/1.png", "dog/deep/er/2.png", "cat/3.png", "top.png", "empty/readme.txt", "cat-x/5.png", "cat.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/4.png").write_bytes(b"")
    (root / "eel").symlink_to(tmp_path / "elsewhere")
    (root / "dog/loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    source = open_source(str(root))
    assert names(source) == ["cat-x/5.png", "cat.png", "cat/3.png", "dog/1.png", "dog/deep/er/2.png", "eel/4.png", "top.png"]
    assert source.classes == ["cat", "cat-x", "dog", "eel"] and source.labels.tolist() == [1, -1, 0, 2, 2, 3, -1]


def test_splits(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png"):
        picture(tmp_path / name)
    assert names(open_source(str(tmp_path))) == names(open_source(str(tmp_path), "train")) == ["a/1.png", "b/2.png"]
    assert names(open_source(str(tmp_path), "test")) == names(open_source(str(tmp_path), "val")) == ["a/3.png"]
    (tmp_path / "val/a/3.png").unlink()
    assert open_source(str(tmp_path)).classes == ["train"]
    with pytest.raises(ValueError, match="has no test split; it needs sub-folders train and test"):
        open_source(str(tmp_path), "test")
    with pytest.raises(ValueError, match="split must be train, test or val; got dev"):
        open_source(str(tmp_path), "dev")


def test_folders_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no images below .*; looked for files ending in .*jpg"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match="gone does not exist; give a folder"):
        open_source(str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="notes.txt: line 1 is no image path, for 'no image' has no known suffix"):
        open_source(str(tmp_path / "notes.txt"))
    (tmp_path / "x.jpg").write_bytes(b"\xff\xd8\0")
    with pytest.raises(ValueError, match="x.jpg is neither a folder, a .tar nor a text file"):
        open_source(str(tmp_path / "x.jpg"))
    with pytest.raises(ValueError, match="x.jpg has no test split; it needs to be a folder"):
        open_source(str(tmp_path / "x.jpg"), "test")
    with pytest.raises(ValueError, match=r"/0.tar does not exist, nor do 2 more of 3 shards"):
        open_source(str(tmp_path / "{0..2}.tar"))


def test_fingerprint_tells_names_not_places(flat, tmp_path_factory):
    first = open_source(str(flat)).fingerprint()
    moved = shutil.copytree(flat, tmp_path_factory.mktemp("other") / "copy")
    assert open_source(str(moved)).fingerprint() == first
    (moved / "00.png").rename(moved / "00b.png")
    assert open_source(str(moved)).fingerprint() != first


def damage(folder):
    """kind -> name of a file of `folder` that is broken in that way."""
    whole = (folder / "00.png").read_bytes()
    (folder / "01.png").write_text("this is text")
    (folder / "02.png").write_bytes(whole[: len(whole) // 2])
    (folder / "03.png").write_bytes(b"")
    (folder / "04.png").unlink()
    (folder / "05.png").unlink()
    (folder / "05.png").mkdir()
    (folder / "06.png").unlink()
    os.mkfifo(folder / "06.png")
    (folder / "07.png").unlink()
    (folder / "07.png").symlink_to(folder / "07.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "08.jpg")
    (folder / "08.png").write_bytes((folder / "08.jpg").read_bytes()[:1500])
    (folder / "08.jpg").unlink()


def test_broken_images_are_replaced_named_once_and_independent_of_history(flat):
    source = open_source(str(flat))
    damage(flat)
    told = []
    reader = Reader(source, 0.5, seed=3, on_broken=lambda path, reason: told.append((path, reason)))
    order = [*range(40), *range(40)]
    used = {i: reader.read(i, epoch=2).sample for i in order}
    bad = set(range(1, 9))
    assert {source.paths.index(path) for path in reader.broken} == bad == {i for i in used if used[i] != i}
    assert not bad & set(used.values())
    assert sorted(told) == sorted(reader.broken.items()) and all(reason for _, reason in told)
    assert reader.broken[source.paths[1]] == "is no image of a known format"
    assert reader.broken[source.paths[3]] == "is empty" and reader.broken[source.paths[5]] == "is not a file"
    for i in bad:
        assert Reader(source, 0.5, seed=3).read(i, epoch=2).sample == used[i]
    elsewhere = [[Reader(source, 0.5, seed=seed).read(i, epoch).sample for i in bad] for seed, epoch in ((3, 3), (4, 2))]
    assert all(replaced != [used[i] for i in bad] for replaced in elsewhere)


def test_share_of_broken_images_stops_reading(flat):
    source = open_source(str(flat))
    for i in range(3):
        (flat / f"{i:02d}.png").write_text("text")
    with pytest.raises(RuntimeError, match=r"^data: 1 of the 1 images read so far are broken, more than data.max_broken_share=0 allows"):
        Reader(source, 0.0).read(0, 0)
    one = Reader(source, 0.01)
    one.read(0, 0)
    with pytest.raises(RuntimeError, match=r"2 of the .*00.png: is no image of a known format; .*01.png.*; mend or remove them"):
        one.read(1, 0)
    generous = Reader(source, 3 / 40)
    for i in range(40):
        generous.read(i, 0)
    assert len(generous.broken) == 3


def test_all_images_broken(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_text("text")
    reader = Reader(open_source(str(tmp_path)), 0.99)
    with pytest.raises(RuntimeError, match="5 of the 5 images|all 5 images are broken"):
        reader.read(0, 0)


def test_a_file_that_changes_is_checked_again(flat):
    source = open_source(str(flat))
    reader, path = Reader(source, 0.5), flat / "00.png"
    assert (reader.read(0, 0).height, reader.read(0, 0).width) == (6, 8)
    picture(path, 1, size=(5, 3))
    assert (reader.read(0, 0).height, reader.read(0, 0).width) == (3, 5)
    path.write_text("text")
    assert reader.read(0, 0).sample != 0 and str(path) in reader.broken
    picture(path, 2, size=(4, 4))
    assert reader.read(0, 0).sample == 0 and str(path) not in reader.broken
    sizes = []
    for turned in ((8, 4), (4, 8)):
        Image.new("L", turned).save(path, "BMP")
        os.utime(path, ns=(0, turned[0] * 10**9))
        assert (reader.read(0, 0).width, reader.read(0, 0).height) == turned
        sizes.append(path.stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 63, 64, 65, 1000])
def test_order_is_a_permutation(count):
    orders = [permuted(np.arange(count), count, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert sorted(order) == list(range(count))
    if count > 60:
        assert all((a != b).mean() > 0.8 for a, b in zip(orders, [*orders[1:], np.arange(count)], strict=True))


def test_order_is_uniform_and_works_at_a_billion():
    at_two = np.array([permuted(np.array([2, 5]), 7, 0, epoch) for epoch in range(3000)])
    pairs = np.bincount(at_two[:, 0] * 7 + at_two[:, 1], minlength=49).reshape(7, 7)
    assert (np.diag(pairs) == 0).all()
    off = pairs[~np.eye(7, dtype=bool)]
    assert ((off - 3000 / 42) ** 2 / (3000 / 42)).sum() < 41 + 5 * np.sqrt(2 * 41)
    far = permuted(np.arange(10**9 - 4096, 10**9), 10**9, 0, 0)
    assert len(set(far.tolist())) == 4096 and far.min() >= 0 and far.max() < 10**9
    assert abs(far.mean() / 10**9 - 0.5) < 5 * np.sqrt(1 / 12 / 4096)


def test_every_world_size_and_accumulation_deals_the_same_steps():
    count, batch = 53, 8
    whole = [SampleIndex(count, batch, 5).samples(step) for step in range(13)]
    assert [epoch for epoch, _, _ in whole] == [0] * 6 + [1] * 6 + [2]
    for world, parts in ((2, 1), (4, 1), (1, 2), (2, 2), (2, 4), (8, 1)):
        ranks = [SampleIndex(count, batch, 5, rank, world, parts) for rank in range(world)]
        for step, (epoch, positions, samples) in enumerate(whole):
            dealt = [index.samples(step * parts + part) for part in range(parts) for index in ranks]
            assert {one[0] for one in dealt} == {epoch}
            assert (np.concatenate([one[1] for one in dealt]) == positions).all()
            assert (np.concatenate([one[2] for one in dealt]) == samples).all()
    first = np.concatenate([samples for _, _, samples in whole[:6]])
    assert len(set(first.tolist())) == 48
    exact = np.concatenate([SampleIndex(56, 8, 5).samples(step)[2] for step in range(7, 14)])
    assert sorted(exact.tolist()) == list(range(56))


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="got batch_size=8 and 7 images"):
        SampleIndex(7, 8, 0)
    with pytest.raises(ValueError, match="multiple of ranks x accumulation_steps; got 8 for 3 x 1"):
        SampleIndex(70, 8, 0, 0, 3)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 2\); got 2"):
        SampleIndex(70, 8, 0, 2, 2)
