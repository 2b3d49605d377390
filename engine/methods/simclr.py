"""SimCLR v1 and v2 (Chen et al. 2020, arXiv 2002.05709 and 2006.10029): two views of an image agree, all other images are negatives.

loss = Σ over both views of the mean over N images of CE(softmax over the other 2N-1 embeddings / temperature, the other view).
Fused: L2 normalisation, softmax over 2N-1 rows of all ranks, and its gradient (`fuseer.kernels.functional.nt_xent`).
Official formulation: google-research/simclr tf2/objective.py, tf2/model.py.
"""

import math

import torch
from pydantic import Field, model_validator
from torch import nn

from fuseer.engine.config import MethodConfig
from fuseer.engine.data.view import Batch, View
from fuseer.engine.methods.method import Ground, Loss, Method, spread_of
from fuseer.engine.models.heads import ProjectionHead
from fuseer.kernels.functional import nt_xent

# The official code adds the two views' means; the paper, and nt_xent, take the mean over the 2N rows.
VIEWS = 2


def two_views() -> tuple[View, ...]:
    """The published default: 2 x 224 px of 8-100 % of the area, bicubic, jitter of strength 1, blur for half of the views."""
    return (View(size=224, count=VIEWS, scale=(0.08, 1.0), interpolation="bicubic"),)


class SimCLRConfig(MethodConfig):
    """Defaults are those of the published ResNet-50 runs of v1; v2 has two hidden layers."""

    views: tuple[View, ...] = Field(default_factory=two_views)
    hidden_widths: tuple[int, ...] = (2048,)
    embedding_width: int = Field(128, ge=1)
    temperature: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _two_alike(self):
        if sum(view.count for view in self.views) != VIEWS or len({view.size for view in self.views}) != 1:
            raise ValueError(f"views: SimCLR needs 2 views of one size; got {[(view.count, view.size) for view in self.views]}")
        return self

    def build(self, ground: Ground) -> "SimCLR":
        return SimCLR(self, ground)


class SimCLR(Method):
    """Backbone → head (Linear without bias - BatchNorm - ReLU …, the last BatchNorm without bias or ReLU) → z [2B, D] → NT-Xent.

    BatchNorm sees both views at once, and should see all ranks (`model.sync_norm_ranks`): with statistics of one rank the network can
    tell which images are its neighbours, and the loss falls without learning.
    """

    # The loader hands out whole batches, as many images on every rank; whoever feeds other ones says so here.
    same_rows = True

    def __init__(self, config: SimCLRConfig, ground: Ground):
        super().__init__()
        self.config, self.group = config, ground.group
        self.images = ground.batch_per_rank * ground.world_size
        self.backbone = ground.backbone
        self.head = ProjectionHead(
            (self.backbone.width, *config.hidden_widths, config.embedding_width),
            bias=False,
            last_bias=False,
            last_norm="scale",
            normalize=False,
            group=ground.norm_group,
        )
        for layer in self.head.layers:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
        self._z = None

    @property
    def views(self):
        return self.config.views

    def forward(self, batch: Batch) -> Loss:
        z = self.head(self.backbone(torch.cat([crops.flatten(0, 1) for crops in batch.crops])))
        self._z = z.detach()
        z1, z2 = z.tensor_split(VIEWS)
        mean = nt_xent(z1, z2, temperature=self.config.temperature, group=self.group, same_rows=self.same_rows)
        return Loss(VIEWS * mean, {})

    def chance_loss(self) -> float:
        return VIEWS * math.log(2 * self.images - 1)

    def diagnostics(self) -> dict[str, torch.Tensor]:
        return spread_of(self._z, self.group)
