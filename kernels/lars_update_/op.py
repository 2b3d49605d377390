"""How is lars_update_ called, checked and dispatched?"""

import torch

from fuseer.kernels import checks, dispatch
from fuseer.kernels.lars_update_ import _cpu, _cuda, _triton, reference

IMPLS = (_triton, _cuda, _cpu, reference)
DENOMINATORS = ("sum", "norm_of_sum")


def _fake(*arguments):
    return None


def _reference(params, grads, momenta, *options):
    *options, skip, segments, group_name = options
    if segments is not None:
        checks.segments_inside("lars_update_", segments.tolist(), [x.numel() for x in params], len(options[6]))
    lists = [dispatch.widened_list(x, params) for x in (params, grads, momenta)]
    new_params, new_momenta = reference.lars_update_(*lists, *options, segments, group_name)
    for old, new in zip([*params, *momenta], [*new_params, *new_momenta], strict=True):
        old.copy_(new if skip is None else torch.where(skip != 0, old, new.to(old.dtype)))


RAW = dispatch.register(
    "lars_update_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, float lr, float momentum, float weight_decay, float trust_coefficient, "
    "float eps, str denominator, bool[] adapt, bool lr_in_momentum, bool nesterov, bool clip, Tensor? skip, Tensor? segments, "
    "str group_name) -> ()",
    _fake,
    triton=_triton.forward,
    cuda=_cuda.forward,
    cpu=dispatch.COMPILED,
    reference=_reference,
)


@torch.no_grad()
def lars_update_(
    params, grads, momenta, *, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001, eps=0.0, denominator="sum", adapt=None,
    lr_in_momentum=False, nesterov=False, clip=False, skip=None, segments=None, group=None, backend=None,
):  # fmt: skip
    """One LARS (LARC) step in place, all tensors in two launches: sums of squares for each layer, then the update; no host sync.

        r_l  = trust_coefficient |w| / (|g| + weight_decay |w| + eps)        denominator="sum"         (LARC, PAWS)
        r_l  = trust_coefficient |w| / (|g + weight_decay w| + eps)          denominator="norm_of_sum" (MoCo v3, MAE, SimCLR, BYOL)
        d    = r_l (g + weight_decay w);  m <- momentum m + d;  w <- w - lr (m, or d + momentum m with nesterov)

    r_l is min(r_l / lr, 1) with `clip`. Where |w|, or |g| ("sum"; |g + weight_decay w| for "norm_of_sum"), is 0 the gradient is taken
    as it is: r_l = 1, for "sum" without decay. Where adapt[l] is False, r_l = 1. lr_in_momentum: m <- momentum m + lr d; w <- w - m (with
    nesterov lr d + momentum m), so that a new lr acts on new gradients alone.
    params, grads, momenta: lists of equal length, shapes equal at one place of the lists, any strides, each tensor of its own dtype
    (float16, bfloat16, float32, float64); arithmetic in float32, float64 where params are; sums end in float64. Zero momenta begin.
    skip: a scalar tensor on the device; where it is not 0 nothing changes (an overflow, found without asking the host).
    segments: None, and each tensor is a layer; or an int64 CPU tensor [S, 4] of rows (tensor, start, numel, layer): params are then flat
    partitions [n] such as ZeRO's, a layer may lie in several pieces on several ranks, what lies in no segment (padding) is neither read
    nor written, and `adapt` has to say, for each layer, whether it is adapted: the same list on every rank.
    group: None, this process alone, or the ranks over which layers are spread: one all-reduce of 3 float64 a layer, which a rank
    without a single element joins with an empty tensor. Nothing is differentiable, nothing is returned.
    Raises ValueError for lengths, shapes, devices, numbers and segments out of range, tensors that overlap themselves; TypeError for
    dtypes. The sum (g + weight_decay w)^2 is taken as such: |g|^2 + 2 weight_decay g.w + ... cancels where g is near -weight_decay w.
    Source: You et al. 2017; NVIDIA apex LARC; moco-v3 and simclr optimizers.
    """
    params, grads, momenta = list(params), list(grads), list(momenta)
    checks.same_length("lars_update_", params=params, grads=grads, momenta=momenta)
    checks.written_lists("lars_update_", params=params, momenta=momenta)
    checks.alike("lars_update_", "params", params, grads=grads, momenta=momenta)
    if denominator not in DENOMINATORS:
        raise ValueError(f"lars_update_: denominator must be one of {', '.join(DENOMINATORS)}; got {denominator!r}")
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("eps", eps)):
        checks.not_negative("lars_update_", name, value)
    checks.positive("lars_update_", "trust_coefficient", trust_coefficient)
    adapt = _layers(params, adapt, segments)
    if skip is not None:
        checks.device_flag("lars_update_", "skip", skip, params)
    name = dispatch.group_name("lars_update_", group)
    if name and not params:
        raise ValueError("lars_update_: with a group, params must hold a tensor on every rank, an empty one at least; got none")
    numbers = tuple(float(x) for x in (lr, momentum, weight_decay, trust_coefficient, eps))
    switches = tuple(bool(x) for x in (lr_in_momentum, nesterov, clip))
    args = (params, grads, momenta, *numbers, denominator, adapt, *switches, skip, segments, name)
    if params:
        RAW[dispatch.choose("lars_update_", IMPLS, backend, *args)](*args)
        dispatch.changed(params, momenta)


def _layers(params, adapt, segments):
    """Whether each layer is adapted, as a list."""
    if segments is None:
        adapt = [True] * len(params) if adapt is None else [bool(x) for x in adapt]
        if len(adapt) != len(params):
            raise ValueError(f"lars_update_: adapt must say yes or no for each of {len(params)} tensors; got {len(adapt)}")
        return adapt
    if adapt is None:
        raise ValueError("lars_update_: segments needs adapt, one bool for each layer, which also says how many layers all ranks have")
    checks.segments("lars_update_", segments, params, len(adapt))
    return [bool(x) for x in adapt]
