"""What will a network see of a data set?"""

from pathlib import Path

import torch

from fuseer.engine.config import TrainConfig
from fuseer.engine.data.sheet import crop_sheet
from fuseer.engine.data.sources import Reader, SampleIndex, open_source
from fuseer.engine.distributed import Ranks
from fuseer.engine.run import build_loader, resolved


def preview(config: TrainConfig, out: Path, images: int = 8) -> dict:
    """Draws the first views of a run of `config` as a PNG at `out`, through its own pipeline; {images, views, pipeline}.

    They are the pixels of the run's first step with the same seed and batch size, on one rank; no network is built.
    Raises ValueError for an `images` below 1 and for what a run would refuse of its data.
    """
    if images < 1:
        raise ValueError(f"data preview: images must be at least 1; got {images}")
    config = resolved(config)
    source = open_source(config.data.path, split="train")
    index = SampleIndex(len(source), config.batch_size, config.seed, world_size=_parts(config.batch_size, images))
    alone = Ranks(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loader = build_loader(config, Reader(source, config.data.max_broken_share, config.seed), index, config.method, alone)
    batches = loader.batches(0)
    try:
        batch = next(batches)
        crop_sheet(batch, out, mean=config.data.mean, std=config.data.std, images=images)
    finally:
        batches.close()
        loader.close()
    return {"images": min(images, len(batch.samples)), "views": sum(len(crops) for crops in batch.crops), "pipeline": config.data.pipeline}


def _parts(batch_size: int, images: int) -> int:
    """The most equal parts of a batch that still hold `images`: the first of them is all that is decoded."""
    return max(parts for parts in range(1, batch_size + 1) if batch_size % parts == 0 and batch_size // parts >= min(images, batch_size))
