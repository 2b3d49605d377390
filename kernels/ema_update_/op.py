"""How is ema_update_ called, checked and dispatched?"""

import torch

from fuseer.kernels import checks, dispatch
from fuseer.kernels.ema_update_ import _cpu, _cuda, _triton, reference

IMPLS = (_triton, _cuda, _cpu, reference)


def _fake(teacher, student, momentum, momentum_scalar, shadow):
    return None


def _reference(teacher, student, momentum, momentum_scalar, shadow):
    widened = [dispatch.widened_list(x, teacher) for x in (teacher, student)]
    for i, (t, s) in enumerate(zip(*widened, strict=True)):
        (new,) = reference.ema_update_([t], [s], momentum if momentum_scalar is None else momentum_scalar.to(t.dtype))
        teacher[i].copy_(new)
        if shadow:
            shadow[i].copy_(new)


RAW = dispatch.register(
    "ema_update_",
    "(Tensor(a!)[] teacher, Tensor[] student, float momentum, Tensor? momentum_scalar, Tensor(b!)[] shadow) -> ()",
    _fake,
    triton=_triton.forward,
    cuda=_cuda.forward,
    cpu=dispatch.COMPILED,
    reference=_reference,
)


@torch.no_grad()
def ema_update_(teacher, student, momentum, *, shadow=None, backend=None):
    """teacher_i <- m teacher_i + (1 - m) student_i in place for every i, in one launch; the new numbers also into shadow_i.

    teacher, student, shadow: lists of equal length; the tensors at one place of the lists have one shape, any strides (where these
    agree and the memory has no gaps it is walked as it lies), and each its own dtype: float16, bfloat16, float32, float64. Empty
    tensors and empty lists are legal. The arithmetic is float32 (float64 where the teacher is), each result is rounded once to the
    dtype of where it goes: a half-precision teacher alone stops moving once (1 - m) |s - t| is below half a spacing of its numbers, at
    m >= 0.996 almost at once, so keep a float32 teacher and let `shadow` be its half-precision copy.
    momentum m: a number in [0, 1], or a scalar tensor on the tensors' device (float32 or float64), which is read there: a CUDA graph
    can be replayed with another one. Nothing is differentiable, nothing is returned, no rank talks to another, no host sync.
    Raises ValueError for lengths, shapes, devices, tensors that overlap themselves, m outside [0, 1]; TypeError for dtypes.
    Replaces `for t, s in zip(teacher, student): t.mul_(m).add_(s, alpha=1 - m)` and the loop that casts the teacher afterwards.
    Source: Tarvainen & Valpola 2017; He et al. 2020 (MoCo).
    """
    teacher, student, shadow = list(teacher), list(student), list(shadow or ())
    checks.same_length("ema_update_", teacher=teacher, student=student, **({"shadow": shadow} if shadow else {}))
    checks.written_lists("ema_update_", teacher=teacher, **({"shadow": shadow} if shadow else {}))
    checks.alike("ema_update_", "teacher", teacher, student=student, **({"shadow": shadow} if shadow else {}))
    number, scalar = _momentum(momentum, teacher)
    args = (teacher, student, number, scalar, shadow)
    if teacher:
        RAW[dispatch.choose("ema_update_", IMPLS, backend, *args)](*args)
        dispatch.changed(teacher, shadow)


def _momentum(momentum, teacher):
    """(the number, None), or (0, the scalar tensor)."""
    if not isinstance(momentum, torch.Tensor):
        checks.within("ema_update_", "momentum", momentum, 0, 1)
        return float(momentum), None
    if momentum.dim() or momentum.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"ema_update_: momentum must be a number or a float32 or float64 scalar tensor; got {momentum.dtype} {list(momentum.shape)}"
        )
    if teacher:
        checks.same_device("ema_update_", "teacher", teacher[0], "momentum", momentum)
    return 0.0, momentum
