"""What is one run made of, and how is it put together from its configuration?"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from fuseer.engine import distributed
from fuseer.engine.config import TrainConfig
from fuseer.engine.data.sources import Reader, SampleIndex, open_source
from fuseer.engine.data.view import Loader
from fuseer.engine.distributed import Ranks
from fuseer.engine.methods.method import Ground, Method
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import layout
from fuseer.engine.teacher import Teachers


@dataclass
class Run:
    """Everything that one step touches. `skipped_steps` had gradients that were not finite and changed nothing: they count no step."""

    config: TrainConfig
    ranks: Ranks
    method: Method
    teachers: Teachers
    engine: object
    optimizer: torch.optim.Optimizer
    reader: Reader
    loader: Loader
    index: SampleIndex
    total_steps: int
    warmup_steps: int
    skipped_steps: int = 0


def resolved(config: TrainConfig) -> TrainConfig:
    """`config` with data.pipeline=auto replaced by what is here, so that a run never goes on with other pixels in silence."""
    if config.data.pipeline != "auto":
        return config
    name = "dali" if find_spec("nvidia") and find_spec("nvidia.dali") else "torchvision"
    return config.model_copy(update={"data": config.data.model_copy(update={"pipeline": name})})


def build(config: TrainConfig, ranks: Ranks) -> Run:
    """Source, loader, method and DeepSpeed engine of a run; the same weights on every rank."""
    source = open_source(config.data.path, split="train")
    index = SampleIndex(len(source), config.batch_size, config.seed, ranks.rank, ranks.world_size, config.accumulation_steps)
    reader = Reader(source, config.data.max_broken_share, config.seed)
    total = config.steps or max(1, round(config.epochs * index.steps_per_epoch))
    method = build_method(config, ranks, total)
    optimizer = build_optimizer(method, config.optim)
    teachers = Teachers(method)  # before ZeRO 3 takes the weights apart
    engine = distributed.initialize_deepspeed(method, optimizer, config, ranks.world_size)
    zero = engine.optimizer if config.zero_stage else None
    optimizer.bind(layout(method, zero), ranks.group, partitioned=zero is not None)
    teachers.follow(optimizer, ranks.group)
    warmup = config.optim.warmup_steps + round(config.optim.warmup_epochs * index.steps_per_epoch)
    loader = build_loader(config, reader, index, method, ranks)
    torch.manual_seed(config.seed + ranks.rank)  # weights were equal on all ranks; what is random in training must not be
    return Run(config, ranks, method, teachers, engine, optimizer, reader, loader, index, total, warmup)


def build_method(config: TrainConfig, ranks: Ranks, total_steps: int = 0) -> Method:
    """The method with its backbone at initialisation, decided by the seed alone; without its teachers."""
    norm_group = distributed.norm_group(ranks, config.model.sync_norm_ranks)
    backbone = initial_backbone(config, norm_group)
    batch = distributed.micro_batch(config, ranks.world_size)
    ground = Ground(backbone, ranks.group, norm_group, ranks.rank, ranks.world_size, batch, total_steps)
    return config.method.build(ground).to(ranks.device)


def build_loader(config: TrainConfig, reader: Reader, index: SampleIndex, method: Method, ranks: Ranks) -> Loader:
    """The configured pipeline; both draw the same parameters and return the same views up to the rounding of pixels."""
    if config.data.pipeline == "dali":
        from fuseer.engine.data.dali import DaliLoader as Pipeline
    else:
        from fuseer.engine.data.torchvision import TorchvisionLoader as Pipeline
    return Pipeline(
        reader,
        index,
        method.views,
        mean=config.data.mean,
        std=config.data.std,
        seed=config.seed,
        device=ranks.device,
        threads=config.data.threads or distributed.threads_per_rank(ranks.local_world_size),
        prefetch_batches=config.data.prefetch_batches,
    )
