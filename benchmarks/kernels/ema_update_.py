"""What does ema_update_ have to beat, and what can nobody avoid?"""

import torch

from benchmarks.measure import Work, read_bytes


def official(teacher, student, momentum, shadow):
    """MoCo's loop over parameters, and one more over the half-precision copies."""
    for t, s in zip(teacher, student, strict=True):
        t.mul_(momentum).add_(s.to(t.dtype), alpha=1 - momentum)
    _copied(teacher, shadow)


def foreach_mul_add(teacher, student, momentum, shadow):
    """DINOv2's and lightly's two multi-tensor operators."""
    torch._foreach_mul_(teacher, momentum)
    torch._foreach_add_(teacher, _alike(teacher, student), alpha=1 - momentum)
    _copied(teacher, shadow)


def foreach_lerp(teacher, student, momentum, shadow):
    """torch.optim.swa_utils.get_ema_multi_avg_fn: one multi-tensor operator that moves no byte twice."""
    torch._foreach_lerp_(teacher, _alike(teacher, student), 1 - momentum)
    _copied(teacher, shadow)


def _alike(teacher, student):
    return [s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]


def _copied(teacher, shadow):
    if shadow:
        torch._foreach_copy_(shadow, teacher)


def alternatives(arguments):
    return {"foreach_mul_add": foreach_mul_add, "foreach_lerp": foreach_lerp}


def third_party(arguments):
    return {}


def work(arguments):
    """Teacher and student read, teacher and shadow written: 12 bytes a parameter in float32. A product and a multiply-add each."""
    teacher, student, shadow = (arguments[name] or [] for name in ("teacher", "student", "shadow"))
    return Work(2 * read_bytes(teacher) + read_bytes(student) + read_bytes(shadow), 0, 2 * sum(x.numel() for x in teacher))


def sweeps():
    return {}
