"""What does an evaluation see of a folder: every image once, in order, without augmentation?"""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps

from fuseer.engine.data.sources import Reader, Source


def plain_batches(
    source: Source,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    image_size: int = 0,
    batch_size: int = 256,
    threads: int = 2,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (images [B, 3, h, w] float32 normalised, labels [B] int64) in the source's order.

    image_size = 0 keeps the native size, which must then be one for all images (ValueError names the first that differs); otherwise
    the shorter side becomes 8/7·image_size (bicubic, antialiased) and the centre image_size x image_size is cut out.
    """
    reader = Reader(source, max_broken_share=0.0)
    shift, scale = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def load(sample: int) -> tuple[torch.Tensor, int]:
        read = reader.read(sample, 0)
        with Image.open(io.BytesIO(read.data)) as image:
            pixels = torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB"))).permute(2, 0, 1)
        if image_size:
            pixels = TF.resize(pixels, [image_size * 8 // 7], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
            pixels = TF.center_crop(pixels, [image_size, image_size])
        return (pixels / 255 - shift) / scale, read.label

    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, len(source), batch_size):
            images, labels = zip(*pool.map(load, range(first, min(first + batch_size, len(source)))), strict=True)
            for offset, image in enumerate(images):
                if image.shape != images[0].shape:
                    raise ValueError(
                        f"data: {source.paths[first + offset]} is {image.shape[2]}x{image.shape[1]} pixels and others are "
                        f"{images[0].shape[2]}x{images[0].shape[1]}; set knn.image_size, or give image_size=N, to bring all to one size"
                    )
            yield torch.stack(images), torch.tensor(labels)
