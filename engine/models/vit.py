"""Which vision transformer does a name mean, and how do images become tokens and tokens features?"""

import math
from collections.abc import Mapping

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
OPTIONS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "drop_path_rate", "img_size")
OURS = ("frozen_patches", "pool", "start", "learnt_positions")
POOLS = ("token", "mean", "fc_norm")
# q, k and v drawn each on its own; spread of the class token
STARTS = {"moco_v3": (True, 1e-6), "mae": (False, 0.02)}
# what published files of fine-tuned networks hold besides the network
CLASSIFIER = ("head.", "head_dist.")


def sincos_positions(height: int, width: int, D: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """[height · width, D], row by row: (sin x·ω, cos x·ω, sin y·ω, cos y·ω) of column x and row y, ω_i = 10000^(-4i / D).

    Raises ValueError unless D is a positive multiple of 4. Source: moco-v3, vits.py; mae, util/pos_embed.py, on square grids.
    """
    if D < 4 or D % 4:
        raise ValueError(f"sincos_positions: D must be a positive multiple of 4; got {D}")
    frequency = 10000.0 ** (-torch.arange(D // 4, dtype=torch.float64) / (D // 4))
    y, x = torch.meshgrid(torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (x, y)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1).to(dtype)


def resized_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positions [P, D] of the patches of the grid `old` (rows, columns), bicubic to those of `new`; themselves where these are equal.

    Source: mae, util/pos_embed.py (align_corners=False, no antialiasing).
    """
    if old == new:
        return positions
    grid = positions.reshape(1, *old, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, size=new, mode="bicubic", align_corners=False).flatten(2)[0].T


@torch.no_grad()
def initialise_linear(module: nn.Module, *, split_qkv: bool = False) -> None:
    """Every Linear below `module`, and every convolution as the linear map of a patch: Xavier-uniform weight, zero bias.

    With `split_qkv` q, k and v are each drawn on their own.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            rows = layer.weight.shape[0] // (3 if split_qkv and name.endswith("attn.qkv") else 1)
            bound = math.sqrt(6 / (rows + layer.weight[0].numel()))
            layer.weight.uniform_(-bound, bound)
            if layer.bias is not None:
                layer.bias.zero_()


class ViT(nn.Module):
    """Images [B, 3, H, W] → patches + positions → class token first → blocks → norm → features [B, D].

    `model` is a timm VisionTransformer with a class token, and keeps timm's names. Positions are the fixed 2-D sine-cosine ones, computed
    for whatever grid the images have (H and W multiples of the patch), 0 for the class token; with `learnt_positions` they are timm's
    parameter, made for `img_size` and bicubically resized to other grids. Features are the class token's; with pool="mean" the mean of
    the patches'; with pool="fc_norm" (fine-tuned MAE) that mean taken before the norm, which is then called fc_norm. With
    `frozen_patches` the random patch projection never changes: its parameters are detached here and tagged `frozen` for the optimizer, as
    MoCo v3 needs to stay stable. `start` says whose initialisation this is, a key of `STARTS`. `embed` and `encode` are the two halves
    of the forward, for methods that drop patches between them.
    Source: Dosovitskiy et al., arXiv 2010.11929; Chen et al., arXiv 2104.02057; He et al., arXiv 2111.06377; moco-v3, vits.py.
    """

    def __init__(
        self, model: nn.Module, *, frozen_patches: bool = False, pool: str = "token", start: str = "moco_v3", learnt_positions: bool = False
    ):
        super().__init__()
        for name, value, known in (("pool", pool, POOLS), ("start", start, STARTS)):
            if value not in known:
                raise ValueError(f"ViT: {name} must be {' or '.join(known)}; got {value!r}")
        self.model, self.width, self.frozen_patches, self.pool, self.start = model, model.embed_dim, frozen_patches, pool, start
        self.patch = model.patch_embed.patch_size
        if not learnt_positions:
            model.pos_embed = None
        self.memory_format = torch.contiguous_format
        self._kept: dict[tuple, Tensor] = {}
        self.initialise()
        if frozen_patches:
            for parameter in model.patch_embed.parameters():
                parameter.frozen = True

    @torch.no_grad()
    def initialise(self) -> None:
        """Xavier-uniform weights and zero biases, the patch projection as the linear map it is; learnt positions N(0, 0.02²).

        moco_v3: q, k and v each on its own, class token N(0, 1e-6²). mae: q, k, v as one matrix, class token N(0, 0.02²), and the patch
        projection's bias as torch leaves a convolution's, uniform up to 1/√(numbers of a patch).
        """
        split_qkv, spread = STARTS[self.start]
        initialise_linear(self.model, split_qkv=split_qkv)
        if self.start == "mae":
            projection = self.model.patch_embed.proj
            bound = projection.weight[0].numel() ** -0.5
            projection.bias.uniform_(-bound, bound)
        self.model.cls_token.normal_(std=spread)
        if self.model.pos_embed is not None:
            self.model.pos_embed.normal_(std=0.02)

    @torch.no_grad()
    def load_published(self, state: Mapping[str, Tensor]) -> None:
        """Takes the weights of a timm, MAE or DINO state dict, keyed as there (cls_token, pos_embed, patch_embed.proj.*, blocks.*, norm.*).

        A classifier (head.*) is passed over. With `learnt_positions` pos_embed is resized to this network's grid; without, it has to be
        the computed one. Raises ValueError that names what is missing, what is strange, and shapes that differ.
        """
        state = {name: value for name, value in state.items() if not name.startswith(CLASSIFIER)}
        own = self.model.state_dict()
        if "pos_embed" in state:
            state["pos_embed"] = self._own_positions(state["pos_embed"])
            if self.model.pos_embed is None:
                del state["pos_embed"]
        wrong = [f"{name} is missing" for name in sorted(own.keys() - state.keys())]
        wrong += [f"{name} {list(state[name].shape)} is strange here" for name in sorted(state.keys() - own.keys())]
        wrong += [
            f"{name} is {list(state[name].shape)}, wanted {list(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if own[name].shape != state[name].shape
        ]
        if wrong:
            more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise ValueError(f"ViT: the file is of another network: {'; '.join(wrong[:8])}{more}; build the network that the file is of")
        self.model.load_state_dict(state)

    def _own_positions(self, positions: Tensor) -> Tensor:
        side = math.isqrt(max(0, positions.shape[1] - 1)) if positions.dim() == 3 else 0
        if side == 0 or side * side != positions.shape[1] - 1 or positions.shape[2] != self.width:
            raise ValueError(
                f"ViT: pos_embed must be [1, 1 + P, {self.width}] of a square grid with a class token; got {list(positions.shape)}"
            )
        if self.model.pos_embed is not None:
            patches = resized_positions(positions[0, 1:].float(), (side, side), tuple(self.model.patch_embed.grid_size))
            return torch.cat([positions[:, :1].float(), patches[None]], 1)
        computed = torch.cat([positions.new_zeros(1, self.width), sincos_positions(side, side, self.width).to(positions)])
        # the official ones are computed in float32, up to 1e-6 off; bfloat16 files to 4e-3
        if (positions[0] - computed).abs().max() > 8 * max(1e-5, torch.finfo(positions.dtype).eps):
            raise ValueError("ViT: pos_embed is not the fixed sine-cosine one, it was learnt; build the network with learnt_positions=true")
        return positions

    def embed(self, images: Tensor) -> Tensor:
        """Patches [B, P, D] in row order, positions added."""
        height, width = self.grid(images)
        weight, bias = self.projection()
        patches = F.conv2d(images.contiguous(memory_format=self.memory_format), weight, bias, stride=self.patch)
        # of the parameters' dtype: under autocast the patches are half, and the tokens must not be
        return patches.flatten(2).transpose(1, 2) + self.positions(height, width)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of `images`. Raises ValueError unless these are [B, 3, H, W] of whole patches."""
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % self.patch[0] or images.shape[3] % self.patch[1]:
            raise ValueError(f"ViT: images must be [B, 3, H, W] of whole {self.patch[0]}x{self.patch[1]} patches; got {list(images.shape)}")
        return images.shape[2] // self.patch[0], images.shape[3] // self.patch[1]

    def projection(self) -> tuple[Tensor, Tensor]:
        """Weight [D, 3, p, p] and bias [D] of the patch projection, detached where it is frozen."""
        weight, bias = self.model.patch_embed.proj.weight, self.model.patch_embed.proj.bias
        return (weight.detach(), bias.detach()) if self.frozen_patches else (weight, bias)

    def encode(self, patches: Tensor) -> Tensor:
        """Class token and patches [B, 1 + P, D] after all blocks and the last norm; `patches` may be any of those that `embed` gave."""
        return self.model.norm(self.model.blocks(self._with_class_token(patches)))

    def _with_class_token(self, patches: Tensor) -> Tensor:
        token = self.model.cls_token
        if self.model.pos_embed is not None:
            token = token + self.model.pos_embed[:, :1]
        return torch.cat([token.expand(len(patches), -1, -1).to(patches.dtype), patches], 1)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.encode(self.embed(images))
        if self.pool == "token":
            return tokens[:, 0]
        # fc_norm is timm's Identity unless the norm comes after the mean
        return self.model.fc_norm(tokens[:, 1:].mean(1))

    @torch.no_grad()
    def class_attention(self, images: Tensor) -> Tensor:
        """[B, heads, rows, columns]: how much of its attention the class token gives each patch in the last block, head by head.

        What it gives itself is left out, so that a map sums to less than 1. No gradient; set the network to evaluation mode.
        """
        *before, last = self.model.blocks
        tokens = self._with_class_token(self.embed(images))
        for block in before:
            tokens = block(tokens)
        attention = last.attn
        B, T, _ = tokens.shape
        q, k, _ = attention.qkv(last.norm1(tokens)).reshape(B, T, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = attention.q_norm(q[:, :, :1]) @ attention.k_norm(k).transpose(-2, -1) * attention.scale
        return scores.softmax(-1)[:, :, 0, 1:].reshape(B, attention.num_heads, *self.grid(images))

    def positions(self, height: int, width: int) -> Tensor:
        """[height · width, D] of the patches, of the parameters' dtype and on their device."""
        if self.model.pos_embed is not None:
            return resized_positions(self.model.pos_embed[0, 1:], tuple(self.model.patch_embed.grid_size), (height, width))
        like = self.model.patch_embed.proj.weight
        # kept per grid: rebuilt on the host at every step they would cost a copy to the device
        key = (height, width, like.dtype, like.device)
        if key not in self._kept:
            self._kept[key] = sincos_positions(height, width, self.width, dtype=like.dtype).to(like.device)
        return self._kept[key]


def build_vit(name: str, **options) -> ViT:
    """The `ViT` called `name`, a key of `NAMED`, with the options `OURS` of ViT and `OPTIONS` of timm's VisionTransformer.

    Raises ValueError for another name or option.
    """
    if name not in NAMED:
        raise ValueError(f"build_vit: name must be one of {', '.join(NAMED)}; got {name!r}")
    if strange := sorted(options.keys() - {*OPTIONS, *OURS}):
        raise ValueError(f"build_vit: options are {', '.join((*OURS, *OPTIONS))}; got {', '.join(strange)}")
    # timm takes seconds to import and is an extra: only those who name its models pay
    import timm

    timm_name, fixed = NAMED[name]
    ours = {key: value for key, value in options.items() if key in OURS}
    theirs = {key: value for key, value in options.items() if key in OPTIONS}
    if ours.get("pool") == "fc_norm":
        fixed = {**fixed, "global_pool": "avg", "fc_norm": True}
    return ViT(timm.create_model(timm_name, num_classes=0, **{**fixed, **theirs}), **ours)
