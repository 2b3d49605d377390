"""How is soft_xent called, checked, dispatched and differentiated?"""

import torch
from torch.autograd.function import once_differentiable

from fuseer.kernels import checks, dispatch
from fuseer.kernels.soft_xent import _cpu, _triton, reference

IMPLS = (_triton, _cpu, reference)
OPTIONS = "float temperature, Tensor? weights, Tensor? target_center, float? target_temperature"


def _fake(logits, target, temperature, weights, target_center, target_temperature):
    loss = torch.empty(logits.shape[:1], dtype=dispatch.compute_dtype(logits.dtype), device=logits.device)
    return loss, loss.new_empty((logits.shape[0], 4))


def _fake_backward(dloss, logits, target, statistics, temperature, weights, target_center, target_temperature):
    return logits.new_empty(logits.shape)


def _reference_backward(dloss, logits, target, statistics, temperature, weights, target_center, target_temperature):
    options = (temperature, weights, target_center, target_temperature)
    return dispatch.differentiated(reference.soft_xent)(dloss, logits, target, *options)


RAW = dispatch.register(
    "soft_xent",
    f"(Tensor logits, Tensor target, {OPTIONS}) -> (Tensor loss, Tensor statistics)",
    _fake,
    triton=_triton.forward,
    cpu=dispatch.COMPILED,
    reference=dispatch.widened(reference.forward),
)
RAW_BACKWARD = dispatch.register(
    "soft_xent_backward",
    f"(Tensor dloss, Tensor logits, Tensor target, Tensor statistics, {OPTIONS}) -> Tensor",
    _fake_backward,
    triton=_triton.backward,
    cpu=dispatch.COMPILED,
    reference=_reference_backward,
)


class _SoftXent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, target, temperature, weights, target_center, target_temperature):
        loss, statistics = RAW[backend](logits, target, temperature, weights, target_center, target_temperature)
        ctx.save_for_backward(logits, target, statistics, weights, target_center)
        ctx.backend, ctx.temperatures = backend, (temperature, target_temperature)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        *rows, weights, target_center = ctx.saved_tensors
        temperature, target_temperature = ctx.temperatures
        dlogits = RAW_BACKWARD[ctx.backend](dloss, *rows, temperature, weights, target_center, target_temperature)
        return None, dlogits, None, None, None, None, None


def soft_xent(logits, target, *, temperature=0.1, weights=None, target_center=None, target_temperature=None, backend=None):
    """loss_n = w_n (sum_k q_nk LSE(z_n/temperature) - <q_n, z_n>/temperature), z = logits, w = 1 without weights.

    logits [N, K], target [N, K] (any strides; rows need not sum to 1) -> [N], float32, or float64 where logits are float64; the
    other tensors are cast to that. q is the target itself, or softmax((target - target_center)/target_temperature) where
    target_temperature is given (DINO's centring: target_center [K], optional). weights [N].
    Differentiable in logits alone, once; target, weights and target_center are detached. No rank talks to another.
    Raises ValueError for shapes, K < 1, temperatures <= 0, target_center without target_temperature; TypeError for dtypes.
    Source: Caron et al. 2020 (SwAV) and 2021 (DINO); Zhou et al. 2022 (iBOT) for the weights.
    """
    checks.tensor("soft_xent", "logits", logits, "[N, K]")
    checks.prototypes("soft_xent", "logits", logits)
    sizes = tuple(logits.shape)
    for name, value, layout, wanted in (
        ("target", target, "[N, K]", sizes),
        ("weights", weights, "[N]", sizes[:1]),
        ("target_center", target_center, "[K]", sizes[1:]),
    ):
        if value is not None or name == "target":
            checks.tensor("soft_xent", name, value, layout)
            checks.shape("soft_xent", name, value, layout, wanted)
            checks.same_device("soft_xent", "logits", logits, name, value)
    checks.positive("soft_xent", "temperature", temperature)
    if target_temperature is not None:
        checks.positive("soft_xent", "target_temperature", target_temperature)
        target_temperature = float(target_temperature)
    elif target_center is not None:
        raise ValueError("soft_xent: target_center needs target_temperature: only a target that is a logit can be centred; got None")
    args = (logits, target, float(temperature), weights, target_center, target_temperature)
    return _SoftXent.apply(dispatch.choose("soft_xent", IMPLS, backend, *args), *args)
