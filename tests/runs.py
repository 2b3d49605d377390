"""How does a test get a run folder that real pretraining wrote?"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from fuseer.engine.data.sources import open_source

ROOT = Path(__file__).parents[1]
SMALL = (
    "recipe=tiny_swav",
    "method.hidden_widths=[16]",
    "method.embedding_width=8",
    "method.prototypes=6",
    "model.name=anynet",
    'model.options={"depths": [1, 1], "widths": [16, 32], "group_widths": 8, "stem_width": 8, "stem_stride": 1}',
    "batch_size=8",
    "optim.warmup_steps=2",
    "log_every_steps=1",
    "knn.every_steps=0",
    "precision=fp32",
)


def labelled_images(folder: Path, train: int, test: int, classes: int = 10) -> Path:
    """folder/train and folder/test: so many real photographs of each class of the demo set."""
    for split, count in (("train", train), ("test", test)):
        source = open_source("demo", split=split)
        for label, name in enumerate(source.classes[:classes]):
            place = folder / split / name
            place.mkdir(parents=True)
            for index in (source.labels == label).nonzero()[0][:count]:
                shutil.copy(source.paths[index], place)
    return folder


def pretrained(out: Path, data: Path, *settings: str, steps: int = 6) -> Path:
    """The folder of a few steps of SwAV on `data`, in a process of its own, where DeepSpeed may do as it likes."""
    command = [sys.executable, "-m", "fuseer.engine.train", *SMALL, f"data={data}", f"out={out}", f"steps={steps}", *settings]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out
