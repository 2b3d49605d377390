"""What do the crops look like that the network is trained on?"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from fuseer.engine.data.view import Batch

MAX_WIDTH = 1400
LARGEST_CELL = 128
SMALLEST_CELL = 8
MARGIN = 12
GAP = 4
GROUP_GAP = 21
HEADER = 24
PAPER, INK, RULE = (250, 250, 248), (70, 74, 80), (206, 208, 212)


def crop_sheet(batch: Batch, path: str | Path, *, mean: Sequence[float], std: Sequence[float], images: int = 8) -> Path:
    """Draw the first `images` images of `batch`, one row each, one column per view, and save them as PNG at `path`.

    Views of one size stand together below a line such as "2 × 28 px" (pixels as the network gets them). Crops are shown as
    x · std + mean, clipped to [0, 1]; small ones are enlarged by a whole factor (nearest neighbour), large ones reduced. Known
    labels (not -1) stand at the left. The sheet is at most 1400 px wide for up to about 150 views. The folder is made where it is missing.
    Draws what it is given, this rank's batch: call it on one rank.
    Raises ValueError for a batch without images or views, crops that are not [V, B, 3, h, w], or a mean or std that is not three numbers.
    """
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"crop_sheet: mean and std must be one number per channel (3); got {list(mean)} and {list(std)}")
    if images < 1:
        raise ValueError(f"crop_sheet: images must be at least 1; got {images}")
    groups = _by_size(batch)
    rows = min(images, len(batch.samples))
    labels = ["" if label < 0 else str(label) for label in batch.labels[:rows].tolist()]
    font = ImageFont.load_default(13)
    label_width = max(round(font.getlength(text)) for text in labels)
    left = MARGIN + (label_width + 10 if label_width else 0)
    cells = _fit([(views.shape[0], *views.shape[-2:]) for views in groups], MAX_WIDTH - left - MARGIN)
    row_height = max(height for _, height in cells) + GAP
    width = left + MARGIN + _row_width([views.shape[0] for views in groups], [width for width, _ in cells])
    sheet = Image.new("RGB", (width, MARGIN + HEADER + rows * row_height - GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN + HEADER
    for row, text in enumerate(labels):
        middle = top + row * row_height + (row_height - GAP) // 2
        draw.text((left - 10, middle), text, fill=INK, font=font, anchor="rm")
    x = left
    for views, cell in zip(groups, cells, strict=True):
        if x > left:
            draw.line((x - GROUP_GAP // 2 - 1, MARGIN, x - GROUP_GAP // 2 - 1, sheet.height - MARGIN - 1), fill=RULE)
        _draw_header(draw, x, views, cell, font)
        pixels = _pixels(views[:, :rows], mean, std)
        for column in range(views.shape[0]):
            for row in range(rows):
                crop = _resized(Image.fromarray(pixels[column, row].numpy()), cell)
                sheet.paste(crop, (x, top + row * row_height + (row_height - GAP - cell[1]) // 2))
            x += cell[0] + GAP
        x += GROUP_GAP - GAP
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True)
    return path


def _by_size(batch: Batch) -> list[torch.Tensor]:
    """The batch's crops as one [V, B, 3, h, w] per size, in the order in which the sizes first appear."""
    groups: dict[tuple[int, int], list[torch.Tensor]] = {}
    for index, crops in enumerate(batch.crops):
        if crops.ndim != 5 or crops.shape[2] != 3 or 0 in crops.shape:
            raise ValueError(f"crop_sheet: crops[{index}] must be [V, B, 3, h, w], no axis empty; got {list(crops.shape)}")
        groups.setdefault(tuple(crops.shape[-2:]), []).append(crops)
    if not groups:
        raise ValueError("crop_sheet: the batch has no views; got crops=[]")
    return [torch.cat(crops) for crops in groups.values()]


def _pixels(views: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [V, rows, h, w, 3] of normalised [V, rows, 3, h, w]."""
    scale = torch.tensor(list(std)).view(3, 1, 1)
    shift = torch.tensor(list(mean)).view(3, 1, 1)
    shown = views.detach().to("cpu", torch.float32) * scale + shift
    return (shown.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).contiguous()


def _fit(groups: list[tuple[int, int, int]], room: int) -> list[tuple[int, int]]:
    """(width, height) of one drawn crop per (count, h, w): the largest cells that fit `room` pixels side by side."""
    cells: list[tuple[int, int]] = []
    for target in range(LARGEST_CELL, SMALLEST_CELL - 1, -4):
        cells = [_cell(h, w, target) for _, h, w in groups]
        if _row_width([count for count, _, _ in groups], [width for width, _ in cells]) <= room:
            break
    return cells


def _row_width(counts: list[int], widths: list[int]) -> int:
    """Pixels of one row: cells side by side, a wider gap between groups."""
    return sum(count * (width + GAP) - GAP for count, width in zip(counts, widths, strict=True)) + (len(counts) - 1) * GROUP_GAP


def _cell(h: int, w: int, target: int) -> tuple[int, int]:
    longer = max(h, w)
    if longer <= target:
        return w * (target // longer), h * (target // longer)
    return max(1, round(w * target / longer)), max(1, round(h * target / longer))


def _resized(crop: Image.Image, cell: tuple[int, int]) -> Image.Image:
    return crop.resize(cell, Image.Resampling.NEAREST if cell[0] >= crop.width else Image.Resampling.LANCZOS)


def _draw_header(draw: ImageDraw.ImageDraw, x: int, views: torch.Tensor, cell: tuple[int, int], font: ImageFont.FreeTypeFont) -> None:
    """'2 × 28 px' over the group, left aligned, as much of it as fits above the group's cells."""
    count, h, w = views.shape[0], *views.shape[-2:]
    size = f"{w}" if h == w else f"{w} × {h}"
    room = count * (cell[0] + GAP) - GAP
    texts = (f"{count} × {size} px", f"{count}×{size}", size, "")
    text = next(text for text in texts if font.getlength(text.replace("×", "x")) <= room)
    baseline = MARGIN + 14
    for index, piece in enumerate(text.split("×")):
        if index:
            # Pillow's built-in font has no glyph for ×
            draw.line((x, baseline - 7, x + 5, baseline - 2), fill=INK)
            draw.line((x, baseline - 2, x + 5, baseline - 7), fill=INK)
            x += 6
        draw.text((x, baseline), piece, fill=INK, font=font, anchor="ls")
        x += round(font.getlength(piece))
