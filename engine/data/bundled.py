"""How does the demo set become class folders of PNG files in the user's cache?"""

import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np

FULL = "demo-full"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
ARCHIVE, DIGESTS = "fashion-mnist.npy.xz", "fashion-mnist.json"
CLASSES = ("T-shirt_top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
TRAIN_IMAGES = 10_000  # of the demo set; the rest of its rows are test images


def unpacked(name: str, cache_dir: Path) -> Path:
    """The folder `cache_dir`/`name`-… with train and test of 'demo' or 'demo-full', complete to the last byte.

    Every file is read and compared with the set's digest; where one differs or is missing, all are written anew, aside, and moved into
    place. Processes wait for each other on a file lock. Raises RuntimeError where the cache cannot be written or the package
    that 'demo-full' is made from is not installed.
    """
    digest = json.loads(_bundled(DIGESTS))[name]
    folder = cache_dir / f"{name}-{digest[:12]}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with open(cache_dir / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder_digest(folder) != digest:
                _replace(folder, rows_by_split(name))
    except OSError as error:
        raise RuntimeError(f"data.path={name}: cannot unpack into {cache_dir}: {error.strerror or error}; free or mend it") from error
    return folder


def rows_by_split(name: str) -> dict[str, np.ndarray]:
    """split -> uint8 [N, 785]: the label, then 28 x 28 grey values, in the order of the original files."""
    if name == FULL:
        if not (DEBIAN_FOLDER / "train-images-idx3-ubyte.gz").is_file():
            raise RuntimeError(f"data.path={FULL} needs Fashion-MNIST in {DEBIAN_FOLDER}; apt install dataset-fashion-mnist, or use demo")
        return {"train": idx_rows(DEBIAN_FOLDER, "train"), "test": idx_rows(DEBIAN_FOLDER, "t10k")}
    rows = np.load(io.BytesIO(lzma.decompress(_bundled(ARCHIVE))), allow_pickle=False)
    return {"train": rows[:TRAIN_IMAGES], "test": rows[TRAIN_IMAGES:]}


def idx_rows(folder: Path, part: str) -> np.ndarray:
    """The IDX files of `part` ('train' or 't10k') as uint8 [N, 785], see `rows_by_split`."""
    images = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return np.concatenate([labels[:, None], images.reshape(-1, 28 * 28)], axis=1)


def png_files(rows: dict[str, np.ndarray]):
    """(name below the folder, bytes) of every image, sorted by name; the number in the name is the row."""
    names = {f"{split}/{CLASSES[row[0]]}/{i:05d}.png": row[1:] for split, table in rows.items() for i, row in enumerate(table)}
    for name in sorted(names):
        yield name, _png(names[name].reshape(28, 28))


def digest_of(files) -> str:
    """64 hex digits of (name, bytes) pairs, in the order they come."""
    digest = hashlib.blake2b(digest_size=32)
    for name, data in files:
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """`digest_of` what lies below `folder`; the digest of nothing where it is missing."""
    paths = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if not path.is_dir())
    return digest_of((name, path.read_bytes()) for name, path in paths)


def _replace(folder: Path, rows: dict[str, np.ndarray]) -> None:
    aside = Path(tempfile.mkdtemp(prefix="unpacking-", dir=folder.parent))
    try:
        for split in rows:
            for name in CLASSES:
                (aside / "new" / split / name).mkdir(parents=True)
        for name, data in png_files(rows):
            with open(f"{aside}/new/{name}", "wb") as file:
                file.write(data)
        if folder.exists():
            os.rename(folder, aside / "old")
        os.rename(aside / "new", folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _png(pixels: np.ndarray) -> bytes:
    """An 8-bit grey PNG with stored (level 0) data: the same bytes with every zlib, and fast."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    lines = np.zeros((height, width + 1), np.uint8)
    lines[:, 1:] = pixels
    raw = lines.tobytes()
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF) + raw + struct.pack(">I", zlib.adler32(raw))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stored) + chunk(b"IEND", b"")


def _bundled(name: str) -> bytes:
    return (Path(__file__).parent / "demo" / name).read_bytes()
