"""Which network does a backbone's name mean, ours or timm's, with features [B, D] and a width?"""

import difflib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuseer.engine.config import TrainConfig
from fuseer.engine.models.norm import replace_batch_norm
from fuseer.engine.models.recompute import compile_blocks, recompute_stages
from fuseer.engine.models.regnet import NAMED, build_regnet
from fuseer.engine.models.vit import NAMED as NAMED_VIT
from fuseer.engine.models.vit import build_vit

OURS = ("regnet", "anynet", *NAMED, *NAMED_VIT)


class TimmBackbone(nn.Module):
    """A timm model without classifier: images [B, 3, H, W] to features [B, D], D = `width`, with our BatchNorm over `group`."""

    def __init__(self, model: nn.Module, *, group: dist.ProcessGroup | None = None):
        super().__init__()
        self.model = replace_batch_norm(model, group)
        # mobilenetv3 and kin widen once more between the last map and the classifier
        self.width = getattr(model, "head_hidden_size", None) or model.num_features
        self.memory_format = torch.contiguous_format

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.contiguous(memory_format=self.memory_format))


def build_backbone(
    name: str,
    *,
    group: dist.ProcessGroup | None = None,
    channels_last: bool = False,
    recompute: str | Sequence = (),
    recompute_min_size: int = 0,
    compiled: bool = False,
    **options,
) -> nn.Module:
    """The backbone called `name`: forward maps images [B, 3, H, W] to features [B, D], `width` is D.

    "anynet", "regnet" and the keys of `regnet.NAMED` are ours, with the options of `build_regnet`; the keys of `vit.NAMED` with those of
    `build_vit`; any other name is timm's, with the options of `timm.create_model`. Norms are over `group` (None: this process). With
    `channels_last` the activations are, while the weights stay contiguous, as DeepSpeed demands. `recompute` and `recompute_min_size`
    are told to `recompute_stages`; `compiled` compiles the blocks. Raises ValueError for a name that neither has.
    """
    if name in NAMED_VIT:
        backbone = build_vit(name, **options)
    elif name in OURS:
        backbone = build_regnet(name, group=group, **options)
    else:
        backbone = _timm_backbone(name, group, options)
    backbone.memory_format = torch.channels_last if channels_last else torch.contiguous_format
    if recompute:
        recompute_stages(backbone, recompute, recompute_min_size)
    return compile_blocks(backbone) if compiled else backbone


def _timm_backbone(name: str, group: dist.ProcessGroup | None, options: dict) -> TimmBackbone:
    # timm takes seconds to import and is an extra: only those who name its models pay
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*OURS, *timm.list_models()], n=3, cutoff=0.5)
        raise ValueError(f"build_backbone: no model is called {name!r}; the nearest names are {', '.join(near) or 'none'}")
    return TimmBackbone(timm.create_model(name, num_classes=0, **options), group=group)


def initial_backbone(config: TrainConfig, group: dist.ProcessGroup | None = None) -> nn.Module:
    """The backbone of a run's `TrainConfig` as it was before the first step: decided by the seed alone."""
    torch.manual_seed(config.seed)
    model = config.model
    return build_backbone(
        model.name,
        group=group,
        channels_last=model.channels_last,
        recompute=model.recompute,
        recompute_min_size=model.recompute_min_size,
        compiled=model.compile_blocks,
        **model.options,
    )
