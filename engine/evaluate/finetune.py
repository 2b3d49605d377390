"""How well does a run's network classify once all its weights have been trained with labels, and how well had it not been pretrained?"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fuseer.engine import checkpoint
from fuseer.engine.config import FinetuneConfig, TrainConfig, nearest
from fuseer.engine.data.mixed import Augmentation, mixed_batches
from fuseer.engine.data.sources import Reader, SampleIndex
from fuseer.engine.distributed import cores, keep_freed_memory
from fuseer.engine.evaluate.classifier import Classifier, parameter_groups
from fuseer.engine.evaluate.frozen import Labelled, load_pretrained, shares, write_result
from fuseer.engine.log import EpochBar, say
from fuseer.engine.models.backbone import OURS, build_backbone
from fuseer.engine.models.vit import NAMED as VITS
from fuseer.engine.recipes.recipe import saved_config

WEIGHTS = "finetuned.safetensors"
# the row of a network that was never pretrained is named as in the other evaluations
ROWS = ("initialisation", "pretrained")


@dataclass(frozen=True)
class Protocol:
    """How one paper trains the whole network with labels: AdamW (0.9, 0.999), lr 0 → peak → min_lr along half a cosine, at every step.

    lr is at a batch of 256 and grows with the batch; a layer's is that of the layer above times layer_decay. The warm-up is
    warmup_epochs of `epochs`, and as large a share of fewer. A batch is cut in micro-batches of `micro_batch` images, which are mixed
    among themselves and share BatchNorm statistics. The other fields are those of `Augmentation`.
    """

    source: str
    epochs: int
    lr: float
    layer_decay: float
    drop_path: float
    batch_size: int = 1024
    micro_batch: int = 32
    warmup_epochs: float = 5
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    smoothing: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    crop_area: tuple[float, float] = (0.08, 1.0)

    @property
    def scaled_lr(self) -> float:
        return self.lr * self.batch_size / 256

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Source: facebookresearch/mae util/lr_sched.py."""
        epoch = step / steps_per_epoch
        if epoch < self.warmup_epochs:
            return self.scaled_lr * epoch / self.warmup_epochs
        share = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.min_lr + (self.scaled_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


MAE = "facebookresearch/mae FINETUNE.md"
PROTOCOLS = {
    "mae_vit_b": Protocol(MAE, epochs=100, lr=5e-4, layer_decay=0.65, drop_path=0.1),
    "mae_vit_l": Protocol(MAE, epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "mae_vit_h": Protocol(MAE, epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.3),
    "tiny": Protocol(
        "our own, for small images", epochs=12, lr=4e-3, layer_decay=0.75, drop_path=0.0, batch_size=128, micro_batch=128, warmup_epochs=2,
        mixup=0.0, cutmix=0.0, rand_augment="", erasing=0.0, crop_area=(0.75, 1.0),
    ),
}  # fmt: skip


def chosen_protocol(finetune: FinetuneConfig, *, scratch: bool = False) -> tuple[Protocol, str]:
    """The protocol with the changes that `finetune` asks for, and both in words; where nothing was pretrained no layer is spared, so
    that `scratch` means layer_decay 1 unless one is asked for. Raises ValueError naming the nearest protocol."""
    if finetune.protocol not in PROTOCOLS:
        raise ValueError(f"eval finetune: there is no protocol {finetune.protocol}{nearest(finetune.protocol, PROTOCOLS)}")
    published = PROTOCOLS[finetune.protocol]
    asked = {key: value for key, value in finetune.model_dump(exclude={"protocol"}).items() if value is not None}
    if scratch:
        asked.setdefault("layer_decay", 1.0)
    if asked.get("batch_size", published.batch_size) < published.micro_batch:
        asked.setdefault("micro_batch", asked["batch_size"])
    changes = {key: value for key, value in asked.items() if value != getattr(published, key)}
    warmup = published.warmup_epochs * changes.get("epochs", published.epochs) / published.epochs
    protocol = replace(published, warmup_epochs=warmup, **changes)
    if protocol.batch_size % protocol.micro_batch:
        raise ValueError(
            f"eval finetune: batch_size must be a multiple of micro_batch; got {protocol.batch_size} and {protocol.micro_batch}; give both"
        )
    mixing = " and ".join(f"{name} {value:g}" for name, value in (("mixup", protocol.mixup), ("cutmix", protocol.cutmix)) if value)
    parts = [
        f"AdamW, lr {protocol.lr:g} × batch/256, layer decay {protocol.layer_decay:g}, warm-up {protocol.warmup_epochs:g} epochs",
        f"cosine, {protocol.epochs} epochs, batch {protocol.batch_size}, weight decay {protocol.weight_decay:g}",
        f"drop path {protocol.drop_path:g}, label smoothing {protocol.smoothing:g}",
        *([mixing] if mixing else []),
        *([f"RandAugment {protocol.rand_augment}"] if protocol.rand_augment else []),
        *([f"random erasing {protocol.erasing:g}"] if protocol.erasing else []),
        f"random crops of {protocol.crop_area[0]:.0%} to {protocol.crop_area[1]:.0%} of the area and flips",
    ]
    words = f"protocol {finetune.protocol} ({protocol.source}): {', '.join(parts)}"
    told = ", ".join(f"{key} {value:g} instead of {getattr(published, key):g}" for key, value in changes.items())
    return protocol, f"{words}; changed: {told}" if told else words


def evaluate_finetune(run: Path, config: TrainConfig | None = None, *, scratch: bool = False) -> dict:
    """Trains all weights of the run's pretrained network with labels, or with `scratch` those of its initialisation, and tests them.

    Top-1 (and top-5 where there are ten classes or more) after the last epoch, not the best one. `config` stands in for the run's own
    settings. Writes eval/finetune.json at the end, in one move, and returns it: one row for each of the two, the other's being kept where
    it had the same budget (protocol but for the layer decay, images, seed). Weights as pretrained go to eval/finetuned.safetensors.
    Decided by the seed; this process alone. Raises ValueError where there is no checkpoint, where the data has no labels and test split, or
    for an unknown protocol; RuntimeError where the loss is not finite.
    """
    began = time.perf_counter()
    config = config or saved_config(run)
    protocol, words = chosen_protocol(config.finetune, scratch=scratch)
    if not scratch:
        checkpoint.latest(run / "ckpt")
    images = Labelled.needed_by("eval finetune", config)
    images.check("eval finetune", protocol.batch_size)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = images.side("eval finetune", device)
    name = ROWS[0] if scratch else ROWS[1]
    say(f"{name}, all weights trained with labels, {words}")
    backbone = _backbone(config, protocol)
    step = 0 if scratch else load_pretrained(run, backbone)
    model = Classifier(backbone, len(images.train.classes), config.seed).to(device)
    found = train_and_test(model, images, protocol, size, name)
    seconds = round(time.perf_counter() - began, 1)
    row = {"name": name, **found, "step": step, "layer_decay": protocol.layer_decay, "words": words, "seconds": seconds}
    result = {
        "protocol": config.finetune.protocol,
        "words": words,
        "budget": {**asdict(replace(protocol, layer_decay=1.0)), "crop_area": list(protocol.crop_area), "seed": config.seed},
        "epochs": protocol.epochs,
        "batch_size": protocol.batch_size,
        "image_size": size,
        "data": config.data.path,
        "classes": len(images.train.classes),
        "train_images": len(images.train),
        "test_images": len(images.test),
    }
    result["rows"] = sorted([row, *_kept_rows(run, result, name)], key=lambda row: ROWS.index(row["name"]))
    result["words"] = result["rows"][-1]["words"]
    write_result(run, "finetune", result)
    if not scratch:
        save_file({key: tensor.cpu().contiguous() for key, tensor in model.state_dict().items()}, run / "eval" / WEIGHTS)
    return result


def _backbone(config: TrainConfig, protocol: Protocol) -> nn.Module:
    """The run's network at initialisation, with drop path where it has one."""
    options = dict(config.model.options)
    if config.model.name in VITS or config.model.name not in OURS:
        options["drop_path_rate"] = protocol.drop_path
    torch.manual_seed(config.seed)
    return build_backbone(config.model.name, channels_last=config.model.channels_last, **options)


def _kept_rows(run: Path, result: dict, name: str) -> list[dict]:
    """The other network's row of an earlier eval/finetune.json, where nothing but the network and the layer decay differ."""
    path = run / "eval" / "finetune.json"
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text())
    same = all(earlier.get(key) == value for key, value in result.items() if key != "words")
    others = [row for row in earlier["rows"] if row["name"] != name]
    if others and not same:
        say(f"the earlier row ({others[0]['name']}) had another budget and is left out; repeat it to compare")
    return others if same else []


def train_and_test(model: Classifier, images: Labelled, protocol: Protocol, size: int, name: str) -> dict:
    """{accuracy, top5, loss} after training `model`, whose device it takes; loss is the mean over the last epoch."""
    config, device = images.config, next(model.parameters()).device
    micro_batches = protocol.batch_size // protocol.micro_batch
    index = SampleIndex(len(images.train), protocol.batch_size, config.seed, accumulation_steps=micro_batches)
    reader = Reader(images.train, config.data.max_broken_share, config.seed)
    # where the CPU trains, one worker process is ahead of it
    threads = config.data.threads or (cores() if device.type == "cuda" else 1)
    augmentation = Augmentation(
        size=size,
        mean=config.data.mean,
        std=config.data.std,
        **{key: getattr(protocol, key) for key in ("crop_area", "rand_augment", "erasing", "mixup", "cutmix", "smoothing")},
    )
    bar = EpochBar(f"fine-tuning, {name}", protocol.epochs, protocol.epochs * index.steps_per_epoch * micro_batches)
    torch.manual_seed(config.seed)
    half = config.precision == "bf16-autocast"
    with closing(mixed_batches(reader, index, augmentation, threads=threads)) as batches, bar as progress:

        def epoch_done(epoch: int, loss: float) -> None:
            progress.epoch(epoch, {name: (loss, measured(model, images, half)["accuracy"])})

        loss = fit(model, progress.counted(batches), protocol, index, half=half, epoch_done=epoch_done)
    return {**measured(model, images, half), "loss": loss}


def fit(
    model: Classifier,
    batches: Iterator[tuple[Tensor, Tensor]],
    protocol: Protocol,
    index: SampleIndex,
    *,
    half: bool = False,
    epoch_done: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:
    """Trains `model` on the (images, targets [B, classes]) of `batches`, micro-batches of `index`; returns the last epoch's mean loss.

    With `half` the backbone runs under bf16 autocast. Raises RuntimeError where the loss is not finite.
    """
    device = next(model.parameters()).device
    groups = parameter_groups(model, layer_decay=protocol.layer_decay, weight_decay=protocol.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=protocol.scaled_lr, fused=True)
    mean = math.nan
    for epoch in range(protocol.epochs):
        model.train()
        total = torch.zeros((), device=device)
        for step in range(epoch * index.steps_per_epoch, (epoch + 1) * index.steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = protocol.lr_at(step, index.steps_per_epoch) * group["lr_scale"]
            for _ in range(index.accumulation_steps):
                images, targets = (part.to(device, non_blocking=True) for part in next(batches))
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    scores = model(images)
                loss = F.cross_entropy(scores, targets) / index.accumulation_steps
                loss.backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
        mean = total.item() / index.steps_per_epoch
        if not math.isfinite(mean):
            raise RuntimeError(f"eval finetune: the loss is not finite in epoch {epoch + 1}; give a lower lr=… than {protocol.lr:g}")
        epoch_done(epoch + 1, mean)
    return mean


@torch.no_grad()
def measured(model: Classifier, images: Labelled, half: bool) -> dict[str, float]:
    """`shares` of the test images that `model` classifies right, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    scores, labels = [], []
    for pixels, truth in images.batches(images.test, device):
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            scores.append(model(pixels))
        labels.append(truth)
    return shares(torch.cat(scores), torch.cat(labels))
