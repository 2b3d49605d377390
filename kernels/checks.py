"""In which words does an op refuse its arguments?"""

import math

import torch

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
    if not len(value):
        return
    low, high = value.min().item(), value.max().item()
    if low < 0 or high >= rows:
        raise ValueError(f"{op}: {name} must be in 0..{rows - 1}; got {low}..{high}")
