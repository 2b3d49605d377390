"""How does a backbone become a classifier that is trained as a whole, and at which depth does each of its parameters stand?"""

import re

import torch
from torch import Tensor, nn

from fuseer.engine.models.backbone import TimmBackbone
from fuseer.engine.models.regnet import AnyNet
from fuseer.engine.models.vit import ViT

STEM = ("model.patch_embed.", "model.cls_token", "model.pos_embed")


class Classifier(nn.Module):
    """Images → backbone → features [B, D] → linear → float32 scores [B, classes].

    A ViT is turned into the one with pool="fc_norm": the mean of the patches goes through a new LayerNorm (eps 1e-6) that takes the place
    of the last one; its patch projection learns even where pretraining froze it. Weights of `head` are truncated N(0, 2e-5²) decided by
    the seed, its bias 0; it runs in fp32 outside autocast.
    Source: facebookresearch/mae models_vit.py (global_pool) and main_finetune.py.
    """

    def __init__(self, backbone: nn.Module, classes: int, seed: int):
        super().__init__()
        if isinstance(backbone, ViT):
            backbone.frozen_patches = False
            if backbone.pool != "fc_norm":
                backbone.pool, backbone.model.norm = "fc_norm", nn.Identity()
                backbone.model.fc_norm = nn.LayerNorm(backbone.width, eps=1e-6)
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = self.backbone(images)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features.float())


def depths(model: Classifier) -> dict[str, int]:
    """Depth by parameter: 0 for the stem, 1 … L for the blocks in order, L + 1 for what stands behind them.

    A ViT's stem is patch projection, class token and positions, its norm stands behind the blocks; our RegNets' blocks are the residual
    ones; timm's models say themselves which layers they have. Raises ValueError for one of timm's that does not.
    Source: facebookresearch/mae util/lr_decay.py.
    """
    backbone = model.backbone
    if isinstance(backbone, ViT):
        stem = {name: 0 for name, _ in backbone.named_parameters() if name.startswith(STEM)}
        blocks = {name: re.match(r"model\.blocks\.(\d+)\.", name) for name, _ in backbone.named_parameters()}
        found = stem | {name: int(at[1]) + 1 for name, at in blocks.items() if at}
    elif isinstance(backbone, AnyNet):
        first = [sum(len(blocks) for blocks in backbone.stages[:stage]) for stage in range(len(backbone.stages))]
        blocks = {name: re.match(r"stages\.(\d+)\.(\d+)\.", name) for name, _ in backbone.named_parameters()}
        found = {name: first[int(at[1])] + int(at[2]) + 1 if at else 0 for name, at in blocks.items()}
    else:
        found = _depths_by_timm(backbone)
    last = max(found.values()) + 1
    return {name: found.get(name.removeprefix("backbone."), last) for name, _ in model.named_parameters()}


def _depths_by_timm(backbone: TimmBackbone) -> dict[str, int]:
    from timm.models import group_parameters

    if not hasattr(backbone.model, "group_matcher"):
        raise ValueError(f"eval finetune: timm's {type(backbone.model).__name__} does not say which layers it has; give layer_decay=1")
    found = group_parameters(backbone.model, backbone.model.group_matcher(coarse=False), reverse=True)
    return {f"model.{name}": depth for name, depth in found.items()}


def parameter_groups(model: Classifier, *, layer_decay: float, weight_decay: float) -> list[dict]:
    """Groups {params, lr_scale, weight_decay} for an optimizer: lr_scale = layer_decay^(L + 1 - depth); parameters of at most one
    dimension, class token and positions are not decayed. Frozen parameters are left out."""
    at = depths(model) if layer_decay < 1 else {}
    last = max(at.values(), default=0)
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or name.rpartition(".")[2] in ("cls_token", "pos_embed", "dist_token")
        depth = at.get(name, last)
        group = groups.setdefault(
            (depth, spared), {"params": [], "lr_scale": layer_decay ** (last - depth), "weight_decay": 0.0 if spared else weight_decay}
        )
        group["params"].append(parameter)
    return list(groups.values())
