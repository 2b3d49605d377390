"""Which images does a data path name?"""

import os
from pathlib import Path

from fuseer.engine.data.bundled import DEBIAN_FOLDER, FULL, unpacked
from fuseer.engine.data.folder import holds_images, scan
from fuseer.engine.data.images import IMAGE_SUFFIXES, Source, Stamp
from fuseer.engine.data.indexed import Index, kept
from fuseer.engine.data.listfile import read_list
from fuseer.engine.data.order import SampleIndex, permuted
from fuseer.engine.data.reader import Reader, Sample, shown, whole_bytes
from fuseer.engine.data.tar import CLASSES, expanded, read_shards

# the one door to sources: what is read, replaced and dealt out is imported from here
__all__ = [
    "Reader", "Sample", "SampleIndex", "Source", "full_demo_set_is_here", "index_folder", "open_source", "permuted", "shown", "whole_bytes",
]  # fmt: skip

_HELD_OUT = {"test": ("test", "val"), "val": ("val", "test")}


def open_source(path: str, split: str | None = None, cache_dir: Path | None = None, *, fresh: bool = False) -> Source:
    """The images that `path` names: a folder, tar shards, a list file, the bundled set ('demo'), or all of Fashion-MNIST ('demo-full').

    A folder holds images, flat or one folder per class, or, where it holds none, tar shards; see `folder.scan`. Shards are also named as
    one .tar or by braces, shards/{000..099}.tar; see `tar.read_shards`. Any other file is a list; see `listfile.read_list`.
    Where a folder has both `train` and one of `test` and `val` with images, split=None or 'train' means the former and 'test' or 'val'
    the latter; elsewhere split=None and 'train' mean all there is. The demo sets are unpacked once below `cache_dir`
    (~/.cache/fuseer when None), safely under several processes, and unpacked anew if damaged. Large indices are kept there too, see
    `indexed.kept`; `fresh` makes them anew.

    Raises ValueError for a path that is missing or holds no images (of that split), and for what the index of its kind refuses;
    RuntimeError where a demo set cannot be unpacked.
    """
    if split not in (None, "train", "test", "val"):
        raise ValueError(f"data: split must be train, test or val; got {split}")
    cache = cache_dir or index_folder()
    whole = unpacked(path, cache) if path in ("demo", FULL) else Path(path).expanduser().absolute()
    if whole.is_dir():
        root = _of_split(whole, split)
        found = kept(str(root), lambda: _of_folder(str(root)), cache, fresh=fresh)
        looked_for = f"looked for files ending in {' '.join(sorted(IMAGE_SUFFIXES))}, and for .tar shards with such"
        return _with_images(found, f"below {root}; {looked_for}")
    if split in _HELD_OUT:
        raise ValueError(f"data.path: {whole} has no {split} split; it needs to be a folder with sub-folders train and {split}")
    files = [str(whole)] if whole.exists() else expanded(str(whole))
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        what = "is no file" if os.path.exists(missing[0]) else "does not exist"
        more = f", nor do {len(missing) - 1} more of {len(files)} shards" if len(missing) > 1 else ""
        raise ValueError(f"data.path: {missing[0]} {what}{more}; give a folder of images or shards, a .tar, a list file, or 'demo'")
    if all(file.lower().endswith(".tar") for file in files):
        root = os.path.commonpath([os.path.dirname(file) for file in files])
        found = kept(str(whole), lambda: _of_shards(root, files), cache, fresh=fresh)
        return _with_images(found, f"in {whole}; no member of it ends in an image suffix")
    if len(files) > 1:
        raise ValueError(f"data.path: {whole} must name .tar shards; several folders or lists are joined in one list file")
    return kept(str(whole), lambda: Index(read_list(str(whole)), [str(whole)], [Stamp.of(whole.stat())]), cache, fresh=fresh)


def index_folder() -> Path:
    """Where indices and demo sets are kept unless told otherwise."""
    return Path.home() / ".cache" / "fuseer"


def full_demo_set_is_here() -> bool:
    """Whether open_source('demo-full') can succeed: Debian's package is installed."""
    return (DEBIAN_FOLDER / "train-images-idx3-ubyte.gz").is_file()


def _of_split(root: Path, split: str | None) -> Path:
    held_out = [root / name for name in _HELD_OUT.get(split or "test", ("test", "val")) if holds_images(str(root / name))]
    if held_out and holds_images(str(root / "train")):
        return held_out[0] if split in _HELD_OUT else root / "train"
    if split in _HELD_OUT:
        raise ValueError(f"data.path: {root} has no {split} split; it needs sub-folders train and {split} with images")
    return root


def _of_folder(root: str) -> Index:
    found = scan(root)
    if len(found.source) or not found.shards:
        return Index(found.source, found.folders, found.stamps)
    of_shards = _of_shards(root, found.shards)
    return Index(of_shards.source, found.folders + of_shards.witnesses, found.stamps + of_shards.stamps)


def _of_shards(root: str, shards: list[str]) -> Index:
    names = os.path.join(root, CLASSES)
    witnesses = shards + [names] * os.path.isfile(names)
    stamps = [Stamp.of(os.stat(path)) for path in witnesses]
    return Index(read_shards(root, shards), witnesses, stamps)


def _with_images(found: Source, where: str) -> Source:
    if not len(found):
        damage = "".join(f"; {shown(path)} {reason}" for path, reason in list(found.damaged.items())[:3])
        raise ValueError(f"data.path: no images {where}{damage}")
    return found
