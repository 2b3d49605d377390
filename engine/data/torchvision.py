"""How do drawn parameters become pixels on the CPU, without DALI?"""

import io
from collections.abc import Iterator

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps

from fuseer.engine.data.draw import Drawn
from fuseer.engine.data.feed import Feed, without_background
from fuseer.engine.data.pixels import augment_pixels
from fuseer.engine.data.view import Batch, View

_FILTER = {"bilinear": TF.InterpolationMode.BILINEAR, "bicubic": TF.InterpolationMode.BICUBIC}


class TorchvisionLoader(Feed):
    """The micro-batches of `index`, decoded and resized by Pillow and torchvision, the rest by `pixels.augment_pixels`, in threads.

    Twin of `dali.DaliLoader`: same constructor, parameters and arithmetic, pixels rounded to 8 bits after every operation. Bitwise the
    same for every number of threads, world size, accumulation and start. Errors of `reader` are raised by the iterator.
    """

    def batches(self, start: int) -> Iterator[Batch]:
        for epoch, parts in self.prepared(start, self._part):
            samples = [sample for part, _ in parts for sample in part]
            yield Batch(
                crops=[torch.cat([crops[i] for _, crops in parts], dim=1).to(self.device) for i in range(len(self.views))],
                samples=torch.tensor([sample.sample for sample in samples]),
                labels=torch.tensor([sample.label for sample in samples]),
                epoch=epoch,
            )

    def _part(self, samples: list, drawn: list[list[Drawn]]) -> tuple[list, list[torch.Tensor]]:
        images, masks, crops = [decoded(sample.data) for sample in samples], self.masks_of(samples, drawn), []
        for view, copies in zip(self.views, drawn, strict=True):
            crops.append(torch.empty(len(copies), len(samples), 3, view.size, view.size, dtype=self.dtype_of_crops))
            for out, copy in zip(crops[-1], copies, strict=True):
                remove = copy.remove if view.background_removal else np.zeros(len(samples), bool)
                shown = [
                    Image.fromarray(without_background(np.asarray(image), mask, self.fill)) if use else image
                    for image, mask, use in zip(images, masks, remove, strict=True)
                ]
                pixels = torch.from_numpy(resized(shown, view, copy)).permute(0, 3, 1, 2)
                augment_pixels(pixels, view, copy, self.scale, out)
        return samples, crops


def decoded(data: bytes) -> Image.Image:
    """The image upright, RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def resized(images: list[Image.Image], view: View, drawn: Drawn) -> np.ndarray:
    """Crop, resize with an antialiasing filter -> uint8 [B, size, size, 3]."""
    boxes = zip(images, drawn.top, drawn.left, drawn.height, drawn.width, strict=True)
    size, mode = [view.size, view.size], _FILTER[view.interpolation]
    return np.stack([np.asarray(TF.resized_crop(image, *map(int, box), size, mode)) for image, *box in boxes])
