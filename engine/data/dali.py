"""How do drawn parameters become pixels in one DALI pipeline?"""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn.functional import interpolate

from fuseer.engine.data.draw import Drawn
from fuseer.engine.data.feed import Feed, joined, slice_of, without_background
from fuseer.engine.data.pixels import augment_pixels
from fuseer.engine.data.view import Batch, View

_JITTER = ("brightness", "contrast", "saturation", "hue")
_JOB = 8  # samples whose views one thread makes at a time
_NO_MASK = np.full((1, 1, 1), 255, np.uint8)


class DaliLoader(Feed):
    """The micro-batches of `index`: one decode per image by DALI, then crop, resize and augmentation of every view.

    Same constructor as `torchvision.TorchvisionLoader` and the same arithmetic: each operation of `View` gives pixels rounded to 8
    bits; contrast pivots on the mean of the grey image and hue is shifted in HSV, as torchvision does and DALI's own operators do not.
    On a GPU JPEG decoding is mixed (by the hardware where there is one) and DALI's graph holds all that follows. On the CPU torch
    resizes and `pixels.augment_pixels` does the rest, in threads: the same graph of DALI's CPU operators (`by_graph`) takes several times
    as long (docs/benchmarks.md). A batch is a copy that stays valid; on the CPU it is bitwise the same for every number of threads,
    world size, accumulation and start. Errors of `reader` are raised by the iterator. Raises RuntimeError where DALI is not installed.
    """

    def __post_init__(self):
        super().__post_init__()
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise RuntimeError(
                "data.pipeline=dali needs NVIDIA DALI; pip install 'fuseer[dali-cu13]' (or dali-cu12; it runs without a GPU, and PyPI's "
                "plain nvidia-dali is only a placeholder), or set data.pipeline=torchvision"
            ) from error

    def batches(self, start: int) -> Iterator[Batch]:
        return self.by_graph(start) if self.device.type == "cuda" else self.by_threads(start)

    def by_threads(self, start: int) -> Iterator[Batch]:
        """The batches for the CPU: DALI decodes one batch while threads make the views of those before."""
        ahead, fed, pending = self.prepared(start, self._with_masks), deque(), deque()

        def source() -> list[np.ndarray]:
            epoch, parts = next(ahead)
            fed.append((epoch, *self._whole(parts)))
            return [np.frombuffer(sample.data, np.uint8) for sample in fed[-1][1]]

        pipeline = self.decoder(source)
        pipeline.build()
        try:
            while True:
                (images,) = pipeline.run()
                epoch, samples, drawn, masks = fed.popleft()
                crops = [torch.empty(view.count, len(samples), 3, view.size, view.size, dtype=self.dtype_of_crops) for view in self.views]
                jobs = [
                    self._pool.submit(self._views, images, masks, drawn, crops, slice(first, first + _JOB))
                    for first in range(0, len(samples), _JOB)
                ]
                pending.append((epoch, samples, crops, jobs))
                if len(pending) > self.prefetch_batches:
                    epoch, samples, crops, jobs = pending.popleft()
                    for job in jobs:
                        job.result()
                    yield batch_of(crops, samples, epoch)
        finally:
            ahead.close()
            for *_, jobs in pending:
                for job in jobs:
                    job.cancel()

    def _views(self, images, masks: list, drawn: list[list[Drawn]], crops: list[torch.Tensor], rows: slice) -> None:
        """Writes some samples of every view of a batch."""
        numbers = range(rows.start, min(rows.stop, len(masks)))
        decoded = [np.asarray(images.at(i)) for i in numbers]
        for view, copies, outs in zip(self.views, drawn, crops, strict=True):
            for copy, out in zip(copies, outs, strict=True):
                chosen = slice_of(copy, rows)
                pixels = torch.cat(
                    [
                        resized_window(window(image, masks[number], view, chosen, i, self.fill), view)
                        for i, (image, number) in enumerate(zip(decoded, numbers, strict=True))
                    ]
                )
                augment_pixels(pixels, view, chosen, self.scale, out[rows])

    def by_graph(self, start: int) -> Iterator[Batch]:
        """The batches as the whole graph makes them, on the GPU or on the CPU."""
        ahead, fed = self.prepared(start, self._with_masks), deque()
        removing = any(view.background_removal for view in self.views)

        def source() -> list:
            epoch, parts = next(ahead)
            samples, drawn, masks = self._whole(parts)
            fed.append((epoch, samples))
            inputs = [[np.frombuffer(sample.data, np.uint8) for sample in samples]]
            inputs += [[_NO_MASK if mask is None else mask[..., None] for mask in masks]] if removing else []
            for view, copies in zip(self.views, drawn, strict=True):
                for copy in copies:
                    inputs += inputs_of(view, copy).values()
            return inputs

        pipeline = self.pipeline(source)
        pipeline.build()
        copying = None
        try:
            while True:
                outputs = [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()]
                at = [sum(view.count for view in self.views[:i]) for i in range(len(self.views) + 1)]
                crops = [torch.stack(outputs[at[i] : at[i + 1]]) for i in range(len(self.views))]
                if self.device.type == "cuda":
                    # DALI may reuse its buffers once they are dropped, so they are held until the copy of them is done
                    if copying:
                        copying[1].synchronize()
                    copying = outputs, torch.cuda.current_stream(self.device).record_event()
                epoch, samples = fed.popleft()
                yield batch_of(crops, samples, epoch)
        finally:
            ahead.close()

    def _with_masks(self, samples: list, drawn: list[list[Drawn]]) -> tuple:
        return samples, drawn, self.masks_of(samples, drawn)

    def _whole(self, parts: list[tuple]) -> tuple[list, list[list[Drawn]], list]:
        """Samples, parameters and masks of a batch of its parts."""
        drawn = [[joined([part[1][i][copy] for part in parts]) for copy in range(view.count)] for i, view in enumerate(self.views)]
        return [sample for part in parts for sample in part[0]], drawn, [mask for part in parts for mask in part[2]]

    def decoder(self, source: Callable[[], list]):
        """The pipeline that decodes on the CPU and does nothing else."""
        from nvidia.dali import fn, pipeline_def, types

        @pipeline_def(batch_size=self.index.batch_per_rank, num_threads=self.threads, device_id=None, prefetch_queue_depth=2)
        def graph():
            return fn.decoders.image(fn.external_source(source=source, batch=True), device="cpu", output_type=types.RGB)

        return graph()

    def pipeline(self, source: Callable[[], list]):
        """The graph, not yet built: one for a GPU can be made and serialised without one. `source()` gives the inputs of one batch."""
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self.device.type == "cuda"
        dtype = types.FLOAT16 if self.dtype == "float16" else types.FLOAT
        mean, std = ([255 * x for x in channels] for channels in (self.mean, self.std))
        empty = np.zeros((0, 2), np.int64)
        none = Drawn(**dict.fromkeys(Drawn.__dataclass_fields__, empty[:, 0]))
        removing = any(view.background_removal for view in self.views)
        names = [(view, list(inputs_of(view, none))) for view in self.views for _ in range(view.count)]

        @pipeline_def(enable_conditionals=True)
        def graph():
            count = 1 + removing + sum(len(given) for _, given in names)
            encoded, *inputs = fn.external_source(source=source, num_outputs=count, batch=True)
            masks = inputs.pop(0) if removing else None
            masks = masks.gpu() if removing and on_gpu else masks
            images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
            outputs = []
            for view, given in names:
                drawn = {name: inputs.pop(0) for name in given}
                x = cropped(images, drawn)
                if view.background_removal:
                    x = only_where(drawn["remove"], lambda x, drawn=drawn: kept(x, cropped(masks, drawn), self.fill, on_gpu), x)
                x = augmented(resized(x, view), view, drawn, on_gpu)
                mirror = drawn.get("flip", 0)
                outputs.append(fn.crop_mirror_normalize(x, mirror=mirror, mean=mean, std=std, dtype=dtype, output_layout="CHW"))
            return tuple(outputs)

        return graph(
            batch_size=self.index.batch_per_rank,
            num_threads=self.threads,
            # without CUDA the graph of a GPU can still be made, and building it says what is missing
            device_id=(self.device.index or 0) if on_gpu and torch.cuda.is_available() else None,
            prefetch_queue_depth=self.prefetch_batches,
        )


def inputs_of(view: View, drawn: Drawn) -> dict[str, np.ndarray]:
    """The arrays [B, …] that the graph of `view` takes, by name and in its order; those it can do without are left out."""
    given = {"anchor": np.stack([drawn.top, drawn.left], 1).astype(np.int32)}
    given["shape"] = np.stack([drawn.height, drawn.width], 1).astype(np.int32)
    given |= {"remove": drawn.remove} if view.background_removal else {}
    if view.flip:
        given["flip"] = drawn.flip.astype(np.int32)
    jitters = [name for name in _JITTER if getattr(view, name)] if view.jitter else []
    given |= {"jitter": drawn.jitter} if jitters and view.jitter < 1 else {}
    given |= {name: getattr(drawn, name) for name in jitters}
    given |= {"gray": drawn.gray} if view.grayscale else {}
    given |= {"blur": drawn.blur, "sigma": drawn.sigma} if view.blur else {}
    given |= {"solarize": drawn.solarize} if view.solarize else {}
    return given


def window(image: np.ndarray, mask: np.ndarray | None, view: View, drawn: Drawn, i: int, fill: np.ndarray) -> np.ndarray:
    """The pixels of sample i that its view shows, uint8 [height, width, 3], the background replaced where that was drawn."""
    rows = slice(int(drawn.top[i]), int(drawn.top[i] + drawn.height[i]))
    columns = slice(int(drawn.left[i]), int(drawn.left[i] + drawn.width[i]))
    if view.background_removal and drawn.remove[i]:
        return without_background(image[rows, columns], mask[rows, columns], fill)
    return image[rows, columns]


def resized_window(pixels: np.ndarray, view: View) -> torch.Tensor:
    """uint8 [height, width, 3] -> uint8 [1, 3, size, size], by torch's antialiasing filter for bytes."""
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return interpolate(planes, size=(view.size, view.size), mode=view.interpolation, antialias=True)


def batch_of(crops: list[torch.Tensor], samples: list, epoch: int) -> Batch:
    numbers, labels = (torch.tensor([getattr(sample, name) for sample in samples]) for name in ("sample", "label"))
    return Batch(crops=crops, samples=numbers, labels=labels, epoch=epoch)


def cropped(images, drawn: dict):
    """What a view shows of its image; pixels outside the crop take no part in the resize that follows."""
    from nvidia.dali import fn

    return fn.slice(images, start=drawn["anchor"], shape=drawn["shape"], axes=[0, 1])


def kept(x, mask, fill: np.ndarray, on_gpu: bool):
    """x where mask is 128 or more, else the colour `fill` [3]."""
    from nvidia.dali import fn, types

    colour = types.Constant(fill.reshape(1, 1, 3), device="gpu" if on_gpu else "cpu")
    return fn.cast((mask >= 128) * x + (mask < 128) * colour, dtype=types.UINT8)


def resized(crops, view: View):
    """Resize with an antialiasing filter."""
    from nvidia.dali import fn, types

    kind = types.INTERP_CUBIC if view.interpolation == "bicubic" else types.INTERP_LINEAR
    return fn.resize(crops, size=[view.size, view.size], interp_type=kind, antialias=True)


def augmented(x, view: View, drawn: dict, on_gpu: bool):
    """Everything between the resize and the flip, which commutes with all of it, on uint8 HWC."""
    from nvidia.dali import fn

    if view.jitter:
        x = only_where(drawn.get("jitter"), lambda x: jittered(x, drawn, on_gpu), x)
    if view.grayscale:
        x = only_where(drawn["gray"], greyed, x)
    if view.blur:
        x = only_where(drawn["blur"], lambda x: fn.gaussian_blur(x, sigma=drawn["sigma"]), x)
    if view.solarize:
        x = only_where(drawn["solarize"], solarized, x)
    return x


def only_where(chosen, operation: Callable, x):
    """`operation` on the samples that are chosen, all of them when `chosen` is None; the others do not pay for it."""
    if chosen is None:
        return operation(x)
    if chosen:
        x = operation(x)
    return x


def greyed(x):
    from nvidia.dali import fn, types

    grey = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    return fn.cat(grey, grey, grey, axis=2)


def solarized(x):
    from nvidia.dali import fn, types

    inverted = x >= 128
    return fn.cast(inverted * (255 - x) + (1 - inverted) * x, dtype=types.UINT8)


def jittered(x, drawn: dict, on_gpu: bool):
    """Brightness, contrast, saturation, hue, where the view has them."""
    from nvidia.dali import fn, types

    if "brightness" in drawn:
        x = fn.brightness_contrast(x, brightness=drawn["brightness"])
    if "contrast" in drawn:
        pivot = fn.reductions.mean(fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY))
        # not an operator's argument, which would have to live on the CPU: this pivot is computed where the pixels are
        factor = drawn["contrast"].gpu() if on_gpu else drawn["contrast"]
        x = fn.cast(pivot + factor * (x - pivot), dtype=types.UINT8)
    if "saturation" in drawn:
        x = fn.color_twist(x, saturation=drawn["saturation"])
    if "hue" in drawn:
        x = hue_shifted(x, drawn["hue"], on_gpu)
    return x


def hue_shifted(x, turns, on_gpu: bool):
    """HSV hue plus `turns`, in arithmetic operators; the formula stands in `torchvision.hue_shifted`."""
    from nvidia.dali import fn, math, types

    r, g, b = (fn.cast(x[:, :, i : i + 1], dtype=types.FLOAT) for i in range(3))
    v = math.max(math.max(r, g), b)
    c = v - math.min(math.min(r, g), b)
    is_r = v == r
    is_g = (v == g) & (v != r)
    is_b = (v != g) & (v != r)
    hue = (is_r * (g - b) + is_g * (b - r) + is_b * (r - g)) / math.max(c, 1.0) + is_g * 2.0 + is_b * 4.0
    channel = types.Constant(np.array([[[5, 3, 1]]], np.float32), device="gpu" if on_gpu else "cpu")
    k = hue + (turns.gpu() if on_gpu else turns) * 6.0 + channel
    k = k - math.floor(k / 6.0) * 6.0
    return fn.cast(v - c * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0), dtype=types.UINT8)
