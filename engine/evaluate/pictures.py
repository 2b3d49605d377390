"""What does a run's ViT paint over hidden patches, and where does its class token look?"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fuseer.engine import checkpoint
from fuseer.engine.config import TrainConfig
from fuseer.engine.data.plain import plain_batches
from fuseer.engine.data.sources import Reader, open_source
from fuseer.engine.data.view import Batch
from fuseer.engine.evaluate.frozen import write_result
from fuseer.engine.methods.mae import MAE, MAEConfig, mask_noise
from fuseer.engine.methods.method import Ground
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.models.vit import ViT
from fuseer.engine.recipes.recipe import saved_config

LARGEST_CELL, GAP, GROUP_GAP = 112, 3, 14
PAPER, HIDDEN = 250, 0.5
RECONSTRUCTED, ATTENDED = 12, 6
# from nothing to all, as anchors of a scale that grows evenly brighter
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float64) / 255


def draw_pictures(run: Path) -> list[str]:
    """Draws eval/reconstruction.png (MAE) and eval/attention.png (any of our ViTs) of the newest checkpoint; returns their names.

    eval/pictures.json says in words what they show, for the report. The images are a few of the test split, or of all where there is
    none, evenly spaced, at the size of the method's first view; others are resized and cut as kNN does. Nothing is drawn, and [] returned,
    where the run has no ViT. Call it on one rank.
    Raises ValueError where the run has no checkpoint or its images are gone.
    """
    config = saved_config(run)
    backbone = initial_backbone(config)
    if not isinstance(backbone, ViT):
        return []
    place = checkpoint.latest(run / "ckpt")
    method = _method(config, backbone)
    checkpoint.load_weights(place, method or backbone, prefix="" if method else "backbone.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    (method or backbone).to(device).eval()
    images, split = _images(config)
    images, patch, step = images.to(device), backbone.patch[0], checkpoint.read_meta(place)["step"]
    heads = backbone.model.blocks[-1].attn.num_heads
    drawn = {
        "attention": {
            "title": "Where it looks",
            "seen": "One row per image, beside it one map for each attention head",
            "words": f"Attention of the class token to the {patch} px patches in the last block, one column for each of {heads} heads, "
            f"each map on a scale of its own; {split} images, step {step:,}.",
            "rows": attention_rows(images[:ATTENDED], backbone, config),
        }
    }
    if method is not None:
        hidden = f"{config.method.mask_ratio:.0%} of the {patch} px patches are hidden"
        true = ", whose brightness and contrast are the true ones," if config.method.normalize_targets else ""
        drawn["reconstruction"] = {
            "title": "What it paints",
            "seen": "Triples of an image, its visible patches, and these with the hidden ones painted",
            "words": f"An image, what the encoder sees of it ({hidden}), and the same with the decoder's patches{true} in their places; "
            f"{split} images, step {step:,}.",
            "rows": reconstruction_rows(images, method, config),
        }
    (run / "eval").mkdir(exist_ok=True)
    told = []
    for name, picture in reversed(drawn.items()):
        _tiled(picture.pop("rows")).save(run / "eval" / f"{name}.png", format="PNG", optimize=True)
        told.append({"file": f"eval/{name}.png", **picture})
    write_result(run, "pictures", {"step": step, "pictures": told})
    return [picture["file"] for picture in told]


def _method(config: TrainConfig, backbone: ViT) -> MAE | None:
    """The method where it can paint, else None."""
    if not isinstance(config.method, MAEConfig):
        return None
    return config.method.build(Ground(backbone, None, None, 0, 1, config.batch_size))


def _images(config: TrainConfig) -> tuple[Tensor, str]:
    """[RECONSTRUCTED or fewer, 3, size, size], normalised, and the split that they are of."""
    try:
        source, split = open_source(config.data.path, split="test"), "test"
    except ValueError:
        source, split = open_source(config.data.path), "train"
    count = min(RECONSTRUCTED, len(source))
    chosen = [(2 * i + 1) * len(source) // (2 * count) for i in range(count)]
    few = source.only(chosen)
    size = config.method.views[0].size
    reader = Reader(few, max_broken_share=0.0)
    sizes = {(read.width, read.height) for read in (reader.read(i, 0) for i in range(count))}
    data = config.data
    image_size = 0 if sizes == {(size, size)} else size
    images, _ = next(plain_batches(few, mean=data.mean, std=data.std, image_size=image_size))
    return images, split


def reconstruction_rows(images: Tensor, method: MAE, config: TrainConfig) -> list[list[list[np.ndarray]]]:
    """Two images a row: as it is, what the encoder sees of it, and the same with the hidden patches painted."""
    P = method.backbone.grid(images)[0] * method.backbone.grid(images)[1]
    samples = torch.arange(len(images))
    noise = mask_noise(Batch([images[None]], samples, samples, 0), P).to(images.device)
    painted, hidden = method.reconstruction(images, noise)
    whole, painted = _pixels(images, config), _pixels(painted, config)
    seen = torch.where(hidden.cpu(), HIDDEN, whole)
    triples = [[_bytes(x[i]) for x in (whole, seen, painted)] for i in range(len(images))]
    return [triples[i : i + 2] for i in range(0, len(triples), 2)]


def attention_rows(images: Tensor, backbone: ViT, config: TrainConfig) -> list[list[list[np.ndarray]]]:
    """One image a row: as it is, and beside it one map a head, each brightest where that head looks most."""
    maps = backbone.class_attention(images).float().cpu()
    maps = maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-12)
    maps = maps.repeat_interleave(backbone.patch[0], -2).repeat_interleave(backbone.patch[1], -1).double().numpy()
    whole = _pixels(images, config)
    rows = []
    for image, heads in zip(whole, maps, strict=True):
        grey = image.mean(0).numpy()[..., None]
        heat = [np.stack([np.interp(head, np.linspace(0, 1, len(HEAT)), HEAT[:, c]) for c in range(3)], -1) for head in heads]
        rows.append([[_bytes(image)], [_round(0.35 * grey + 0.65 * colours) for colours in heat]])
    return rows


def _pixels(images: Tensor, config: TrainConfig) -> Tensor:
    """[B, 3, h, w] in 0..1 of normalised images, on the CPU."""
    scale, shift = torch.tensor(config.data.std).view(3, 1, 1), torch.tensor(config.data.mean).view(3, 1, 1)
    return (images.detach().float().cpu() * scale + shift).nan_to_num().clamp(0, 1)


def _bytes(image: Tensor) -> np.ndarray:
    return _round(image.movedim(0, -1).numpy())


def _round(image: np.ndarray) -> np.ndarray:
    return np.round(255 * image).astype(np.uint8)


def _tiled(rows: list[list[list[np.ndarray]]]) -> Image.Image:
    """Rows of groups of pictures of one size, small ones enlarged by a whole factor, large ones reduced."""
    h, w = rows[0][0][0].shape[:2]
    cell = (w * max(1, LARGEST_CELL // max(h, w)), h * max(1, LARGEST_CELL // max(h, w)))
    if max(h, w) > LARGEST_CELL:
        cell = (max(1, w * LARGEST_CELL // max(h, w)), max(1, h * LARGEST_CELL // max(h, w)))
    width = max(sum(len(group) * (cell[0] + GAP) - GAP + GROUP_GAP for group in row) - GROUP_GAP for row in rows)
    sheet = Image.new("RGB", (width, len(rows) * (cell[1] + GAP) - GAP), (PAPER, PAPER, PAPER))
    for row, groups in enumerate(rows):
        x = 0
        for group in groups:
            for picture in group:
                way = Image.Resampling.NEAREST if cell[0] >= w else Image.Resampling.LANCZOS
                sheet.paste(Image.fromarray(picture).resize(cell, way), (x, row * (cell[1] + GAP)))
                x += cell[0] + GAP
            x += GROUP_GAP - GAP
    return sheet
