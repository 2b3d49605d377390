"""How do pooled features become unit embeddings, and embeddings scores?"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fuseer.engine.models.norm import BatchNorm

LAST_NORMS = {"scale": {"shift": False}, "plain": {"affine": False}}


def _float32_at_least(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


class FP32Linear(nn.Linear):
    """x Wᵀ + b in float32 at least, outside autocast, whatever the dtype of x [N, D] and of the parameters."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = _float32_at_least(x, self.weight)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), bias)


class ProjectionHead(nn.Module):
    """Linear [- BatchNorm] - activation - ... - Linear, then z / max(‖z‖₂, 1e-12) per row with `normalize`.

    Maps x [N, dims[0]] to [N, dims[-1]], in float32 at least and outside autocast. The last layer has no activation, and no norm unless
    `last_norm` is "scale" (BatchNorm with weight, without bias) or "plain" (neither). `bias=False` drops the biases that a BatchNorm right
    after would cancel (true gradient 0); every other layer keeps its own, the last one unless `last_bias=False`.
    `activation` is a module class; norms are over `group` (None: this process). Differentiable in x and all parameters.
    Raises ValueError for fewer than two dims, a dim below 1, an unknown last_norm, or x of another width.
    Source: swav, src/resnet50.py; vissl, vissl/models/heads/swav_prototypes_head.py; simclr, tf2/model.py; moco-v3, moco/builder.py.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        batch_norm: bool = True,
        bias: bool = True,
        activation: type[nn.Module] = nn.ReLU,
        group: dist.ProcessGroup | None = None,
        normalize: bool = True,
        last_bias: bool = True,
        last_norm: str | None = None,
    ):
        super().__init__()
        if last_norm not in (None, *LAST_NORMS):
            raise ValueError(f"ProjectionHead: last_norm must be None, {' or '.join(LAST_NORMS)}; got {last_norm!r}")
        if len(dims) < 2 or min(dims) < 1:
            raise ValueError(f"ProjectionHead: dims must be at least two positive widths, input first; got {list(dims)}")
        self.dims, self.normalize = tuple(dims), normalize
        layers = []
        for width_in, width in zip(dims[:-2], dims[1:-1], strict=True):
            layers.append(FP32Linear(width_in, width, bias=bias or not batch_norm))
            if batch_norm:
                layers.append(BatchNorm(width, group=group))
            layers.append(activation())
        layers.append(FP32Linear(dims[-2], dims[-1], bias=last_bias))
        if last_norm:
            layers.append(BatchNorm(dims[-1], group=group, **LAST_NORMS[last_norm]))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.dims[0]:
            raise ValueError(f"ProjectionHead: x must be [N, {self.dims[0]}]; got {list(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            z = self.layers(x)
            return F.normalize(z, dim=1, eps=1e-12) if self.normalize else z


class Prototypes(nn.Module):
    """scores = z · weightᵀ: z [N, D] against K prototypes, weight [K, D], in float32 at least and outside autocast.

    Rows start with unit length, and `weight.unit_rows = True` asks the optimizer to restore it after every update. With `frozen` the
    weight is detached: gradients reach z only. Raises ValueError for D < 1, K < 1 or z of another width.
    Source: swav, main_swav.py.
    """

    def __init__(self, D: int, K: int):
        super().__init__()
        if D < 1 or K < 1:
            raise ValueError(f"Prototypes: D and K must be at least 1; got D={D}, K={K}")
        self.weight = nn.Parameter(F.normalize(torch.empty(K, D).uniform_(-1, 1), dim=1))
        self.weight.unit_rows = True

    def forward(self, z: Tensor, frozen: bool = False) -> Tensor:
        if z.dim() != 2 or z.shape[1] != self.weight.shape[1]:
            raise ValueError(f"Prototypes: z must be [N, {self.weight.shape[1]}]; got {list(z.shape)}")
        weight = self.weight.detach() if frozen else self.weight
        dtype = _float32_at_least(z, weight)
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z.to(dtype), weight.to(dtype))
