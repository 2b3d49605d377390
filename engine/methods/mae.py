"""MAE (He et al. 2021, arXiv 2111.06377): most patches of an image are hidden, and a small decoder paints them from the code of the rest.

loss = mean over masked patches and their pixels of (prediction - pixel)², every target patch normalised by its own mean and variance.
Fused (`fuseer.kernels.functional`): masks by counting ranks (patch_mask); only visible patches are read and embedded
(patch_embed_visible); un-shuffling, mask token and positions in one pass (unshuffle_tokens); targets are never stored (masked_patch_mse).
Official formulation: facebookresearch/mae models_mae.py.
"""

from functools import partial

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from fuseer.engine.config import MethodConfig
from fuseer.engine.data.philox import MASK_STREAM, words
from fuseer.engine.data.view import Batch, View
from fuseer.engine.methods.method import Ground, Loss, Method
from fuseer.engine.models.vit import ViT, initialise_linear, sincos_positions
from fuseer.kernels.functional import gather_patches, gather_tokens, masked_patch_mse, patch_embed_visible, patch_mask, unshuffle_tokens


def one_view() -> tuple[View, ...]:
    """The published one: 224 px of 20-100 % of the area, bicubic, flipped half of the time, no colours changed."""
    return (View(size=224, count=1, scale=(0.2, 1.0), interpolation="bicubic", jitter=0.0, grayscale=0.0, blur=0.0),)


class MAEConfig(MethodConfig):
    """Defaults are those of the published runs, whose checkpoints were trained on normalised targets."""

    views: tuple[View, ...] = Field(default_factory=one_view)
    mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of the patches that is hidden; at least one is, at least one is not")
    normalize_targets: bool = Field(True, description="each target patch by its own mean and variance")
    decoder_width: int = Field(512, ge=4)
    decoder_depth: int = Field(8, ge=0)
    decoder_heads: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _fits(self):
        if sum(view.count for view in self.views) != 1:
            raise ValueError(f"views: MAE needs 1 view of an image; got {sum(view.count for view in self.views)}")
        if self.decoder_width % 4 or self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"decoder_width must be a multiple of 4 (positions) and of decoder_heads; got {self.decoder_width} and {self.decoder_heads}"
            )
        return self

    def build(self, ground: Ground) -> "MAE":
        return MAE(self, ground)


class MAE(Method):
    """Visible patches → encoder → decoder of visible and mask tokens at their places → pixels of the masked patches → squared error.

    The encoder is a `ViT` (`model.options.start=mae` begins as officially). Parts of the decoder are called as in the official files; its
    positions are computed. The class token passes the decoder as one more patch at place 0; queries and MLP of its last block, norm and
    last layer see hidden tokens only. Which patches are hidden depends on (epoch, sample) alone: not on rank, world size or history.
    Ranks must hold as many images each for their mean loss to be the global one, as the loader deals them. Raises TypeError for another
    backbone.
    """

    def __init__(self, config: MAEConfig, ground: Ground):
        super().__init__()
        if not isinstance(ground.backbone, ViT):
            raise TypeError(f"MAE: the backbone must be one of our ViTs, e.g. model.name=vit_base; got {type(ground.backbone).__name__}")
        # timm takes seconds to import and is an extra: only those who train with its blocks pay
        from timm.models.vision_transformer import Block

        self.config, self.backbone = config, ground.backbone
        D, p = config.decoder_width, ground.backbone.patch[0]
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.decoder_embed = nn.Linear(self.backbone.width, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        block = partial(Block, D, config.decoder_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm)
        self.decoder_blocks = nn.Sequential(*(block() for _ in range(config.decoder_depth)))
        self.decoder_norm = norm(D)
        self.decoder_pred = nn.Linear(D, p * p * 3)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            initialise_linear(part)
        nn.init.normal_(self.mask_token, std=0.02)
        self._kept: dict[tuple, Tensor] = {}

    @property
    def views(self):
        return self.config.views

    def forward(self, batch: Batch) -> Loss:
        (images,) = (view for crops in batch.crops for view in crops)
        rows, columns = self.backbone.grid(images)
        return Loss(self.loss(images, mask_noise(batch, rows * columns).to(images.device, non_blocking=True)), {})

    def loss(self, images: Tensor, noise: Tensor) -> Tensor:
        """The loss of images [B, 3, H, W] of which the patches with the smallest noise [B, P] stay visible."""
        pred, ids_masked = self.painted(images, noise)
        return masked_patch_mse(pred, images, ids_masked, patch=self.backbone.patch[0], normalize=self.config.normalize_targets)

    def painted(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(predictions [B, M, p · p · 3], the hidden patches [B, M] that they are of)."""
        keep = visible(noise.shape[1], self.config.mask_ratio)
        # with all kept the first ids are the whole order: visible patches, then hidden ones
        order, ids_restore, _ = patch_mask(noise, noise.shape[1])
        ids_keep, ids_masked = order[:, :keep], order[:, keep:]
        tokens = self.decoder_embed(self.encoded(images, ids_keep))
        # of the parameters' dtype: under autocast the code is half, and the tokens must not be
        tokens = unshuffle_tokens(
            tokens.to(self.mask_token.dtype),
            pad(ids_restore + 1, (1, 0)),
            self.mask_token[0, 0],
            self._positions(*self.backbone.grid(images)),
        )
        return self.decoder_pred(self.decoder_norm(self._decoded(tokens, ids_masked + 1))), ids_masked

    def encoded(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Class token and visible patches [B, 1 + keep, D] as the encoder leaves them."""
        vit = self.backbone
        positions = vit.positions(*vit.grid(images))
        return vit.encode(patch_embed_visible(images, *vit.projection(), ids_keep, pos_embed=positions))

    @torch.no_grad()
    def reconstruction(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(images with their hidden patches painted, which pixels those are [B, 1, H, W]); to be shown, in evaluation mode.

        A normalised prediction gets mean and variance of the true patch, which only someone who has the image knows.
        """
        p, (rows, columns) = self.backbone.patch[0], self.backbone.grid(images)
        pred, ids = self.painted(images, noise)
        every = torch.arange(rows * columns, device=images.device).expand(len(images), -1)
        patches, true = gather_patches(images, every, patch=p), gather_patches(images, ids, patch=p)
        if self.config.normalize_targets:
            pred = pred * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
        whole = patches.scatter(1, ids[:, :, None].expand_as(pred), pred.to(patches.dtype))
        hidden = torch.zeros_like(patches[:, :, :1]).scatter(1, ids[:, :, None], 1.0)
        return _image(whole, rows, columns, p), _image(hidden.expand(-1, -1, p * p), rows, columns, p) > 0

    def _decoded(self, tokens: Tensor, ids: Tensor) -> Tensor:
        """gather_tokens(decoder_blocks(tokens), ids): in the last block nobody asks for the other tokens, which are only looked at."""
        if not len(self.decoder_blocks):
            return gather_tokens(tokens, ids)
        *before, last = self.decoder_blocks
        for block in before:
            tokens = block(tokens)
        attention, (B, T, D) = last.attn, tokens.shape
        hidden = gather_tokens(tokens, ids)
        (q_weight, kv_weight), (q_bias, kv_bias) = (x.split([D, 2 * D]) for x in (attention.qkv.weight, attention.qkv.bias))
        q = linear(last.norm1(hidden), q_weight, q_bias).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        kv = linear(last.norm1(tokens), kv_weight, kv_bias).reshape(B, T, 2, attention.num_heads, -1)
        seen = scaled_dot_product_attention(q, *kv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        hidden = hidden + attention.proj(seen)
        return hidden + last.mlp(last.norm2(hidden))

    def _positions(self, rows: int, columns: int) -> Tensor:
        """[1 + P, D] of the decoder, 0 for the class token."""
        like = self.mask_token
        key = (rows, columns, like.dtype, like.device)
        if key not in self._kept:
            positions = sincos_positions(rows, columns, self.config.decoder_width, dtype=like.dtype)
            self._kept[key] = pad(positions, (0, 0, 1, 0)).to(like.device)
        return self._kept[key]


def _image(patches: Tensor, rows: int, columns: int, p: int) -> Tensor:
    """[B, rows · columns, p · p · C] -> [B, C, rows · p, columns · p]."""
    x = patches.reshape(len(patches), rows, columns, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(len(patches), -1, rows * p, columns * p)


def visible(P: int, mask_ratio: float) -> int:
    """How many of P patches stay visible: the whole part of P · (1 - mask_ratio), 1 at least and P - 1 at most. ValueError for P < 2."""
    if P < 2:
        raise ValueError(f"MAE: images must have at least 2 patches, of which one is hidden; got {P}; enlarge them or lower the patch size")
    return min(max(int(P * (1 - mask_ratio)), 1), P - 1)


def mask_noise(batch: Batch, P: int) -> Tensor:
    """Uniform noise [B, P] float32 on a grid of 2^-24, decided by (epoch, sample, patch), so that nothing must be saved to go on."""
    drawn = words(0, batch.epoch, batch.samples.numpy(), MASK_STREAM, P)
    return torch.from_numpy((drawn >> 8).astype("float32") * 2.0**-24)
