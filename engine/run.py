"""What is one run made of, and how is it put together from its configuration?"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from fuseer.engine import checkpoint, distributed
from fuseer.engine.config import TrainConfig
from fuseer.engine.data.masks import open_masks
from fuseer.engine.data.sources import Reader, SampleIndex, open_source
from fuseer.engine.data.view import Loader
from fuseer.engine.distributed import Ranks
from fuseer.engine.log import say
from fuseer.engine.methods.method import Ground, Method
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import layout
from fuseer.engine.skipping import Skipping
from fuseer.engine.teacher import Teachers


@dataclass
class Run:
    """Everything that one step touches.

    Steps are counted whether or not they were applied: `skipped_steps` of those before this process began, or last went back, had a loss
    or gradients that were not finite and changed nothing. Step t takes batch t + `passed_over`, the steps that `rollbacks` undid.
    """

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
    writer: checkpoint.Writer
    skipping: Skipping
    skipped_steps: int = 0
    passed_over: int = 0
    rollbacks: int = 0


def resolved(config: TrainConfig) -> TrainConfig:
    """`config` with data.pipeline=auto replaced by what is here, so that a run never goes on with other pixels in silence."""
    if config.data.pipeline != "auto":
        return config
    name = "dali" if find_spec("nvidia") and find_spec("nvidia.dali") else "torchvision"
    return config.model_copy(update={"data": config.data.model_copy(update={"pipeline": name})})


def build(config: TrainConfig, ranks: Ranks, *, fresh: bool = True) -> Run:
    """Source, loader, method and DeepSpeed engine of a run; the same weights on every rank: with `fresh` those of `config.init`, if any."""
    source = open_source(config.data.path, split="train")
    index = SampleIndex(len(source), config.batch_size, config.seed, ranks.rank, ranks.world_size, config.accumulation_steps)
    reader = Reader(source, config.data.max_broken_share, config.seed)
    total = config.steps or max(1, round(config.epochs * index.steps_per_epoch))
    method = build_method(config, ranks, total)
    if config.init and fresh:
        begin_from(Path(config.init), method, ranks)
    optimizer = build_optimizer(method, config.optim)
    teachers = Teachers(method)  # before ZeRO 3 takes the weights apart
    engine = distributed.initialize_deepspeed(method, optimizer, config, ranks.world_size)
    wrapper = None if engine.optimizer is optimizer else engine.optimizer
    optimizer.bind(layout(method, wrapper), ranks.group, partitioned=config.zero_stage > 0)
    teachers.follow(optimizer, ranks.group)
    warmup = config.optim.warmup_steps + round(config.optim.warmup_epochs * index.steps_per_epoch)
    loader = build_loader(config, reader, index, method, ranks)
    torch.manual_seed(config.seed + ranks.rank)  # weights were equal on all ranks; what is random in training must not be
    writer = checkpoint.Writer(ranks, background=config.checkpoint_async)
    skipping = Skipping(engine, optimizer, method, teachers)
    return Run(config, ranks, method, teachers, engine, optimizer, reader, loader, index, total, warmup, writer, skipping)


def build_method(config: TrainConfig, ranks: Ranks, total_steps: int = 0) -> Method:
    """The method with its backbone at initialisation, decided by the seed alone; without its teachers."""
    norm_group = distributed.norm_group(ranks, config.model.sync_norm_ranks)
    backbone = initial_backbone(config, norm_group)
    batch = distributed.micro_batch(config, ranks.world_size)
    ground = Ground(backbone, ranks.group, norm_group, ranks.rank, ranks.world_size, batch, total_steps)
    return config.method.build(ground).to(ranks.device)


def begin_from(run: Path, method: Method, ranks: Ranks) -> None:
    """Puts the newest weights of the run folder `run` into `method`: its backbone, and each further part whose every tensor fits.

    Parts that do not fit, another head or other prototypes, keep their random start, which is said. Before DeepSpeed has the weights.
    Raises ValueError where `run` holds no checkpoint or a backbone of another network.
    """
    if not (run / "ckpt").is_dir():
        raise ValueError(f"init={run} holds no ckpt/; name the folder of a run, or make one of an official file with fuseer import")
    state, own = checkpoint.read(checkpoint.latest(run / "ckpt"), checkpoint.MODEL), method.state_dict()
    for part in dict.fromkeys(name.split(".")[0] for name, _ in method.named_parameters()):
        theirs, ours = ({key: t for key, t in of.items() if key.split(".")[0] == part} for of in (state, own))
        shapes = [{key: t.shape for key, t in of.items()} for of in (theirs, ours)]
        wrong = sorted({key for key, _ in shapes[0].items() ^ shapes[1].items()})
        if not wrong:
            method.load_state_dict(theirs, strict=False)
        elif part == "backbone":
            raise ValueError(
                f"init={run}: its backbone is another network than this run's, {len(wrong)} tensors differ, the first is {wrong[0]}; "
                f"give the model.name and model.options of {run / 'config.json'}, and know that friendly siblings take no published weights"
            )
        elif ranks.is_first:
            say(f"init: {part} starts at random, for {run} has {'another' if theirs else 'none'}")


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
        masks=open_masks(config.data.masks, reader.source),
    )
