"""How well does a linear classifier read the classes off a run's frozen features, by the published protocols?"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuseer.engine import checkpoint
from fuseer.engine.config import LinearConfig, TrainConfig, nearest
from fuseer.engine.data.sources import Reader, SampleIndex
from fuseer.engine.data.view import View
from fuseer.engine.distributed import cores, keep_freed_memory
from fuseer.engine.evaluate.frozen import Labelled, Pixels, calibrate_on, load_pretrained, shares, write_result
from fuseer.engine.evaluate.knn import extract_features
from fuseer.engine.log import EpochBar, say
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.recipes.recipe import saved_config
from fuseer.engine.schedule import warmup_cosine, warmup_milestones

# raw pixels of larger images are averaged down to this: 224 x 224 of them would be more weights than the network has
LARGEST_PIXELS = 32


@dataclass(frozen=True)
class Protocol:
    """How one paper trains the classifier; SGD with momentum 0.9, weights N(0, 0.01), bias 0, the network in evaluation mode.

    lr is at a batch of 256 and grows with the batch; milestones are shares of the training at which it falls to a tenth. Training images
    are random crops of `crop_area` of the image, flipped every other time; None: as the test sees them, so that features are computed
    once. standardise: BatchNorm without weights before the classifier.
    """

    source: str
    lr: float
    batch_size: int
    epochs: int
    schedule: Literal["cosine", "cosine per epoch", "steps"]
    milestones: tuple[float, ...] = ()
    weight_decay: float = 0.0
    nesterov: bool = False
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    crop_area: tuple[float, float] | None = (0.08, 1.0)
    standardise: bool = False

    @property
    def scaled_lr(self) -> float:
        return self.lr * self.batch_size / 256

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        total = self.epochs * steps_per_epoch
        if self.schedule == "steps":
            marks = [round(share * self.epochs) * steps_per_epoch for share in self.milestones]
            return warmup_milestones(step, warmup_steps=0, start=0.0, peak=self.scaled_lr, milestones=marks, factor=0.1)
        hold = steps_per_epoch if self.schedule == "cosine per epoch" else 0
        return warmup_cosine(step, total_steps=total, warmup_steps=0, start=0.0, peak=self.scaled_lr, final=0.0, hold_steps=hold)


PROTOCOLS = {
    "swav": Protocol("facebookresearch/swav eval_linear.py", 0.3, 256, 100, "cosine per epoch", weight_decay=1e-6),
    "moco": Protocol("facebookresearch/moco main_lincls.py, MoCo v1 and v2", 30.0, 256, 100, "steps", milestones=(0.6, 0.8)),
    "moco_v3": Protocol("facebookresearch/moco-v3 main_lincls.py, ResNet", 0.1, 1024, 90, "cosine per epoch"),
    "moco_v3_vit": Protocol("facebookresearch/moco-v3 CONFIG.md, ViT", 3.0, 1024, 90, "cosine per epoch"),
    "simclr": Protocol(
        "google-research/simclr README", 0.1, 4096, 90, "cosine", weight_decay=1e-6, nesterov=True, interpolation="bicubic"
    ),
    "byol": Protocol(
        "deepmind-research/byol eval config, batch as in the paper", 0.2, 1024, 80, "cosine", nesterov=True, interpolation="bicubic"
    ),
    "relic": Protocol("deepmind-research/relicv2 linear evaluation", 0.3, 1024, 100, "cosine", nesterov=True, interpolation="bicubic"),
    "dino": Protocol("facebookresearch/dino eval_linear.py, last features only", 0.001, 1024, 100, "cosine per epoch"),
    # ten epochs of such crops of 28 px images cost raw pixels 12 points and a network 5; standardised, one lr suits both
    "tiny": Protocol(
        "our own, for small images", 0.03, 256, 30, "cosine", weight_decay=1e-3, nesterov=True, crop_area=None, standardise=True
    ),
}


def chosen_protocol(linear: LinearConfig) -> tuple[Protocol, str]:
    """The protocol with the changes that `linear` asks for, and both in words. Raises ValueError naming the nearest protocol."""
    if linear.protocol not in PROTOCOLS:
        raise ValueError(f"eval linear: there is no protocol {linear.protocol}{nearest(linear.protocol, PROTOCOLS)}")
    published = PROTOCOLS[linear.protocol]
    asked = {key: getattr(linear, key) for key in ("epochs", "batch_size", "lr") if getattr(linear, key) is not None}
    changes = {key: value for key, value in asked.items() if value != getattr(published, key)}
    protocol = replace(published, **changes)
    crops = "images uncropped, features computed once"
    if protocol.crop_area:
        crops = f"random crops of {protocol.crop_area[0]:.0%} to {protocol.crop_area[1]:.0%} of the area and flips"
    marks = f" ×0.1 at {' and '.join(f'{share:.0%}' for share in protocol.milestones)}" if protocol.milestones else ""
    words = (
        f"protocol {linear.protocol} ({protocol.source}): SGD{', Nesterov' * protocol.nesterov}, lr {protocol.lr:g} × batch/256, "
        f"{protocol.schedule}{marks}, {protocol.epochs} epochs, batch {protocol.batch_size}, weight decay {protocol.weight_decay:g}, "
        f"{'standardised features, ' * protocol.standardise}{crops}"
    )
    told = ", ".join(f"{key} {value:g} instead of {getattr(published, key):g}" for key, value in changes.items())
    return protocol, f"{words}; changed: {told}" if told else words


def evaluate_linear(run: Path, config: TrainConfig | None = None) -> dict:
    """A linear classifier on raw pixels, on the run's network at initialisation with calibrated BatchNorm, and as pretrained.

    All three see the same images in the same order. Top-1 after the last epoch, and top-5 where there are ten classes or more. `config`
    stands in for the run's own settings. Writes eval/linear.json at the end, in one move, and returns it. Decided by the seed; this
    process alone. Raises ValueError where the run has no checkpoint, its data no labels and test split, or for an unknown protocol;
    RuntimeError where a classifier diverges.
    """
    began = time.perf_counter()
    config = config or saved_config(run)
    protocol, words = chosen_protocol(config.linear)
    checkpoint.latest(run / "ckpt")
    images = Labelled.needed_by("eval linear", config)
    images.check("eval linear", protocol.batch_size)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    say(f"linear classifier on frozen features, {words}")
    size = images.side("eval linear", device)
    untrained = calibrate_on(initial_backbone(config).to(device), images.batches(images.train, device))
    pretrained = initial_backbone(config).to(device)
    step = load_pretrained(run, pretrained)
    pixels = "raw pixels" if size <= LARGEST_PIXELS else f"raw pixels, averaged to {LARGEST_PIXELS}x{LARGEST_PIXELS}"
    networks = {pixels: Pixels(config, LARGEST_PIXELS), "initialisation, BatchNorm calibrated": untrained, "pretrained": pretrained}
    rows = train_and_test(networks, images, protocol, size)
    result = {
        "step": step,
        "protocol": config.linear.protocol,
        "words": words,
        "lr": protocol.scaled_lr,
        "epochs": protocol.epochs,
        "batch_size": protocol.batch_size,
        "image_size": size,
        "classes": len(images.train.classes),
        "train_images": len(images.train),
        "test_images": len(images.test),
        "seconds": round(time.perf_counter() - began, 1),
        "rows": rows,
    }
    write_result(run, "linear", result)
    return result


def train_and_test(networks: dict[str, nn.Module], images: Labelled, protocol: Protocol, size: int) -> list[dict]:
    """[{name, accuracy, top5, loss}] of a classifier on each of `networks`, whose weights and statistics stay as they are, bit for bit."""
    backbones = list(networks.values())
    device = next((p.device for network in backbones for p in network.parameters()), torch.device("cpu"))
    before = [fingerprint(backbone.eval()) for backbone in backbones]
    tests = [extract_features(backbone, images.batches(images.test, device)) for backbone in backbones]
    index = SampleIndex(len(images.train), protocol.batch_size, images.config.seed)
    stream = _fresh_crops if protocol.crop_area else _same_every_epoch
    heads = [
        classifier(features.shape[1], len(images.train.classes), protocol.standardise, images.config.seed).to(device)
        for features, _ in tests
    ]

    steps = protocol.epochs * index.steps_per_epoch
    bar = EpochBar("linear classifier", protocol.epochs, steps)
    with closing(stream(backbones, images, protocol, index, size, device)) as batches, bar as progress:

        def epoch_done(epoch: int, losses: list[float]) -> None:
            correct = [accuracies(head, features, labels)["accuracy"] for head, (features, labels) in zip(heads, tests, strict=True)]
            progress.epoch(epoch, dict(zip(networks, zip(losses, correct, strict=True), strict=True)))

        losses = fit(heads, progress.counted(batches), protocol, index.steps_per_epoch, epoch_done)
    for name, backbone, print_before in zip(networks, backbones, before, strict=True):
        if fingerprint(backbone) != print_before:
            raise RuntimeError(f"eval linear: the frozen network ({name}) changed while its classifier learnt: its forward writes state")
    scored = [accuracies(head, features, labels) for head, (features, labels) in zip(heads, tests, strict=True)]
    return [{"name": name, **found, "loss": loss} for name, found, loss in zip(networks, scored, losses, strict=True)]


def classifier(width: int, classes: int, standardise: bool, seed: int) -> nn.Module:
    """Linear [width → classes], weights N(0, 0.01) decided by the seed and bias 0, behind BatchNorm without weights if `standardise`."""
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, affine=False), linear) if standardise else linear


def fit(
    heads: list[nn.Module],
    batches: Iterator[tuple[list[Tensor], Tensor]],
    protocol: Protocol,
    steps_per_epoch: int,
    epoch_done: Callable[[int, list[float]], None] = lambda epoch, losses: None,
) -> list[float]:
    """Trains heads[i] on features[i] of every (features, labels) of `batches`, each by itself; returns the last epoch's mean losses.

    `epoch_done(epoch, losses)` is called after each, 1 first. Leaves the heads in evaluation mode. Raises RuntimeError where a loss is
    not finite.
    """
    parameters = [p for head in heads for p in head.parameters()]
    optimizer = torch.optim.SGD(parameters, protocol.scaled_lr, 0.9, weight_decay=protocol.weight_decay, nesterov=protocol.nesterov)
    means: list[float] = []
    for epoch in range(protocol.epochs):
        for head in heads:
            head.train()
        sums = [0.0] * len(heads)
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            optimizer.param_groups[0]["lr"] = protocol.lr_at(step, steps_per_epoch)
            features, labels = next(batches)
            losses = [F.cross_entropy(head(rows), labels) for head, rows in zip(heads, features, strict=True)]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            sums = [total + loss.detach() for total, loss in zip(sums, losses, strict=True)]
        means = [float(total) / steps_per_epoch for total in sums]
        if not all(math.isfinite(mean) for mean in means):
            raise RuntimeError(f"eval linear: the loss is not finite in epoch {epoch + 1}; give a lower lr=… than {protocol.lr:g}")
        for head in heads:
            head.eval()
        epoch_done(epoch + 1, means)
    return means


@torch.no_grad()
def accuracies(head: nn.Module, features: Tensor, labels: Tensor) -> dict[str, float]:
    """{"accuracy": top-1, "top5": … with ten classes or more}, shares in 0…1 of the rows of `features`."""
    return shares(torch.cat([head(rows) for rows in features.split(4096)]), labels)


def fingerprint(network: nn.Module) -> str:
    """Of every bit of the network's parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fresh_crops(backbones, images, protocol, index, size, device) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Features of new crops in every epoch, by the run's own pipeline."""
    config = images.config
    if config.data.pipeline == "dali":
        from fuseer.engine.data.dali import DaliLoader as Pipeline
    else:
        from fuseer.engine.data.torchvision import TorchvisionLoader as Pipeline
    view = View(size=size, count=1, scale=protocol.crop_area, interpolation=protocol.interpolation, jitter=0, grayscale=0, blur=0)
    loader = Pipeline(
        Reader(images.train, config.data.max_broken_share, config.seed),
        index,
        [view],
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
        device=device,
        threads=config.data.threads or cores(),
        prefetch_batches=config.data.prefetch_batches,
    )
    try:
        for batch in loader.batches(0):
            crops = batch.crops[0][0]
            with torch.no_grad():
                features = [backbone(crops).float() for backbone in backbones]
            yield features, batch.labels.to(device)
    finally:
        loader.close()


def _same_every_epoch(backbones, images, protocol, index, size, device) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Features of the images as the test sees them, in a new order in every epoch."""
    stored = [extract_features(backbone, images.batches(images.train, device)) for backbone in backbones]
    for step in count():
        chosen = torch.from_numpy(index.samples(step)[2]).to(device)
        yield [features[chosen] for features, _ in stored], stored[0][1][chosen]
