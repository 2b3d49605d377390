"""Does a recipe fit on so many GPUs, under which ZeRO stage, and how long will it take?"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from rich.table import Table

from fuseer.engine.accelerators import GIB, Accelerator, accelerator
from fuseer.engine.config import TrainConfig
from fuseer.engine.costs import Costs, Size, built, size_of, traced
from fuseer.engine.distributed import BUCKET, micro_batch
from fuseer.engine.log import show

# what is left free for what nobody foretells: blocks cut to pieces, and the workspaces of libraries
MARGIN = 0.10
# a process before its model: of a GPU its context and NCCL's buffers (assumed), of a processor Python with torch and DeepSpeed (measured)
CONTEXT = {"cpu": int(0.7 * GIB)}
GPU_CONTEXT = int(1.5 * GIB)
# SEER's run on 512 V100 reached 8 % of the peak: 1421 img/s of 2x160 + 4x96 with all of the trunk computed twice; 20 % is a goal
UTILISATION = {"8 %, as SEER": 0.08, "20 %, a goal": 0.20}
BUS = 50e9
IMAGENET = 1_281_167
MOMENTA = {"lars": 1, "sgd": 1, "adamw": 2}


@dataclass(frozen=True)
class Plan:
    """Bytes per GPU as memory[stage][phase][part]; messages as {part: (collectives, bytes that a GPU sends)} of the chosen stage's step.

    `stage` is the smallest that fits with the margin, None where none does. `plain` are the costs without recomputation.
    """

    config: TrainConfig
    gpus: int
    gpu: str
    device: Accelerator
    images: int
    size: Size
    costs: Costs
    plain: Costs
    memory: dict[int, dict[str, dict[str, int]]]
    stage: int | None
    messages: dict[str, tuple[int, int]]

    @property
    def usable(self) -> int:
        return int(self.device.memory * (1 - MARGIN))

    def peak(self, stage: int) -> int:
        return max(sum(parts.values()) for parts in self.memory[stage].values())


def plan(config: TrainConfig, gpus: int, gpu: str, images: int = IMAGENET) -> Plan:
    """What training `config` needs of each of `gpus` GPUs; `images` is the size of the data set where the recipe counts epochs.

    Raises ValueError for a GPU that is not known and for a batch that the GPUs cannot share.
    """
    device, micro = accelerator(gpu), micro_batch(config, gpus)
    size, costs = size_of(*built(config, micro)), traced(config, micro)
    model = config.model.model_copy(update={"recompute": (), "recompute_min_size": 0})
    plain = traced(config.model_copy(update={"model": model}), micro) if config.model.recompute else costs
    context = CONTEXT.get(gpu, GPU_CONTEXT)
    memory = {stage: phases(config, size, costs, gpus, stage, context) for stage in range(4)}
    found = Plan(config, gpus, gpu, device, images, size, costs, plain, memory, None, {})
    fitting = [stage for stage in memory if found.peak(stage) <= found.usable]
    stage = fitting[0] if fitting else None
    return replace(found, stage=stage, messages=messages(config, size, costs, gpus, config.zero_stage if stage is None else stage))


def show_plan(options: dict[str, str], configure: Callable[[dict[str, str]], TrainConfig]) -> int:
    """The command: recipe=, gpus=, gpu=, images= and overrides; 0. Raises ValueError for what is missing or no number."""
    for key in ("recipe", "gpus", "gpu"):
        if key not in options:
            raise ValueError(f"plan: {key}=… is missing, as in: fuseer plan recipe=seer_regnety_256gf gpus=64 gpu=h100")
    counts = {key: options[key] for key in ("gpus", "images") if key in options}
    for key, count in counts.items():
        if not count.isdecimal() or int(count) < 1:
            raise ValueError(f"plan: {key} must be a whole number from 1 on; got {count}")
    config = configure({key: value for key, value in options.items() if key not in ("gpu", *counts)})
    show(told(plan(config, gpu=options["gpu"], **{key: int(count) for key, count in counts.items()})))
    return 0


def phases(config: TrainConfig, size: Size, costs: Costs, gpus: int, stage: int, context: int) -> dict[str, dict[str, int]]:
    """Bytes of one rank by part, while gradients are computed and while weights are updated, as DeepSpeed 0.19.8 keeps them."""
    N, part = size.trained, -(-size.trained // gpus)
    half = config.precision in ("bf16", "fp16")
    wide, momenta = 2 if half else 4, 4 * MOMENTA[config.optim.name]
    own = N if stage == 0 else part
    held = {
        "weights": wide * (part if stage == 3 else N),
        "masters": 4 * own if half or stage else 0,
        "momenta": momenta * own,
        "teachers": _teachers(size.teacher, gpus, stage, wide),
        "context": context,
    }
    # up to stage3_max_live_parameters; a process alone looks at its shards, which are whole
    gathered = wide * min(N, 1_000_000_000) if stage == 3 and gpus > 1 else 0
    gradients = min(wide * N, costs.peak)
    whole = {"gradients": gradients, "activations": costs.peak - gradients}
    taken = {"gradients": wide * part, "activations": costs.peak_consumed}
    rows = 4 * 8 * -(-size.unit_rows // (gpus if stage else 1))
    if stage == 0:
        backward = {**whole, "buckets": wide * BUCKET * (gpus > 1)}
        update = {"gradients": wide * N, "copies of gradients": 4 * N if half else 0, "rows": rows}
    else:
        buckets = 2 * wide * BUCKET
        backward = {**(whole if stage == 1 else taken), "gathered": gathered, "buckets": buckets}
        copied = (wide + 4) * part if half else wide * part
        update = {"gradients": wide * part, "copies of gradients": copied, "buckets": buckets, "rows": rows}
        if stage == 1:
            backward["copies of gradients"] = wide * part
    return {"backward": {**held, **backward}, "update": {**held, **update}}


def _teachers(numel: int, gpus: int, stage: int, wide: int) -> int:
    """Whole copies but under stage 3; beside half ones their fp32 average, in parts from stage 1 on."""
    average = 4 * numel if wide == 2 else 0
    return (wide * numel // (gpus if stage == 3 else 1)) + average // (gpus if stage else 1)


def messages(config: TrainConfig, size: Size, costs: Costs, gpus: int, stage: int) -> dict[str, tuple[int, int]]:
    """(collectives, bytes that one GPU sends in rings) of one optimizer step, by part; none for a GPU alone.

    Those of other losses than SwAV's are not counted.
    """
    if gpus == 1:
        return {}
    wide = 2 if config.precision in ("bf16", "fp16") else 4
    ring, steps, N = (gpus - 1) / gpus, config.accumulation_steps, size.trained
    buckets = -(-N // BUCKET)
    found = {"gradients": (buckets, int((1 if stage == 3 else 2) * ring * wide * N))}
    if stage in (1, 2):
        found["weights"] = (1, int(ring * wide * N))
    if stage == 3:
        # each pass gathers forward and again backward
        visits = 2 * steps * max(1, len(costs.passes))
        found["weights"] = (visits * size.layers, int(visits * ring * wide * N))
    group = min(gpus, config.model.sync_norm_ranks)
    if group > 1:
        forward, backward = (sum(bytes_of(C) for C in costs.norms) for bytes_of in (lambda C: 8 * (2 * C + 1), lambda C: 4 * 2 * C))
        sent = (group - 1) * forward + 2 * (group - 1) / group * backward
        found["BatchNorm"] = (2 * steps * len(costs.norms), int(steps * sent))
    if hasattr(config.method, "sinkhorn_iterations"):
        rounds = 1 + config.method.sinkhorn_iterations
        row_sums = 4 * config.method.prototypes * len(config.method.assign_crops)
        found["Sinkhorn"] = (steps * rounds, int(steps * rounds * 2 * ring * row_sums))
    if stage and config.optim.name == "lars":
        found["LARS"] = (2 if size.rows else 1, int(2 * ring * 3 * 8 * size.layers))
    if stage and size.rows:
        found["unit rows"] = (1, int(2 * ring * 8 * size.rows))
    if stage in (1, 2) and size.teacher:
        found["teachers"] = (1, int(ring * wide * size.teacher))
    return found


def told(found: Plan) -> list[Table | str]:
    """The plan as tables and sentences, with every assumption."""
    return [_network(found), _memory(found), _verdict(found), _messages(found), _speed(found), _assumptions(found)]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _network(found: Plan) -> Table:
    table = _table(f"{found.config.recipe}: {found.config.model.name}", "what", "number")
    for part, numel in found.size.parts.items():
        table.add_row(f"parameters, {part}", f"{numel:,}")
    table.add_row("parameters trained", f"{found.size.trained:,}", end_section=True)
    for pixels, crops, spent in found.costs.passes:
        table.add_row(f"multiply-adds of a crop of {pixels} px ({crops} crops a pass)", _giga(spent))
    table.add_row("multiply-adds of an image, forward", _giga(found.costs.forward))
    table.add_row("  forward and backward", _giga(found.plain.executed))
    if found.config.model.recompute:
        table.add_row("  and what is computed again for it", _giga(found.costs.executed))
    return table


def _memory(found: Plan) -> Table:
    table = _table(f"GiB per GPU at the peak of a step, {found.config.precision}", "part", *(f"ZeRO {stage}" for stage in found.memory))
    peaks = {stage: max(found.memory[stage].items(), key=lambda phase: sum(phase[1].values())) for stage in found.memory}
    named = dict.fromkeys(part for _, parts in peaks.values() for part, size in parts.items() if size)
    for part in named:
        table.add_row(part, *(_gib(parts.get(part, 0)) for _, parts in peaks.values()))
    table.add_section()
    table.add_row("in all", *(_gib(found.peak(stage)) for stage in peaks))
    table.add_row("while", *(phase for phase, _ in peaks.values()))
    table.add_row("fits", *("yes" if found.peak(stage) <= found.usable else "no" for stage in peaks))
    return table


def _verdict(found: Plan) -> str:
    room = f"{_gib(found.usable)} of {_gib(found.device.memory)} GiB, {MARGIN:.0%} being left free"
    kept = f"Kept from forward to backward: {_gib(found.costs.kept)} GiB"
    if found.config.model.recompute:
        kept += f", without recomputation {_gib(found.plain.kept)} GiB"
    if found.stage is None:
        least = min(map(found.peak, found.memory))
        advice = "take more GPUs or accumulation_steps" + ("" if found.config.model.recompute else ", or model.recompute=all")
        return f"Does not fit: the least of all stages needs {_gib(least)} GiB, and a GPU has {room}; {advice}. {kept}."
    chosen = f"zero_stage={found.stage} is the smallest that fits: {_gib(found.peak(found.stage))} GiB, and a GPU has {room}"
    if found.gpu.startswith("v100") and found.config.precision.startswith("bf16"):
        chosen = f"A V100 has no bf16: plan with precision=fp16 or fp32. {chosen}"
    own = found.config.zero_stage
    if found.peak(own) > found.usable:
        chosen += f". The recipe's own zero_stage={own} does not fit"
    elif own != found.stage:
        chosen += f". The recipe says zero_stage={own}, which fits too"
    return f"{chosen}. {kept}."


def _messages(found: Plan) -> Table:
    stage = found.config.zero_stage if found.stage is None else found.stage
    table = _table(f"Messages of one optimizer step under ZeRO {stage}, {found.gpus} GPUs", "part", "collectives", "MB sent by a GPU", "ms")
    for part, (count, size) in found.messages.items():
        table.add_row(part, f"{count:,}", f"{size / 1e6:,.3g}" if size < 1e9 else f"{size / 1e6:,.0f}", f"{1e3 * size / BUS:.3g}")
    if not found.messages:
        table.add_row("none: one GPU is alone", "0", "0", "0")
    return table


def _speed(found: Plan) -> Table | str:
    config, peak = found.config, found.device.peak(found.config.precision)
    seen = config.steps * config.batch_size or config.epochs * found.images
    if peak is None:
        return "No speed is foretold for a processor."
    columns = ("of the peak", "img/s a GPU", "img/s in all", "hours", "GPU-hours", "GPU-hours for 1e9 images")
    table = _table(f"{seen:,.0f} images on {found.gpus} {found.gpu}, peak {peak / 1e12:g} TFLOP/s in {config.precision}", *columns)
    for words, share in UTILISATION.items():
        speed = peak * share / (2 * found.costs.executed)
        hours = seen / speed / 3600
        numbers = (speed, speed * found.gpus, hours / found.gpus, hours, 1e9 / speed / 3600)
        table.add_row(words, *(f"{number:,.3g}" if number < 1000 else f"{number:,.0f}" for number in numbers))
    return table


def _assumptions(found: Plan) -> str:
    config, parts = found.config, found.gpus * found.config.accumulation_steps
    images = f"{config.batch_size // parts} images a GPU and forward pass ({config.batch_size} over {parts})"
    context = CONTEXT.get(found.gpu, GPU_CONTEXT) / GIB
    epochs = f" An epoch is {found.images:,} images." if config.epochs else ""
    return (
        f"Assumed: {images}; 8 % of the peak is what SEER's published run reached on 512 V100, 20 % is hoped for; operators save what they "
        f"save on a processor, library workspaces come out of the margin; a process takes {context:.2g} GiB before its model; "
        f"{BUS / 1e9:g} GB/s between GPUs, in rings, latencies and what hides behind the backward pass not counted, nor collectives of "
        "losses other than SwAV's; the peak is the data sheet's, dense; multiply-adds count convolutions and matrix products, two FLOP "
        f"each, and the speed is that of all of them, recomputed ones included; loading keeps up.{epochs}"
    )


def _giga(multiply_adds: int) -> str:
    return f"{multiply_adds / 1e9:,.4g} G"


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
