"""How does an official MAE checkpoint become a run folder that is evaluated, fine-tuned and exported like our own?"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fuseer.engine.config import TrainConfig, apply_overrides
from fuseer.engine.imports.official import read_file, refuse_misfits, refuse_used, tensors_of, write_run
from fuseer.engine.methods.method import Ground
from fuseer.engine.models.backbone import build_backbone
from fuseer.engine.models.vit import ViT, sincos_positions
from fuseer.engine.recipes.recipe import load_recipe

# width: recipe, attention heads
PUBLISHED = {768: ("mae_vit_b", 12), 1024: ("mae_vit_l", 16), 1280: ("mae_vit_h", 16)}
DECODER = ("decoder_", "mask_token")


class Shape(NamedTuple):
    """What the tensors of a file say of its network."""

    width: int
    depth: int
    patch: int
    grid: int
    mlp_ratio: float
    fc_norm: bool
    learnt: bool

    @property
    def image(self) -> int:
        return self.grid * self.patch


def import_mae(file: Path, out: Path, *, data: str | None = None, heads: int = 0) -> dict:
    """Makes a run folder `out` of an official MAE file: pretrained encoder, with its decoder or without, or fine-tuned classifier.

    `file` is a .safetensors, or a .pth of {"model": {key: tensor}} read without executing code. Keys: cls_token, pos_embed,
    patch_embed.proj.*, blocks.*, norm.* of the encoder; decoder_*, mask_token; fc_norm.*, head.* of fine-tuned ones. Fixed sine-cosine
    positions are computed again, trained ones (fine-tuned files) kept. `heads` of attention are known for widths 768, 1024 and 1280
    and asked for elsewhere; `data` is the folder that evaluations of the run will read. The features of one random image are compared
    with those of a timm model that loads the same tensors with strict=True.
    Returns {kind, model, difference, classes}: the largest difference over the largest feature; classes of a classifier that was kept.
    Raises ValueError where keys are missing or strange, where shapes or features do not fit, and where `out` already holds something.
    """
    refuse_used(out)
    state = {key: value.float() for key, value in tensors_of(read_file(file), file, "model").items()}
    shape = shape_of_file(state)
    head = _head(state, shape.width)
    config = config_of(shape, state, data, heads)
    encoder = {key: value for key, value in state.items() if not key.startswith((*DECODER, "head."))}
    backbone = build_backbone(config.model.name, **config.model.options)
    backbone.load_published(encoder)
    weights = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    full = any(key.startswith(DECODER) for key in state)
    if full:
        weights |= _decoder(state, config, backbone)
    difference = _difference(encoder, backbone, config, shape)
    if not difference < 1e-4:
        raise ValueError(f"import: features differ from those of timm with the same tensors by {difference:.2g} of the largest")
    # a classifier on the class token is another network than fine-tuning here makes
    kept = head if shape.fc_norm else {}
    write_run(out, file, config, weights, kept)
    kind = "fine-tuned" if shape.fc_norm else "pretrained, with its decoder" if full else "pretrained"
    model, classes = f"{config.model.name} of {shape.image} px", len(kept.get("head.bias", ()))
    return {"kind": kind, "model": model, "difference": difference, "classes": classes}


def shape_of_file(state: Mapping[str, Tensor]) -> Shape:
    """What the network of an official file looks like. Raises ValueError where a key that says so is missing."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in state]:
        held = ", ".join(sorted(state)[:5])
        raise ValueError(f"import: {', '.join(missing)} missing, so this is no MAE file; it holds {held}, …")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    positions = state["pos_embed"]
    grid = math.isqrt(max(0, positions.shape[1] - 1)) if positions.dim() == 3 else 0
    if not grid or tuple(positions.shape) != (1, 1 + grid * grid, width):
        raise ValueError(f"import: pos_embed must be [1, 1 + side², {width}], the class token first; got {list(positions.shape)}")
    fixed = torch.cat([positions.new_zeros(1, width), sincos_positions(grid, grid, width)]) if width % 4 == 0 else positions[0] + 1
    blocks = {int(at[1]) for key in state if (at := re.match(r"blocks\.(\d+)\.", key))}
    return Shape(
        width=width,
        depth=1 + max(blocks),
        patch=patch,
        grid=grid,
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / width,
        fc_norm="fc_norm.weight" in state,
        learnt=bool((positions[0] - fixed).abs().max() > 8e-5),
    )


def config_of(shape: Shape, state: Mapping[str, Tensor], data: str | None, heads: int) -> TrainConfig:
    """The settings of a run with that network: those of its recipe, with the options in which it differs from the published one."""
    recipe, known = PUBLISHED.get(shape.width, ("mae_vit_b", 0))
    if not (heads or known) or shape.width % (heads or known):
        said = f"got {heads}" if heads else "none is published for it"
        raise ValueError(f"import: heads=N must divide the width {shape.width}, and no tensor tells how many there are; {said}")
    base = load_recipe(recipe).config()
    options = {
        **base.model.options,
        "patch_size": shape.patch,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": heads or known,
        "mlp_ratio": shape.mlp_ratio,
        "img_size": shape.image,
        **({"pool": "fc_norm"} if shape.fc_norm else {}),
        **({"learnt_positions": True} if shape.learnt else {}),
    }
    overrides = {"model.options": json.dumps(options), "knn.image_size": str(shape.image)}
    if data is not None:
        overrides["data.path"] = data
    if "decoder_embed.weight" in state:
        blocks = {key.split(".")[1] for key in state if key.startswith("decoder_blocks.")}
        overrides |= {"method.decoder_width": str(len(state["decoder_embed.weight"])), "method.decoder_depth": str(len(blocks))}
    return apply_overrides(base, overrides)


def _head(state: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """head.weight [classes, width] and head.bias [classes], or neither."""
    head = {key: value for key, value in state.items() if key.startswith("head.")}
    shapes = {key: list(value.shape) for key, value in head.items()}
    classes = shapes.get("head.bias", [0])[0]
    if head and shapes != {"head.weight": [classes, width], "head.bias": [classes]}:
        raise ValueError(f"import: a classifier is head.weight [classes, {width}] and head.bias [classes]; got {shapes}")
    return head


def _decoder(state: Mapping[str, Tensor], config: TrainConfig, backbone: ViT) -> dict[str, Tensor]:
    """The tensors of the method besides its backbone, under the method's names, which are the official ones."""
    method = config.method.build(Ground(backbone, None, None, 0, 1, 1))
    own = {key: value for key, value in method.state_dict().items() if not key.startswith("backbone.")}
    found = {key: value for key, value in state.items() if key.startswith(DECODER) and key != "decoder_pos_embed"}
    refuse_misfits("the decoder", found, own)
    return found


@torch.no_grad()
def _difference(encoder: Mapping[str, Tensor], backbone: nn.Module, config: TrainConfig, shape: Shape) -> float:
    """max|timm's features - ours| / max|ours| of one random image, timm's model having loaded the file itself with strict=True."""
    import timm

    options = {key: config.model.options[key] for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "img_size")}
    pooling = {"global_pool": "avg"} if shape.fc_norm else {}
    theirs = timm.create_model("vit_base_patch16_224", num_classes=0, **options, **pooling).eval()
    theirs.load_state_dict(encoder, strict=True)
    image = torch.randn(1, 3, shape.image, shape.image, generator=torch.Generator().manual_seed(0))
    ours = backbone.eval()(image)
    return ((theirs(image) - ours).abs().max() / ours.abs().max()).item()
