"""How are activations normalised by batch statistics: in fp32, over one process or a group of them?"""

import copy
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

HALF = (torch.float16, torch.bfloat16)
REPLACEABLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# autograd computes again in threads of its own, one a device
_ACTIVE = threading.local()


class _Pass(AbstractContextManager):
    """One pass of a call that is computed twice: the first keeps its norms' moments in their order, each later one hands them out again."""

    def __init__(self, kept: list, *, first: bool):
        self.kept, self.first, self.outer, self.taken = kept, first, None, 0

    def __enter__(self):
        self.outer, self.taken = _active_pass(), 0
        _ACTIVE.innermost = self

    def __exit__(self, *_):
        _ACTIVE.innermost, self.outer = self.outer, None

    def moments(self, measure: Callable[[], tuple]) -> tuple:
        if self.first:
            self.kept.append(measure() if self.outer is None else self.outer.moments(measure))
            return self.kept[-1]
        self.taken += 1
        return self.kept[self.taken - 1]


def _active_pass() -> _Pass | None:
    return getattr(_ACTIVE, "innermost", None)


def _is_repeated() -> bool:
    """Is this forward one that was made before, and is made again for its gradient?"""
    # a compiler decides itself what to compute again, and cannot trace a thread's own variables
    if torch.compiler.is_compiling():
        return False
    inside = _active_pass()
    while inside is not None and inside.first:
        inside = inside.outer
    return inside is not None


def recomputation() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The first and the second pass of one call, for `context_fn` of torch.utils.checkpoint without reentrance.

    In the second pass the norms below move no statistics, count no batch, and join no collective: those over a group take the moments of
    the first pass, those alone take them again of the same rows; either way the bits are those of the first pass. Calls may be nested,
    made several times a step and repeated in any order; what one keeps, 3C + 1 numbers for every norm over a group, goes with its graph.
    """
    kept: list[tuple] = []
    return _Pass(kept, first=True), _Pass(kept, first=False)


def _per_channel(stat: Tensor, x: Tensor) -> Tensor:
    return stat.view(1, -1, *[1] * (x.dim() - 2))


def _reduced_dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _union_moments(x: Tensor, dtype: torch.dtype, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (fp64), biased variance [C] and row count of the union over `group`, from one all-gather of [2C + 1]."""
    channels, count = x.shape[1], x.numel() // x.shape[1]
    # fp64 on [C] costs nothing; in fp32 the mean alone would be off by eps * |mean| / std
    mean = x.sum(_reduced_dims(x), dtype=torch.float64) / max(1, count)
    variance = torch.var(x.to(dtype), _reduced_dims(x), correction=0) if count else torch.zeros_like(mean)
    own = torch.cat([mean, variance * count, mean.new_full((1,), count)])
    gathered = own.new_empty(dist.get_world_size(group), own.numel())
    dist.all_gather(list(gathered), own, group=group)
    means, squares, counts = gathered.split([channels, channels, 1], dim=1)
    total = counts.sum()
    at_least_one = total.clamp(min=1)
    mean = (counts * means).sum(0) / at_least_one
    variance = (squares + counts * (means - mean).square()).sum(0) / at_least_one
    return mean, variance.to(dtype), total.to(dtype)


class _GroupNormalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) · weight + bias with moments of the union of the group's rows; mean = high + low, two parts of dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, moments, eps, group):
        high, low, variance, total = moments
        ctx.save_for_backward(x, weight, high, low, variance, total)
        ctx.eps, ctx.group = eps, group
        bias = bias - low * weight * torch.rsqrt(variance + eps)
        return F.batch_norm(x, high, variance, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, high, low, variance, total = ctx.saved_tensors
        inverse_std = torch.rsqrt(variance + ctx.eps)
        centred = x.to(high.dtype) - _per_channel(high, x)
        dout = dout.to(high.dtype)
        dims = _reduced_dims(x)
        dbias = dout.sum(dims)
        dweight = ((dout * centred).sum(dims) - low * dbias) * inverse_std
        dx = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([dbias, dweight])
            dist.all_reduce(sums, group=ctx.group)
            mean_dout, mean_dout_normalised = (sums / total.clamp(min=1)).chunk(2)
            slope = mean_dout_normalised * inverse_std
            dx = dout - _per_channel(mean_dout - low * slope, x) - centred * _per_channel(slope, x)
            dx = dx.mul_(_per_channel(weight * inverse_std, x)).to(x.dtype)
        return dx, dweight, dbias, None, None, None


class BatchNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) · weight + bias per channel, statistics and affine in fp32 at least.

    x is [N, C] or [N, C, ...]; every axis but the channel axis is reduced. Training normalises by the biased variance of the batch and
    moves `running_mean` and `running_var` (unbiased) by `momentum`; evaluation normalises by these two. The output has the dtype of x,
    which may be half while parameters and statistics are float32. Casting the module to half casts the parameters only (they are
    upcast in forward); the statistics stay float32. Under a `recomputation` they move in the first pass only. The state has the keys of
    torch's BatchNorm. `affine=False` leaves out weight and bias, `shift=False` the bias alone. Differentiable once in x, weight and bias.

    `group=None` means this process alone, also when torch.distributed is initialised. With a group, training uses the moments of the union
    of its ranks' rows: one all-gather of 2C + 1 numbers merged as Chan et al. (1979) forward, one all-reduce of 2C backward. Counts may
    differ and be 0, but every rank of the group must run forward and backward. dx is the gradient of the sum of all ranks' losses with
    respect to this rank's x; gradients of weight and bias are this rank's share, for the data-parallel reduction to average.

    Raises ValueError for a wrong channel count or, without a group, for training on fewer than 2 values per channel; TypeError for an x
    that is neither half nor of the statistics' dtype. Source: Ioffe & Szegedy, arXiv 1502.03167.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        shift: bool = True,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        if num_features < 1:
            raise ValueError(f"BatchNorm: num_features must be at least 1; got {num_features}")
        self.num_features, self.eps, self.momentum, self.group = num_features, eps, momentum, group
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine and shift else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def reset_running_stats(self) -> None:
        """Set mean 0, variance 1, no batches seen."""
        self.running_mean.zero_()
        self.running_var.fill_(1)
        self.num_batches_tracked.zero_()

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        dtype = self.running_mean.dtype
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        moves = self.training and not _is_repeated()
        if moves:
            self.num_batches_tracked.add_(1)
        if self.training and self.group is not None:
            return self._forward_group(x, weight, bias)
        return self._forward_alone(x, weight, bias, moves)

    def _forward_alone(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, moves: bool) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training and not moves:
            # torch moves what it is given: here copies, which are saved for backward in their place
            mean, variance = mean.clone(), variance.clone()
        return F.batch_norm(x, mean, variance, weight, bias, self.training, self.momentum, self.eps)

    def _forward_group(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        weight = torch.ones_like(self.running_mean) if weight is None else weight
        bias = torch.zeros_like(self.running_mean) if bias is None else bias
        inside = _active_pass()
        moments = self._group_moments(x) if inside is None else inside.moments(lambda: self._group_moments(x))
        return _GroupNormalise.apply(x, weight, bias, moments, self.eps, self.group)

    @torch.no_grad()
    def _group_moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean in two parts, variance and row count of the group's rows, which move the running statistics."""
        dtype = self.running_mean.dtype
        mean, variance, total = _union_moments(x, dtype, self.group)
        high = mean.to(dtype)
        # stays on the device: asking the host whether any row exists would stall every layer
        rate = (total > 0).to(dtype) * self.momentum
        self.running_mean.lerp_(high, rate)
        self.running_var.lerp_(variance * (total / (total - 1).clamp(min=1)), rate)
        return high, (mean - high).to(dtype), variance, total

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"BatchNorm: x must be [N, {self.num_features}, ...]; got {list(x.shape)}")
        dtype = self.running_mean.dtype
        if x.dtype != dtype and not (x.dtype in HALF and dtype == torch.float32):
            raise TypeError(
                f"BatchNorm: x must be {dtype} like the running statistics, or half beside float32 ones; got {x.dtype}; cast one of them"
            )
        if self.training and self.group is None and x.numel() < 2 * self.num_features:
            raise ValueError(
                f"BatchNorm: training needs at least 2 values per channel; got x {list(x.shape)}; use a larger batch, a group, or eval()"
            )

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, statistic in before.items():
            cast = getattr(self, name)
            if cast.dtype in HALF:
                setattr(self, name, statistic.to(cast.device))
        return self

    def __deepcopy__(self, memo):
        # a process group cannot be copied: a teacher normalises over its student's group
        memo[id(self.group)] = self.group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def extra_repr(self) -> str:
        ranks = "this process" if self.group is None else f"{self.group.size()} ranks"
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}, over {ranks}"


class SplitBatchNorm(BatchNorm):
    """BatchNorm of `splits` equal slices of the batch, consecutive rows each, every one by its own moments; one process plays several.

    Training gives slice s the output that a process alone with these rows would give, and the running statistics the mean of what the
    `splits` processes would hold. Evaluation is BatchNorm's. x is [N, C, ...] with N a multiple of `splits`, at least 2 values per channel
    in each slice. Raises ValueError otherwise. What MoCo's shuffle hides from the loss it hides on one process too.
    Source: facebookresearch/moco, which trains with the statistics of each GPU.
    """

    def __init__(self, num_features: int, *, splits: int, **options):
        super().__init__(num_features, **options)
        if splits < 1 or self.group is not None:
            raise ValueError(f"SplitBatchNorm: splits must be at least 1, and group None; got splits={splits}, group={self.group}")
        self.splits = splits

    def _forward_alone(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, moves: bool) -> Tensor:
        if not self.training:
            return super()._forward_alone(x, weight, bias, moves)
        if x.shape[0] % self.splits or x.numel() < 2 * self.splits * self.num_features:
            raise ValueError(
                f"SplitBatchNorm: x must have rows for {self.splits} equal slices of at least 2 values per channel; got {list(x.shape)}"
            )
        means, variances = self.running_mean.repeat(self.splits, 1), self.running_var.repeat(self.splits, 1)
        slices = zip(x.chunk(self.splits), means, variances, strict=True)
        out = torch.cat([F.batch_norm(part, mean, var, weight, bias, True, self.momentum, self.eps) for part, mean, var in slices])
        if moves:
            self.running_mean.copy_(means.mean(0))
            self.running_var.copy_(variances.mean(0))
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, in {self.splits} slices"


class _BatchNormAct(BatchNorm):
    """BatchNorm followed by the drop and act children that timm's fused norm layers carry; same keys, no extra state."""

    def __init__(self, num_features: int, drop: nn.Module, act: nn.Module, **options):
        super().__init__(num_features, **options)
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class _SplitBatchNormAct(_BatchNormAct, SplitBatchNorm):
    """The same of slices of the batch."""


def _converted(old: nn.Module, name: str, group: dist.ProcessGroup | None, splits: int) -> BatchNorm:
    if not getattr(old, "track_running_stats", True) or old.momentum is None:
        raise ValueError(
            f"replace_batch_norm: {name or 'module'} must keep running statistics with a fixed momentum; "
            f"got track_running_stats={old.track_running_stats}, momentum={old.momentum}"
        )
    options = {"eps": old.eps, "momentum": old.momentum, "affine": old.weight is not None, "group": group}
    split = {"splits": splits} if splits > 1 else {}
    children = dict(old.named_children())
    if children.keys() == {"drop", "act"}:
        kind = _SplitBatchNormAct if split else _BatchNormAct
        new = kind(old.num_features, drop=children["drop"], act=children["act"], **options, **split)
    elif type(old) in REPLACEABLE or type(old) in (BatchNorm, SplitBatchNorm):
        new = (SplitBatchNorm if split else BatchNorm)(old.num_features, **options, **split)
    else:
        raise TypeError(
            f"replace_batch_norm: {name or 'module'} is a {type(old).__name__}, whose forward is unknown here; replace it by hand"
        )
    new.weight, new.bias = old.weight, old.bias
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        buffer = getattr(old, key)
        setattr(new, key, buffer.float() if buffer.dtype in HALF else buffer)
    return new.train(old.training)


def replace_batch_norm(module: nn.Module, group: dist.ProcessGroup | None = None, splits: int = 1) -> nn.Module:
    """Put a `BatchNorm` over `group`, or a `SplitBatchNorm` of `splits` slices, in the place of every batch norm under `module`.

    Works in place and returns the module; torch's, timm's and our own norms are replaced. Keeps parameters (the same objects), statistics,
    mode, keys of the state and a timm layer's activation. A module that is itself a batch norm is returned converted. Raises ValueError for
    a norm without running statistics or with momentum=None, and for slices over a group; TypeError for a subclass whose forward is unknown.
    """
    kinds = (nn.modules.batchnorm._BatchNorm, BatchNorm)
    if isinstance(module, kinds):
        return _converted(module, "", group, splits)
    for parent_name, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds):
                setattr(parent, name, _converted(child, f"{parent_name}.{name}".lstrip("."), group, splits))
    return module


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """Reset the statistics of every BatchNorm of `model` and set them to their average over `batches`; returns the model.

    Each batch [B, ...] is passed through the model in training mode, without gradient; a batch counts by its number of rows, so that the
    result is Σ_i n_i · moment_i / Σ_i n_i with the unbiased variance inside each batch. Parameters do not change; every module's mode and
    momentum are restored. Norms over a group count the rows of the group: all its ranks must give the same number of batches.
    Raises ValueError if there is no batch. Source: precise-BN of pycls, pycls/core/net.py, here weighted by rows.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    groups = {norm.group for norm in norms}
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    seen = dict.fromkeys(groups, 0)
    model.train()
    try:
        for images in batches:
            if not any(seen.values()):
                for norm in norms:
                    norm.reset_running_stats()
            rows = {group: _rows_of(images, group) for group in groups}
            for norm in norms:
                norm.momentum = rows[norm.group] / max(1, seen[norm.group] + rows[norm.group])
            model(images)
            seen = {group: seen[group] + rows[group] for group in groups}
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes.items():
            module.training = training
    if norms and not any(seen.values()):
        raise ValueError("calibrate: batches gave no image; give at least one batch")
    return model


def _rows_of(images: Tensor, group: dist.ProcessGroup | None) -> int:
    if group is None:
        return images.shape[0]
    rows = torch.tensor(images.shape[0], device=images.device)
    dist.all_reduce(rows, group=group)
    return int(rows)
