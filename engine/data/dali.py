"""How do drawn parameters become pixels in one DALI pipeline?"""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch

from fuseer.engine.data.draw import Drawn
from fuseer.engine.data.feed import Feed, joined
from fuseer.engine.data.view import Batch, View

_JITTER = ("brightness", "contrast", "saturation", "hue")


class DaliLoader(Feed):
    """The micro-batches of `index`: one decode per image, then crop, resize and augmentation of every view inside DALI.

    Same constructor as `torchvision.TorchvisionLoader` and the same arithmetic: each operation of `View` gives pixels rounded to 8
    bits; contrast pivots on the mean of the grey image and hue is shifted in HSV, as torchvision does and DALI's own operators do not.
    Operators that a view's strengths and probabilities rule out are not in the graph; jitter, grey, blur and solarize skip the
    samples that do not get them. On a GPU, JPEG decoding is mixed and all that follows runs there; else the pipeline needs no GPU.
    A batch is a copy that stays valid; on the CPU it is bitwise the same for every number of threads, world size, accumulation and
    start. Errors of `reader` are raised by the iterator. Raises RuntimeError where DALI is not installed.
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
        ahead = self.prepared(start, lambda samples, drawn: (samples, drawn))
        fed: deque = deque()

        def source() -> list:
            epoch, parts = next(ahead)
            samples = [sample for part, _ in parts for sample in part]
            fed.append((epoch, samples))
            inputs = [[np.frombuffer(sample.data, np.uint8) for sample in samples]]
            for i, view in enumerate(self.views):
                for copy in range(view.count):
                    inputs += inputs_of(view, joined([drawn[i][copy] for _, drawn in parts])).values()
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
                yield Batch(
                    crops=crops,
                    samples=torch.tensor([sample.sample for sample in samples]),
                    labels=torch.tensor([sample.label for sample in samples]),
                    epoch=epoch,
                )
        finally:
            ahead.close()

    def pipeline(self, source: Callable[[], list]):
        """The graph, not yet built: one for a GPU can be made and serialised without one. `source()` gives the inputs of one batch."""
        from nvidia.dali import fn, pipeline_def, types

        on_gpu = self.device.type == "cuda"
        dtype = types.FLOAT16 if self.dtype == "float16" else types.FLOAT
        mean, std = ([255 * x for x in channels] for channels in (self.mean, self.std))
        empty = np.zeros((0, 2), np.int64)
        none = Drawn(**dict.fromkeys(Drawn.__dataclass_fields__, empty[:, 0]))
        names = [(view, list(inputs_of(view, none))) for view in self.views for _ in range(view.count)]

        @pipeline_def(enable_conditionals=True)
        def graph():
            encoded, *inputs = fn.external_source(source=source, num_outputs=1 + sum(len(given) for _, given in names), batch=True)
            images = fn.decoders.image(encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
            outputs = []
            for view, given in names:
                drawn = {name: inputs.pop(0) for name in given}
                x = augmented(resized(images, view, drawn), view, drawn, on_gpu)
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
    if view.flip:
        given["flip"] = drawn.flip.astype(np.int32)
    jitters = [name for name in _JITTER if getattr(view, name)] if view.jitter else []
    given |= {"jitter": drawn.jitter} if jitters and view.jitter < 1 else {}
    given |= {name: getattr(drawn, name) for name in jitters}
    given |= {"gray": drawn.gray} if view.grayscale else {}
    given |= {"blur": drawn.blur, "sigma": drawn.sigma} if view.blur else {}
    given |= {"solarize": drawn.solarize} if view.solarize else {}
    return given


def resized(images, view: View, drawn: dict):
    """Crop, then resize with an antialiasing filter: pixels outside the crop take no part."""
    from nvidia.dali import fn, types

    kind = types.INTERP_CUBIC if view.interpolation == "bicubic" else types.INTERP_LINEAR
    crops = fn.slice(images, start=drawn["anchor"], shape=drawn["shape"], axes=[0, 1])
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
        if on_gpu:
            # an operator's arguments live on the CPU, and this one is computed on the GPU
            x = fn.cast(pivot + drawn["contrast"].gpu() * (x - pivot), dtype=types.UINT8)
        else:
            x = fn.brightness_contrast(x, contrast=drawn["contrast"], contrast_center=pivot)
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
