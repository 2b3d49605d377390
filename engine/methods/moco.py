"""MoCo v1, v2 (He et al. 2019, Chen et al. 2020; arXiv 1911.05722, 2003.04297) and v3 (Chen et al. 2021, arXiv 2104.02057): a query
finds, among many keys, the key that a slowly moving copy of the network made of another view of the same image.

v1, v2: loss = CE(softmax over own key and queue / τ, own key).  v3: loss = Σ over both views of 2τ · CE(softmax over all ranks' keys / τ).
Fused: logits, softmax, cross-entropy and gradient in one pass over the keys (`fuseer.kernels.functional.info_nce`), the queue never cloned.
Official formulations: facebookresearch/moco moco/builder.py, facebookresearch/moco-v3 moco/builder.py.
"""

import math

import torch
import torch.distributed as dist
from pydantic import Field, model_validator

from fuseer.engine.config import MethodConfig
from fuseer.engine.data.philox import SHUFFLE_STREAM, words
from fuseer.engine.data.view import Batch, View
from fuseer.engine.distributed import gather_rows
from fuseer.engine.methods.method import Ground, Loss, Method, spread_of
from fuseer.engine.models.heads import ProjectionHead
from fuseer.engine.models.norm import replace_batch_norm
from fuseer.engine.schedule import half_cosine
from fuseer.kernels.functional import info_nce
from fuseer.kernels.modules import Queue


def queue_views() -> tuple[View, ...]:
    """v2's: 2 x 224 px of 20-100 % of the area, jitter 0.4, hue 0.1, blur for half of them."""
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
    return (View(size=224, count=2, scale=(0.2, 1.0), **jitter),)


def symmetric_views(smallest: float = 0.2) -> tuple[View, ...]:
    """v3's, one always blurred, the other seldom blurred and at times solarized; areas from `smallest` (ViT: 0.08)."""
    crop = {"size": 224, "count": 1, "scale": (smallest, 1.0)}
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    return View(**crop, **jitter, blur=1.0), View(**crop, **jitter, blur=0.1, solarize=0.2)


class _PairConfig(MethodConfig):
    """What all versions share: two views of an image."""

    views: tuple[View, ...]
    teacher_momentum: float = Field(ge=0, le=1)
    temperature: float = Field(gt=0)

    @model_validator(mode="after")
    def _two(self):
        if sum(view.count for view in self.views) != 2:
            raise ValueError(f"views: MoCo needs 2 views of an image; got {sum(view.count for view in self.views)}")
        return self


class MoCoConfig(_PairConfig):
    """Defaults are those of v2; v1 has no hidden layer, temperature 0.07 and other views."""

    views: tuple[View, ...] = Field(default_factory=queue_views)
    hidden_widths: tuple[int, ...] = (2048,)
    embedding_width: int = Field(128, ge=1)
    queue_length: int = Field(65536, ge=1)
    temperature: float = Field(0.2, gt=0)
    teacher_momentum: float = Field(0.999, ge=0, le=1)
    norm_images: int = Field(32, ge=2, description="images that share BatchNorm statistics; a rank's batch is cut in slices of so many")

    def build(self, ground: Ground) -> "MoCo":
        return MoCo(self, ground)


class MoCoV3Config(_PairConfig):
    """Defaults are those of ResNet-50; ViT has two hidden layers in the head, a norm after the predictor, temperature 0.2."""

    views: tuple[View, ...] = Field(default_factory=symmetric_views)
    hidden_widths: tuple[int, ...] = (4096,)
    embedding_width: int = Field(256, ge=1)
    predictor_widths: tuple[int, ...] = (4096,)
    predictor_last_norm: bool = False
    temperature: float = Field(1.0, gt=0)
    teacher_momentum: float = Field(0.99, ge=0, le=1)
    momentum_cosine: bool = Field(True, description="the momentum grows to 1 over the run along half a cosine")

    def build(self, ground: Ground) -> "MoCoV3":
        return MoCoV3(self, ground)


class MomentumContrast(Method):
    """What all versions share: a teacher of backbone and head makes the keys."""

    teacher_of = {"key_backbone": "backbone", "key_head": "head"}
    # The loader hands out whole batches, as many images on every rank; whoever feeds other ones says so here.
    same_rows = True

    def __init__(self, config: _PairConfig, ground: Ground):
        super().__init__()
        self.config, self.group, self.rank = config, ground.group, ground.rank
        self._queries = None

    @property
    def views(self):
        return self.config.views

    def teacher_momentum(self, step: int) -> float:
        return self.config.teacher_momentum

    def diagnostics(self) -> dict[str, torch.Tensor]:
        return spread_of(self._queries, self.group)


class MoCo(MomentumContrast):
    """v1, v2: unit queries [B, D] of the first view; unit keys [B, D] of the second; a queue of the last keys of all ranks → InfoNCE.

    Statistics of BatchNorm would tell a query from which slice of the batch its key comes. So keys are made of shuffled images: each
    slice of `norm_images`, on whatever rank, holds a random share of the batch of all ranks, and one process cuts its batch in as many
    slices as several would. The queue is the same on all ranks.
    """

    def __init__(self, config: MoCoConfig, ground: Ground):
        super().__init__(config, ground)
        if ground.norm_group is not None:
            raise ValueError("model.sync_norm_ranks must be 0 for MoCo v1 and v2: shuffled keys take its place")
        if ground.batch_per_rank % config.norm_images:
            raise ValueError(
                f"method.norm_images must divide the images of one forward pass on one rank, {ground.batch_per_rank}; "
                f"got {config.norm_images}"
            )
        self.backbone = replace_batch_norm(ground.backbone, splits=ground.batch_per_rank // config.norm_images)
        self.head = ProjectionHead((self.backbone.width, *config.hidden_widths, config.embedding_width), batch_norm=False)
        self.queue = Queue(config.queue_length, config.embedding_width)

    def forward(self, batch: Batch) -> Loss:
        query_images, key_images = _pair(batch)
        queries = self.head(self.backbone(query_images))
        own, keys = self._keys(key_images, batch)
        loss = info_nce(queries, self.queue.rows, positive=own, temperature=self.config.temperature, normalize=False, group=self.group)
        if self.training:
            self.queue.push(keys)
        self._queries = queries.detach()
        return Loss(loss, {})

    def chance_loss(self) -> float:
        return math.log(self.config.queue_length + 1)

    @torch.no_grad()
    def _keys(self, images: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's keys [B, D] and those of all ranks in rank order, made of the images as `shuffled_order` deals them out."""
        every, counts = gather_rows(images, self.group, same_rows=self.same_rows)
        order = shuffled_order(batch, self.group, counts, images.device)
        own = slice(sum(counts[: self.rank]), sum(counts[: self.rank + 1]))
        encoded = self.key_head(self.key_backbone(every[order[own]]))
        dealt, _ = gather_rows(encoded, self.group, counts=counts)
        keys = torch.empty_like(dealt).index_copy_(0, order, dealt)
        return keys[own], keys


class MoCoV3(MomentumContrast):
    """v3: head and predictor → unit queries of both views; unit keys of the other view, of all ranks; InfoNCE both ways, times 2τ.

    The views pass one by one, as officially: they are drawn unlike each other, and so are their BatchNorm statistics, which should be
    those of all ranks (`model.sync_norm_ranks`).
    """

    def __init__(self, config: MoCoV3Config, ground: Ground):
        super().__init__(config, ground)
        self.images, self.total_steps = ground.batch_per_rank * ground.world_size, ground.total_steps
        self.backbone = ground.backbone
        D, bare = config.embedding_width, {"bias": False, "last_bias": False, "group": ground.norm_group}
        self.head = ProjectionHead((self.backbone.width, *config.hidden_widths, D), last_norm="plain", normalize=False, **bare)
        self.predictor = ProjectionHead((D, *config.predictor_widths, D), last_norm="plain" if config.predictor_last_norm else None, **bare)

    def forward(self, batch: Batch) -> Loss:
        pair = _pair(batch)
        queries = [self.predictor(self.head(self.backbone(images))) for images in pair]
        keys, counts = self._keys(pair)
        own = torch.arange(len(pair[0]), device=keys[0].device) + sum(counts[: self.rank])
        options = {"positive_index": own, "temperature": self.config.temperature, "normalize": False, "group": self.group}
        total = info_nce(queries[0], keys[1], **options) + info_nce(queries[1], keys[0], **options)
        self._queries = queries[0].detach()
        return Loss(2 * self.config.temperature * total, {})

    def chance_loss(self) -> float:
        return 4 * self.config.temperature * math.log(self.images)

    def teacher_momentum(self, step: int) -> float:
        start = self.config.teacher_momentum
        return half_cosine(step, total_steps=self.total_steps, start=start) if self.config.momentum_cosine else start

    @torch.no_grad()
    def _keys(self, pair: list[torch.Tensor]) -> tuple[tuple[torch.Tensor, torch.Tensor], list[int]]:
        """The unit keys of both views, [B, D] of every rank in rank order, and the ranks' counts; gathered once."""
        keys = [torch.nn.functional.normalize(self.key_head(self.key_backbone(images)), dim=1) for images in pair]
        every, counts = gather_rows(torch.cat(keys, 1), self.group, same_rows=self.same_rows)
        return every.chunk(2, 1), counts


def shuffled_order(batch: Batch, group: dist.ProcessGroup | None, counts: list[int], device: torch.device) -> torch.Tensor:
    """A random permutation [N] of the images of all ranks, the same on all: position p is dealt image order[p].

    Sorted by random words of (epoch, sample), so that neither history nor the number of ranks matters and nothing must be saved. `counts`
    are the ranks' images.
    """
    drawn = torch.from_numpy(words(0, batch.epoch, batch.samples.numpy(), SHUFFLE_STREAM, 2).astype("int64"))
    every, _ = gather_rows((drawn[:, 0] << 31 | drawn[:, 1] >> 1).to(device), group, counts=counts)
    return every.argsort(stable=True)


def _pair(batch: Batch) -> list[torch.Tensor]:
    """The two views [B, 3, h, w], whether they were asked for together or one by one."""
    return [images for crops in batch.crops for images in crops]
