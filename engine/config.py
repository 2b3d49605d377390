"""What can a run be told, and how is it told wrongly?"""

import difflib
import itertools
import json
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator, model_validator


class Config(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MethodConfig(Config):
    """Base of every method's settings; the method's own file adds its fields and the views it asks for."""


class ModelConfig(Config):
    """Which backbone, and how its BatchNorm is shared between ranks."""

    name: str = Field(description="one of our RegNets, or any timm model")
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the constructor, e.g. stem_stride")
    channels_last: bool = Field(False, description="memory layout of the activations; measure before choosing")
    sync_norm_ranks: int = Field(0, ge=0, description="ranks that share BatchNorm statistics; 0 = every rank alone")
    recompute: Literal["all"] | tuple[int, ...] | tuple[tuple[int, ...], ...] = Field(
        (), description="stages (1, 2, …) computed again backward, block by block; or for every stage the blocks that end its chunks"
    )
    recompute_min_size: int = Field(0, ge=0, description="only for images of at least so many pixels a side")
    compile_blocks: bool = Field(False, description="torch.compile on every block; neither with zero_stage=3 nor with recompute")

    @field_validator("recompute", mode="before")
    @classmethod
    def _stages_or_chunks(cls, given):
        parts = given if isinstance(given, (list, tuple)) else [None]
        chunks = [part if isinstance(part, (list, tuple)) else [part] for part in parts]
        numbers = [number for chunk in chunks for number in chunk]
        alike = len({isinstance(part, (list, tuple)) for part in parts}) <= 1
        counted = all(type(number) is int and number > 0 for number in numbers)
        if given != "all" and not (alike and counted and all(a < b for chunk in chunks for a, b in itertools.pairwise(chunk))):
            raise ValueError("give all, the stages as in [1,2,3], or for every stage the blocks that end its chunks, as in [[2],[4,7],[]]")
        return given

    @model_validator(mode="after")
    def _recomputes_or_compiles(self):
        if self.compile_blocks and self.recompute:
            raise ValueError("compile_blocks=true goes without recompute: a compiled block decides itself what to compute again; give one")
        if self.recompute_min_size and not self.recompute:
            raise ValueError(f"recompute_min_size={self.recompute_min_size} says for which images model.recompute acts; give that too")
        return self


class DataConfig(Config):
    """Where images come from and how they are turned into pixels."""

    path: str = Field("demo", description="'demo', a folder of images or tar shards, 'shards/{000..099}.tar', or a list file")
    pipeline: Literal["auto", "dali", "torchvision"] = "auto"
    threads: int = Field(0, ge=0, description="decode and augment threads; 0 = cores per local rank")
    prefetch_batches: int = Field(2, ge=1)
    max_broken_share: float = Field(0.01, ge=0, lt=1, description="stop when more than this share of the images seen is broken")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    masks: str = Field("", description="where a view's background_removal is above 0: 'saliency', or a folder of PNG masks")


class OptimConfig(Config):
    """The update rule and its learning rate: linear warm-up start_lr → lr, then cosine lr → final_lr, steps down or lr for good.

    Thin parameters are those of at most one dimension: norms and biases.
    """

    name: Literal["lars", "sgd", "adamw"] = "lars"
    variant: Literal["larc", "mocov3", "simclr", "byol", "paws"] = Field("larc", description="lars: which of the published five")
    lr: float = Field(gt=0)
    start_lr: float = Field(0.0, ge=0)
    final_lr: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    warmup_epochs: float = Field(0.0, ge=0, description="added to warmup_steps once the number of images is known")
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    per_epoch: bool = Field(False, description="the cosine is held within an epoch")
    milestones_steps: tuple[int, ...] = Field((), description="schedule=step: lr · milestone_factor from each of these steps on")
    milestones_epochs: tuple[float, ...] = Field((), description="the same in epochs; give one of the two")
    milestone_factor: float = Field(0.1, gt=0)
    weight_decay: float = Field(1e-6, ge=0)
    decay_thin: bool | None = Field(None, description="decay thin parameters too; none given: sgd does, adamw does not; lars: see variant")
    momentum: float = Field(0.9, ge=0, lt=1)
    trust_coefficient: float = Field(0.001, gt=0)
    eps: float = Field(1e-8, gt=0, description="adamw's; that of lars goes with its variant")
    betas: tuple[float, float] = (0.9, 0.999)

    @property
    def decays_thin(self) -> bool:
        return self.name != "adamw" if self.decay_thin is None else self.decay_thin

    @model_validator(mode="after")
    def _schedule_is_whole(self):
        given = {name: getattr(self, name) for name in ("milestones_steps", "milestones_epochs") if getattr(self, name)}
        if (self.schedule == "step") != (len(given) == 1):
            raise ValueError(
                f"schedule=step goes with one of milestones_steps and milestones_epochs, cosine and constant with neither; got "
                f"schedule={self.schedule} and {' and '.join(f'{name}={list(marks)}' for name, marks in given.items()) or 'no milestones'}"
            )
        for name, marks in given.items():
            if marks[0] <= 0 or any(later <= earlier for earlier, later in itertools.pairwise(marks)):
                raise ValueError(f"{name} must rise from above 0; got {list(marks)}")
        if self.per_epoch and self.schedule != "cosine":
            raise ValueError(f"per_epoch=true holds the cosine within an epoch; schedule={self.schedule} has none: leave per_epoch out")
        return self

    @model_validator(mode="after")
    def _rule_is_whole(self):
        if self.name != "lars" and self.variant != "larc":
            raise ValueError(f"variant={self.variant} is one of name=lars; {self.name} has none: leave variant out, or say name=lars")
        if self.name == "lars" and self.decay_thin is not None:
            raise ValueError(f"decay_thin={self.decay_thin} is for sgd and adamw; what lars decays goes with its variant: leave it out")
        return self


class KnnConfig(Config):
    """The weighted kNN that is taken during training and at its end, where the data has labels."""

    every_steps: int = Field(0, ge=0, description="0 = only when asked for after training")
    k: int = Field(20, ge=1)
    temperature: float = Field(0.07, gt=0)
    train_images: int = Field(0, ge=0, description="0 = all; otherwise the first so many, spread over the classes")
    image_size: int = Field(0, ge=0, description="0 = native size; otherwise resize to 8/7 of it and crop the centre")


class LinearConfig(Config):
    """The linear classifier that `fuseer eval linear` trains on the frozen network, where the data has labels."""

    protocol: str = Field("swav", description="one of evaluate/linear.py's table, e.g. moco, simclr, dino; tiny for small images")
    epochs: int | None = Field(None, ge=1, description="none given: the protocol's, as for the next two")
    batch_size: int | None = Field(None, ge=1)
    lr: float | None = Field(None, gt=0, description="at a batch of 256; it grows with batch_size as the protocol's does")


class FinetuneConfig(Config):
    """The training of all weights with labels that `fuseer eval finetune` does, where the data has labels."""

    protocol: str = Field("mae_vit_b", description="one of evaluate/finetune.py's table; tiny for small images")
    epochs: int | None = Field(None, ge=1, description="none given: the protocol's, as for all below")
    batch_size: int | None = Field(None, ge=1)
    micro_batch: int | None = Field(None, ge=1, description="images of one forward pass, mixed with each other")
    lr: float | None = Field(None, gt=0, description="at a batch of 256; it grows with batch_size")
    layer_decay: float | None = Field(None, gt=0, le=1, description="lr of a layer over that of the layer above")
    drop_path: float | None = Field(None, ge=0, lt=1, description="ViTs and timm's models that have it")


class TrainConfig(Config):
    """Everything a pretraining run is made of. Its JSON is saved beside the run and prints back to the same object."""

    recipe: str
    method: SerializeAsAny[MethodConfig]
    model: ModelConfig
    optim: OptimConfig
    data: DataConfig = DataConfig()
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    init: str = Field("", description="run folder, trained here or imported, whose newest weights this run starts from; '' = random ones")
    seed: int = Field(0, ge=0, lt=2**31)
    batch_size: int = Field(gt=0, description="images per optimizer step over all ranks and accumulation steps")
    steps: int = Field(0, ge=0, description="optimizer steps; give either steps or epochs")
    epochs: float = Field(0.0, ge=0)
    accumulation_steps: int = Field(1, ge=1)
    precision: Literal["fp32", "bf16-autocast", "bf16", "fp16"] = Field(
        "fp32", description="bf16, fp16: half weights too, with fp32 masters in the optimizer; fp16 scales the loss"
    )
    zero_stage: int = Field(0, ge=0, le=3)
    log_every_steps: int = Field(10, ge=1)
    checkpoint_every_steps: int = Field(0, ge=0, description="0 = only at the end")
    max_skipped_steps: int = Field(
        50, ge=1, description="in a row, with a loss or gradients that are not finite; looked at when logging, then on_divergence acts"
    )
    on_divergence: Literal["stop", "rollback"] = Field("stop", description="rollback: to the last checkpoint, and on with other images")
    on_collapse: Literal["warn", "stop", "rollback"] = Field("warn", description="when the monitor says that nothing is being learnt")
    max_rollbacks: int = Field(3, ge=0)
    keep_checkpoints: int = Field(2, ge=1)
    checkpoint_async: bool = Field(False, description="write beside training, from a copy in the host's memory of what this rank writes")
    stop_check_every_steps: int = Field(1, ge=1, description="ranks ask each other whether one was told to stop; no device sync")
    stop_grace_seconds: float = Field(30.0, ge=0, description="from SIGTERM to the SIGKILL of launcher or scheduler; 0 = no limit")

    @model_validator(mode="after")
    def _one_duration(self):
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(f"give exactly one of steps and epochs; got steps={self.steps} and epochs={self.epochs}")
        return self

    @model_validator(mode="after")
    def _can_go_back(self):
        if "rollback" in (self.on_divergence, self.on_collapse) and not self.checkpoint_every_steps:
            raise ValueError("on_divergence or on_collapse is rollback, which needs checkpoints to go back to; give checkpoint_every_steps")
        return self

    @model_validator(mode="after")
    def _sums_in_fp32(self):
        if self.accumulation_steps > 1 and self.zero_stage == 0 and self.precision in ("bf16", "fp16"):
            raise ValueError(
                f"precision={self.precision} with zero_stage=0 would sum the gradients of {self.accumulation_steps} micro-batches in half "
                "precision; take zero_stage=1 or more, precision=bf16-autocast, or accumulation_steps=1"
            )
        return self

    @model_validator(mode="after")
    def _compiles_where_it_can(self):
        if self.model.compile_blocks and self.zero_stage == 3:
            raise ValueError("model.compile_blocks=true goes with zero_stage 0 to 2: stage 3 gathers weights inside a block; give one up")
        return self

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2)


def nearest(word: str, choices) -> str:
    """' (did you mean …?)' for the closest of `choices`, or their list when none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; choose from {', '.join(choices) or 'none'}"


def apply_overrides(config: Config, overrides: dict[str, str]) -> Config:
    """`config` with every `key.path=value` applied; values are read as JSON where they parse, else as text.

    Raises ValueError naming the key, the value and the nearest known key.
    """
    tree: dict[str, Any] = {}
    for path, text in overrides.items():
        _check_path(config, path)
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if isinstance(node, _Given):
                raise ValueError(f"config: {path} stands inside {parent}, which is given as a whole; give one of them")
        node[leaf] = _Given(_value(text))
    return _merge(config, tree, "")


class _Given(NamedTuple):
    """A value as it was given, to tell a whole dictionary from settings inside one."""

    value: Any


def _check_path(config: Config, path: str) -> None:
    node: Any = config
    for depth, key in enumerate(path.split(".")):
        if isinstance(node, dict) and depth == path.count("."):
            return
        if not isinstance(node, Config):
            raise ValueError(f"config: {'.'.join(path.split('.')[:depth])} has no settings below it; got {path}")
        if key not in type(node).model_fields:
            raise ValueError(f"config: unknown key {path}{nearest(key, type(node).model_fields)}")
        node = getattr(node, key)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _merge(config: Config, tree: dict[str, Any], where: str) -> Config:
    fields: dict[str, Any] = {name: getattr(config, name) for name in type(config).model_fields}
    for key, value in tree.items():
        if isinstance(value, _Given):
            fields[key] = value.value
        elif isinstance(fields[key], Config):
            fields[key] = _merge(fields[key], value, f"{where}{key}.")
        else:
            fields[key] = {**fields[key], **{name: given.value for name, given in value.items()}}
    try:
        return type(config)(**fields)
    except ValidationError as error:
        raise ValueError(_sentence(error, where)) from None


def _sentence(error: ValidationError, where: str) -> str:
    """pydantic's report as one sentence per mistake: key, what is wrong, value."""
    said = []
    for item in error.errors():
        key = where + ".".join(str(part) for part in item["loc"])
        what = item["msg"].removeprefix("Value error, ")
        said.append(f"{key}: {what} (got {item['input']!r})" if item["loc"] else what)
    return "config: " + "; ".join(said)
