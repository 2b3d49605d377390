"""Which keys and shapes do the official MAE files hold, and how are small ones with exactly these made?"""

import torch

from fuseer.engine.models.vit import sincos_positions

# models_mae.py and models_vit.py of facebookresearch/mae, B/16 at 224 px: what their state_dict() lists
BLOCK = {
    "norm1.weight": "D", "norm1.bias": "D", "attn.qkv.weight": "3D D", "attn.qkv.bias": "3D",
    "attn.proj.weight": "D D", "attn.proj.bias": "D", "norm2.weight": "D", "norm2.bias": "D",
    "mlp.fc1.weight": "4D D", "mlp.fc1.bias": "4D", "mlp.fc2.weight": "D 4D", "mlp.fc2.bias": "D",
}  # fmt: skip


def block(prefix: str, D: int) -> dict[str, tuple[int, ...]]:
    sizes = {"D": D, "3D": 3 * D, "4D": 4 * D}
    return {f"{prefix}.{key}": tuple(sizes[size] for size in shape.split()) for key, shape in BLOCK.items()}


def encoder_shapes(D: int, depth: int, patch: int, grid: int) -> dict[str, tuple[int, ...]]:
    shapes = {
        "cls_token": (1, 1, D), "pos_embed": (1, 1 + grid * grid, D),
        "patch_embed.proj.weight": (D, 3, patch, patch), "patch_embed.proj.bias": (D,),
    }  # fmt: skip
    for index in range(depth):
        shapes |= block(f"blocks.{index}", D)
    return shapes


def pretrained_shapes(D=768, depth=12, patch=16, grid=14) -> dict[str, tuple[int, ...]]:
    """mae_pretrain_vit_*.pth."""
    return {**encoder_shapes(D, depth, patch, grid), "norm.weight": (D,), "norm.bias": (D,)}


def full_shapes(D=768, depth=12, patch=16, grid=14, *, width=512, layers=8) -> dict[str, tuple[int, ...]]:
    """mae_pretrain_vit_*_full.pth and mae_visualize_vit_*.pth."""
    shapes = {
        **pretrained_shapes(D, depth, patch, grid),
        "mask_token": (1, 1, width), "decoder_pos_embed": (1, 1 + grid * grid, width),
        "decoder_embed.weight": (width, D), "decoder_embed.bias": (width,),
    }  # fmt: skip
    for index in range(layers):
        shapes |= block(f"decoder_blocks.{index}", width)
    pixels = 3 * patch * patch
    ends = {"decoder_norm.weight": (width,), "decoder_norm.bias": (width,)}
    return {**shapes, **ends, "decoder_pred.weight": (pixels, width), "decoder_pred.bias": (pixels,)}


def finetuned_shapes(D=768, depth=12, patch=16, grid=14, *, classes=1000) -> dict[str, tuple[int, ...]]:
    """mae_finetuned_vit_*.pth (global_pool)."""
    ends = {"fc_norm.weight": (D,), "fc_norm.bias": (D,), "head.weight": (classes, D), "head.bias": (classes,)}
    return {**encoder_shapes(D, depth, patch, grid), **ends}


def generated(shapes: dict[str, tuple[int, ...]], *, trained_positions: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of `shapes`, with the fixed positions where the official files have them."""
    generator = torch.Generator().manual_seed(seed)
    state = {key: 0.2 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for key in ("pos_embed", "decoder_pos_embed"):
        if key in state and not trained_positions:
            _, tokens, D = shapes[key]
            side = round((tokens - 1) ** 0.5)
            state[key] = torch.cat([torch.zeros(1, D), sincos_positions(side, side, D)])[None]
    return state
