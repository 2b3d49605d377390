"""How well do the unsupervised masks fit cut-outs whose alpha is the true mask, beside OpenCV's saliency and a box in the middle?

python -m benchmarks.engine.saliency [count=60] [store=true]

Photographed stamps of Debian's tuxpaint (packages tuxpaint-stamps-default and tuxpaint-data; nothing is measured without them), 150 to
240 pixels long, are pasted on its photographs of 400 x 300. A map of OpenCV's (opencv-contrib-python-headless, where installed) is cut at
Otsu's threshold, as ours is. IoU = intersection over union of mask and alpha.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import measure
from fuseer.engine.data.masks import saliency

SHARE = Path("/usr/share/tuxpaint")
OPTIONS = {"count": "60", "store": "true"}


def is_cut_out(path: Path) -> bool:
    """A photograph with an alpha: large, of many colours, neither empty nor full."""
    with Image.open(path) as image:
        if image.mode != "RGBA" or min(image.size) < 150 or "_mirror" in path.name:
            return False
        alpha, colours = np.asarray(image)[..., 3], np.asarray(image.convert("RGB")).reshape(-1, 3)[::7]
    return (alpha < 10).mean() >= 0.15 and (alpha > 200).mean() >= 0.2 and len(np.unique(colours, axis=0)) >= 800


def composed(cut_out: Path, background: Path, seed: int) -> tuple[Image.Image, np.ndarray]:
    """The image and where the cut-out covers it."""
    draw, image = random.Random(seed), Image.open(background).convert("RGB").resize((400, 300))
    pasted = Image.open(cut_out)
    pasted.thumbnail((draw.randint(150, 240),) * 2)
    at = draw.randint(20, 380 - pasted.width), draw.randint(10, max(11, 290 - pasted.height))
    image.paste(pasted, at, pasted)
    alpha = Image.new("L", image.size)
    alpha.paste(pasted.getchannel("A"), at)
    return image, np.asarray(alpha) >= 128


def programs() -> dict[str, Callable[[Image.Image], np.ndarray]]:
    """{name: function of an image to the bool mask}."""
    middle = np.zeros((300, 400), bool)
    middle[45:255, 60:340] = True
    found = {"fuseer": lambda image: saliency(image) >= 128, "box in the middle": lambda image: middle}
    try:
        import cv2

        maps = {"spectral residual": cv2.saliency.StaticSaliencySpectralResidual_create()}
        maps["fine grained"] = cv2.saliency.StaticSaliencyFineGrained_create()
    except (ImportError, AttributeError):
        return found

    def of_opencv(image: Image.Image, map_of) -> np.ndarray:
        values = (map_of.computeSaliency(np.asarray(image)[..., ::-1].copy())[1] * 255).astype(np.uint8)
        return cv2.threshold(values, 0, 255, cv2.THRESH_OTSU)[1] > 0

    return found | {f"OpenCV {name}": lambda image, map_of=map_of: of_opencv(image, map_of) for name, map_of in maps.items()}


def measured(count: int) -> list[dict]:
    stamps, backgrounds = sorted((SHARE / "stamps").rglob("*.png")), sorted((SHARE / "templates").glob("*.jpg"))
    random.Random(0).shuffle(stamps)
    chosen = [path for path in stamps if is_cut_out(path)][:count]
    if len(chosen) < count or not backgrounds:
        raise SystemExit(
            f"saliency: {SHARE} holds {len(chosen)} cut-outs and {len(backgrounds)} photographs; install tuxpaint-stamps-default"
        )
    made = [composed(path, backgrounds[i % len(backgrounds)], i) for i, path in enumerate(chosen)]
    rows = []
    for name, program in programs().items():
        began = time.thread_time()
        masks = [program(image) for image, _ in made]
        seconds = (time.thread_time() - began) / count
        overlaps = [(mask & true).sum() / (mask | true).sum() for mask, (_, true) in zip(masks, made, strict=True)]
        row = {"op": "saliency", "case": f"{count} cut-outs", "program": name, "iou": round(float(np.mean(overlaps)), 3)}
        rows.append({**row, "median": round(float(statistics.median(overlaps)), 3), "cpu_ms": float(f"{1e3 * seconds:.3g}")})
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| mask | mean IoU | median | CPU ms an image |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {row['program']} | {row['iou']:.3f} | {row['median']:.3f} | {row['cpu_ms']:.3g} |" for row in rows)])


def main(words: list[str]) -> None:
    options = {**OPTIONS, **dict(word.split("=", 1) for word in words if "=" in word)}
    if unknown := options.keys() - OPTIONS.keys():
        raise SystemExit(f"saliency: give {' '.join(f'{name}={value}' for name, value in OPTIONS.items())}; got {', '.join(unknown)}")
    machine = measure.header()
    found = [{**row, **machine} for row in measured(int(options["count"]))]
    measure.say(table(found))
    if options["store"] == "true":
        measure.store("saliency", found, place=("op", "case", "program", "device"))


if __name__ == "__main__":
    main(sys.argv[1:])
