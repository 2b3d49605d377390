"""Which vision transformer does a name mean, and how do images become tokens and tokens features?"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# our names for timm's plain transformers; MoCo v3's small one has 12 heads where timm's has 6
NAMED = {
    "vit_tiny": ("vit_tiny_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {}),
    "vit_base": ("vit_base_patch16_224", {}),
    "vit_large": ("vit_large_patch16_224", {}),
    "vit_huge": ("vit_huge_patch14_224", {}),
    "mocov3_vit_small": ("vit_small_patch16_224", {"num_heads": 12}),
    "mocov3_vit_base": ("vit_base_patch16_224", {}),
}
OPTIONS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "drop_path_rate")
POOLS = ("token", "mean")


def sincos_positions(height: int, width: int, D: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """[height · width, D], row by row: (sin x·ω, cos x·ω, sin y·ω, cos y·ω) of column x and row y, ω_i = 10000^(-4i / D).

    Raises ValueError unless D is a positive multiple of 4. Source: moco-v3, vits.py, on square grids.
    """
    if D < 4 or D % 4:
        raise ValueError(f"sincos_positions: D must be a positive multiple of 4; got {D}")
    frequency = 10000.0 ** (-torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    y, x = torch.meshgrid(torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (x, y)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1).to(dtype)


class ViT(nn.Module):
    """Images [B, 3, H, W] → patches + fixed 2-D sine-cosine positions → class token first → blocks → norm → features [B, D].

    `model` is a timm VisionTransformer with a class token; its learnt positions are dropped, for positions here are computed for whatever
    grid the images have (H and W multiples of the patch); the class token has position 0. Features are the class token's, or with
    pool="mean" the mean of the patches'. With `frozen_patches` the random patch projection never changes: its parameters are detached
    here and tagged `frozen` for the optimizer, as MoCo v3 needs to stay stable. Starts as MoCo v3 does (`initialise`). `embed` and `encode`
    are the two halves of the forward, for methods that drop patches between them.
    Source: Dosovitskiy et al., arXiv 2010.11929; Chen et al., arXiv 2104.02057; moco-v3, vits.py.
    """

    def __init__(self, model: nn.Module, *, frozen_patches: bool = False, pool: str = "token"):
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"ViT: pool must be {' or '.join(POOLS)}; got {pool!r}")
        self.model, self.width, self.frozen_patches, self.pool = model, model.embed_dim, frozen_patches, pool
        self.patch = model.patch_embed.patch_size
        model.pos_embed = None
        self.memory_format = torch.contiguous_format
        self._kept: dict[tuple, Tensor] = {}
        self.initialise()
        if frozen_patches:
            for parameter in model.patch_embed.parameters():
                parameter.frozen = True

    @torch.no_grad()
    def initialise(self) -> None:
        """Xavier-uniform weights, q, k and v each on its own, and the patch projection as the linear map it is; zero biases; class token
        N(0, 1e-6²)."""
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                rows = module.weight.shape[0] // (3 if name.endswith("attn.qkv") else 1)
                bound = math.sqrt(6 / (rows + module.weight[0].numel()))
                module.weight.uniform_(-bound, bound)
                if module.bias is not None:
                    module.bias.zero_()
        self.model.cls_token.normal_(std=1e-6)

    def embed(self, images: Tensor) -> Tensor:
        """Patches [B, P, D] in row order, positions added."""
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % self.patch[0] or images.shape[3] % self.patch[1]:
            raise ValueError(f"ViT: images must be [B, 3, H, W] of whole {self.patch[0]}x{self.patch[1]} patches; got {list(images.shape)}")
        weight, bias = self.model.patch_embed.proj.weight, self.model.patch_embed.proj.bias
        if self.frozen_patches:
            weight, bias = weight.detach(), bias.detach()
        patches = F.conv2d(images.contiguous(memory_format=self.memory_format), weight, bias, stride=self.patch)
        height, width = patches.shape[2:]
        patches = patches.flatten(2).transpose(1, 2)
        # of the parameters' dtype: under autocast the patches are half, and the tokens must not be
        return patches + self._positions(height, width, weight)

    def encode(self, patches: Tensor) -> Tensor:
        """Class token and patches [B, 1 + P, D] after all blocks and the last norm; `patches` may be any of those that `embed` gave."""
        tokens = torch.cat([self.model.cls_token.expand(len(patches), -1, -1).to(patches.dtype), patches], 1)
        return self.model.norm(self.model.blocks(tokens))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encode(self.embed(images))
        return tokens[:, 0] if self.pool == "token" else tokens[:, 1:].mean(1)

    def _positions(self, height: int, width: int, like: Tensor) -> Tensor:
        # kept per grid: rebuilt on the host at every step they would cost a copy to the device
        key = (height, width, like.dtype, like.device)
        if key not in self._kept:
            self._kept[key] = sincos_positions(height, width, self.width, dtype=like.dtype).to(like.device)
        return self._kept[key]


def build_vit(name: str, *, frozen_patches: bool = False, pool: str = "token", **options) -> ViT:
    """The `ViT` called `name`, a key of `NAMED`, with `OPTIONS` of timm's VisionTransformer replaced.

    Raises ValueError for another name or option.
    """
    if name not in NAMED:
        raise ValueError(f"build_vit: name must be one of {', '.join(NAMED)}; got {name!r}")
    if strange := sorted(options.keys() - set(OPTIONS)):
        raise ValueError(f"build_vit: options are frozen_patches, pool, {', '.join(OPTIONS)}; got {', '.join(strange)}")
    # timm takes seconds to import and is an extra: only those who name its models pay
    import timm

    timm_name, fixed = NAMED[name]
    return ViT(timm.create_model(timm_name, num_classes=0, **{**fixed, **options}), frozen_patches=frozen_patches, pool=pool)
