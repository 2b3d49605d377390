"""Which augmented images, mixed in pairs, does supervised training see, and with which targets?"""

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fuseer.engine.data.philox import FINETUNE_STREAM, MIXING_STREAM, words
from fuseer.engine.data.sources import Reader, SampleIndex


@dataclass(frozen=True)
class Augmentation:
    """What is done to an image of `size` x `size` pixels, in this order, and what to two of them; 0 or "" leaves a part out.

    Bicubic random resized crop of `crop_area` of the image, flip, `rand_augment` in timm's words, normalisation, random erasing of one box
    by noise with probability `erasing`; then, in a batch, mixup with λ from Beta(mixup, mixup) or CutMix from Beta(cutmix, cutmix), one
    of the two by the toss of a coin; targets smoothed by `smoothing`.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_area: tuple[float, float]
    rand_augment: str
    erasing: float
    mixup: float
    cutmix: float
    smoothing: float


class _Augmented(Dataset):
    """(epoch, sample, seed of its own) → augmented pixels [3, size, size] and label."""

    def __init__(self, reader: Reader, augmentation: Augmentation):
        # timm takes seconds to import and is an extra: only those who train with labels pay
        from timm.data import create_transform

        self.reader = reader
        self.transform = create_transform(
            augmentation.size,
            is_training=True,
            scale=augmentation.crop_area,
            color_jitter=None,
            auto_augment=augmentation.rand_augment or None,
            interpolation="bicubic",
            mean=augmentation.mean,
            std=augmentation.std,
            re_prob=augmentation.erasing,
            re_mode="pixel",
        )

    def __getitem__(self, at: tuple[int, int, int]) -> tuple[Tensor, int]:
        epoch, sample, seed = at
        read = self.reader.read(sample, epoch)
        random.seed(seed)
        np.random.seed(seed)
        # torch.manual_seed also queues a call and a stack trace for each absent accelerator, 1 ms and never freed
        torch.default_generator.manual_seed(seed)
        with Image.open(io.BytesIO(read.data)) as image:
            return self.transform(ImageOps.exif_transpose(image).convert("RGB")), read.label


def mixed_batches(reader: Reader, index: SampleIndex, augmentation: Augmentation, *, threads: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images [B, 3, size, size] float32, targets [B, classes] float32) of micro-step 0, 1, … of `index`, without end.

    Images are made by timm's transforms in `threads` worker processes, for these draw from the generators of their process; each is
    seeded for every image, and mixing for every micro-batch, so that the number of workers does not matter and the caller's generators
    stay as they are. Targets sum to 1. Mixing pairs image i of a micro-batch with image B - 1 - i. Raises ValueError for mixing an odd B.
    Source: facebookresearch/mae main_finetune.py and util/datasets.py; timm.data.
    """
    from timm.data.mixup import Mixup, mixup_target

    classes = len(reader.source.classes)
    mixing = augmentation.mixup > 0 or augmentation.cutmix > 0
    if mixing and index.batch_per_rank % 2:
        raise ValueError(f"data: mixup and cutmix need an even number of images in a micro-batch; got {index.batch_per_rank}")
    mix = Mixup(augmentation.mixup, augmentation.cutmix, label_smoothing=augmentation.smoothing, num_classes=classes)
    # a generator of its own: DataLoader draws a seed from the caller's otherwise
    loader = DataLoader(
        _Augmented(reader, augmentation), batch_sampler=_MicroBatches(index), num_workers=threads, generator=torch.Generator()
    )
    for micro_step, (images, labels) in enumerate(loader):
        if mixing:
            kept = np.random.get_state()
            np.random.seed(words(index.seed, micro_step, [index.rank], MIXING_STREAM, 1)[0])
            images, targets = mix(images, labels)
            np.random.set_state(kept)
        else:
            targets = mixup_target(labels, classes, smoothing=augmentation.smoothing)
        yield images, targets


@dataclass(frozen=True)
class _MicroBatches:
    index: SampleIndex

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for micro_step in count():
            epoch, _, samples = self.index.samples(micro_step)
            seeds = words(self.index.seed, epoch, samples, FINETUNE_STREAM, 1)[:, 0]
            yield [(epoch, int(sample), int(seed)) for sample, seed in zip(samples, seeds, strict=True)]
