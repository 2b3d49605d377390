"""How is the bundled demo set made from Fashion-MNIST?

    python -m fuseer.engine.data.make_demo_set [SOURCE_DIR [OUT_DIR]]

SOURCE_DIR holds the four IDX files of Fashion-MNIST (default: where Debian's dataset-fashion-mnist puts them); OUT_DIR (default: the
demo folder beside this file) gets the first 10,000 training and first 2,000 test images in file order, with their labels, as one
compressed array, and the digests of the unpacked sets.
"""

import argparse
import io
import json
import lzma
from pathlib import Path

import numpy as np

from fuseer.engine.data.bundled import ARCHIVE, DEBIAN_FOLDER, DIGESTS, FULL, TRAIN_IMAGES, digest_of, idx_rows, png_files


def make(source_dir: Path, out_dir: Path, train_images: int = TRAIN_IMAGES, test_images: int = 2_000) -> None:
    """Writes the archive and the digests; the same input gives the same unpacked bytes."""
    full = {"train": idx_rows(source_dir, "train"), "test": idx_rows(source_dir, "t10k")}
    demo = {"train": full["train"][:train_images], "test": full["test"][:test_images]}
    array = io.BytesIO()
    np.save(array, np.concatenate([demo["train"], demo["test"]]), allow_pickle=False)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / ARCHIVE).write_bytes(lzma.compress(array.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    digests = {"demo": digest_of(png_files(demo)), FULL: digest_of(png_files(full))}
    (out_dir / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source_dir", type=Path, nargs="?", default=DEBIAN_FOLDER)
    parser.add_argument("out_dir", type=Path, nargs="?", default=Path(__file__).parent / "demo")
    chosen = parser.parse_args()
    make(chosen.source_dir, chosen.out_dir)
