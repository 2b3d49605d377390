"""In which words does an op refuse its arguments?"""

import math
import sys

import torch

from fuseer.kernels import dispatch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(op, name, value, shape):
    """Refuse anything but a float16/bfloat16/float32/float64 tensor laid out as `shape`, e.g. "[N, K]" or "[..., N, K]"."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {shape}; got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64; got {value.dtype}; convert it with .float()")
    axes = shape.count(",") + 1
    if value.dim() < axes - 1 if "..." in shape else value.dim() != axes:
        raise ValueError(f"{op}: {name} must be {shape}; got {list(value.shape)}")


def prototypes(op, name, value):
    """Refuse a last axis without a single prototype: a softmax over nothing has no value."""
    if value.shape[-1] < 1:
        raise ValueError(f"{op}: {name} needs K >= 1 prototypes on its last axis; got {list(value.shape)}")


def same_device(op, first_name, first, name, value):
    if value.device != first.device:
        raise ValueError(f"{op}: {name} must be on the device of {first_name}; got {value.device} and {first.device}; move it with .to()")


def same_dtype(op, first_name, first, name, value):
    if value.dtype != first.dtype:
        raise TypeError(f"{op}: {name} must have the dtype of {first_name}; got {value.dtype} and {first.dtype}; convert it with .to()")


def shape(op, name, value, layout, sizes):
    """Refuse a tensor whose shape is not exactly `sizes`, the numbers behind the letters of `layout`."""
    if tuple(value.shape) != tuple(sizes):
        raise ValueError(f"{op}: {name} must be {layout} = {list(sizes)}; got {list(value.shape)}")


def positive(op, name, value):
    """Refuse everything but a finite real number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__}")
    if not value > 0 or value == math.inf:
        raise ValueError(f"{op}: {name} must be finite and > 0; got {value}")


def at_least(op, name, value, minimum):
    """Refuse everything but an integer that is at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an integer; got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be >= {minimum}; got {value}")


def nonzero(op, name, value):
    """Refuse everything but a finite real number other than zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__}")
    if not abs(value) > 0 or abs(value) == math.inf:
        raise ValueError(f"{op}: {name} must be finite and not 0; got {value}")


def row_indices(op, name, value, of_name, of, into_name, into):
    """Refuse anything but int64 [N], one for each row of `of`, and any index where there is no row to point at."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be an int64 tensor [N]; got {got}")
    shape(op, name, value, f"[N] of {of_name}", of.shape[:1])
    same_device(op, of_name, of, name, value)
    if len(value) and not len(into):
        raise ValueError(f"{op}: {name} points into {into_name}, which has no rows; give at least the positives")


def indices_within(op, name, value, rows):
    """Refuse an index outside 0..rows-1; looks at the values."""
    if not value.numel():
        return
    low, high = value.min().item(), value.max().item()
    if low < 0 or high >= rows:
        raise ValueError(f"{op}: {name} must be in 0..{rows - 1}; got {low}..{high}")


def indices(op, name, value, layout, sizes, of_name, of):
    """Refuse anything but int64 `layout` = `sizes` on the device of `of`; None among the sizes is any number. Values are not looked at."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64:
        got = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be an int64 tensor {layout}; got {got}")
    wanted = [n if size is None else size for size, n in zip(sizes, value.shape, strict=False)]
    if value.dim() != len(sizes) or list(value.shape) != wanted:
        stated = layout.strip("[]").split(", ")
        told = ", ".join(letter if size is None else f"{letter} = {size}" for letter, size in zip(stated, sizes, strict=True))
        raise ValueError(f"{op}: {name} must be [{told}]; got {list(value.shape)}")
    same_device(op, of_name, of, name, value)


def ids(op, name, value, bound):
    """Refuse an id outside 0..bound-1, in a raw op's body: on the CPU, elsewhere with FUSEER_CHECK_INDICES=1, for it waits there."""
    if dispatch.indices_are_checked(value.device):
        indices_within(op, name, value, bound)


def patch_ids(op, name, value, images, patch):
    """Refuse ids, as `ids` does, of no patch of images [B, C, H, W]."""
    ids(op, name, value, (images.shape[2] // patch) * (images.shape[3] // patch))


def permutations(op, name, value):
    """Refuse rows [B, P] that are no permutations of 0..P-1, where `ids` would look."""
    if dispatch.indices_are_checked(value.device):
        indices_within(op, name, value, value.shape[1])
        if not torch.equal(value.sort(dim=1).values, torch.arange(value.shape[1], device=value.device).expand_as(value)):
            raise ValueError(f"{op}: {name} must hold each of 0..{value.shape[1] - 1} once in every row; a row repeats one")


def within(op, name, value, low, high):
    """Refuse everything but a real number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be in {low}..{high}; got {value}")


def not_negative(op, name, value):
    """Refuse everything but a finite real number of at least zero."""
    within(op, name, value, 0, sys.float_info.max)


def same_length(op, **lists):
    """Refuse lists of different lengths."""
    if len({len(x) for x in lists.values()}) > 1:
        lengths = ", ".join(f"{len(x)} {name}" for name, x in lists.items())
        raise ValueError(f"{op}: the lists must be equally long; got {lengths}")


def alike(op, first_name, first, **others):
    """Refuse anything but lists of tensors of ours dtypes, all on one device, with the shapes of `first` at every place."""
    lists = {first_name: first, **others}
    if all(isinstance(x, torch.Tensor) for tensors in lists.values() for x in tensors):
        shapes = [x.shape for x in first]
        places = {(x.dtype, x.device) for tensors in lists.values() for x in tensors}
        right = {dtype for dtype, _ in places} <= set(DTYPES) and len({device for _, device in places}) < 2
        if right and all([x.shape for x in tensors] == shapes for tensors in others.values()):
            return
    for name, tensors in lists.items():
        for i, (x, like) in enumerate(zip(tensors, first, strict=True)):
            if not isinstance(x, torch.Tensor):
                raise TypeError(f"{op}: {name}[{i}] must be a tensor; got {type(x).__name__}")
            if x.dtype not in DTYPES:
                raise TypeError(f"{op}: {name}[{i}] must be float16, bfloat16, float32 or float64; got {x.dtype}")
            if x.shape != like.shape:
                raise ValueError(f"{op}: {name}[{i}] must have the shape of {first_name}[{i}], {list(like.shape)}; got {list(x.shape)}")
            if x.device != first[0].device:
                raise ValueError(f"{op}: {name}[{i}] must be on the device of {first_name}[0], {first[0].device}; got {x.device}")


def written_lists(op, **lists):
    """Refuse tensors that are written although several of their elements are one number in memory."""
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if not isinstance(x, torch.Tensor) or x.is_contiguous():
                continue
            if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
                raise ValueError(f"{op}: {name}[{i}] is written, and is expanded: its elements share memory; give it a .clone()")


def device_flag(op, name, value, tensors):
    """Refuse anything but a scalar tensor on the device of `tensors`."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        got = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{op}: {name} must be a tensor of one element; got {got}")
    if tensors:
        same_device(op, "params", tensors[0], name, value)


def segments(op, value, tensors, layers):
    """Refuse anything but int64 [S, 4] rows (tensor, start, numel, layer) on the CPU that lie inside flat tensors and do not overlap."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64 or value.dim() != 2 or value.shape[1] != 4:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{op}: segments must be int64 [S, 4]: tensor, start, numel, layer; got {got}")
    if value.device.type != "cpu":
        raise ValueError(f"{op}: segments must be on the CPU, where launches are planned; got {value.device}; move it with .cpu() once")
    for i, x in enumerate(tensors):
        if x.dim() != 1:
            raise ValueError(f"{op}: with segments every tensor must be flat, [n]; params[{i}] is {list(x.shape)}")
    # a graph has no numbers to look at: there the op's body does
    if not torch.compiler.is_compiling():
        segments_inside(op, value.tolist(), [x.numel() for x in tensors], layers)


def segments_inside(op, rows, numels, layers):
    """Refuse rows (tensor, start, numel, layer) that leave tensors of `numels` numbers or the layers, or overlap."""
    ends = [0] * len(numels)
    for row, (tensor, start, numel, layer) in enumerate(sorted(rows)):
        inside = 0 <= tensor < len(numels) and 0 <= layer < layers and numel >= 0
        if not inside or start < ends[tensor] or start + numel > numels[tensor]:
            raise ValueError(
                f"{op}: segments must lie inside {len(numels)} tensors and {layers} layers and not overlap; "
                f"row {row} in order of start is {[tensor, start, numel, layer]}"
            )
        ends[tensor] = start + numel


def patches(op, images, patch):
    """Refuse images [B, C, H, W] without a channel or a patch, and sides that the patch's does not divide."""
    _, channels, height, width = images.shape
    if min(channels, height, width) < 1 or height % patch or width % patch:
        raise ValueError(
            f"{op}: images must be [B, C, H, W] with C >= 1 and sides that the patch's, {patch}, divides; got {list(images.shape)};"
            " crop or resize them"
        )
