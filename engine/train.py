"""How does a recipe become a run? Also started as `deepspeed --module fuseer.engine.train recipe=… out=…`."""

import sys

if __name__ == "__main__":  # the thread settings must stand before torch loads
    from fuseer.engine.cli import main

    sys.exit(main(["pretrain", *sys.argv[1:]]))

import json
import platform
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from fuseer.engine import distributed
from fuseer.engine.config import TrainConfig
from fuseer.engine.costs import mfu_of_an_image
from fuseer.engine.data.sheet import crop_sheet
from fuseer.engine.data.sources import shown
from fuseer.engine.distributed import Ranks
from fuseer.engine.evaluate.probe import GivenUp, KnnProbe
from fuseer.engine.log import RunLog, say
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.monitor import Monitor
from fuseer.engine.partitions import forget_gradients, gathered, shape_of
from fuseer.engine.preemption import Preemption
from fuseer.engine.recovery import Diverged, judge, recover, refuse_broken_weights
from fuseer.engine.resume import agree_on_folder, save, take_back
from fuseer.engine.run import Run, build, resolved
from fuseer.engine.schedule import warmup_cosine, warmup_milestones

PACKAGES = ("torch", "triton", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "torchvision", "timm", "numpy", "safetensors")


def train(config: TrainConfig, out: Path, *, resume: bool | Literal["auto"] = False) -> None:
    """Pretrains as `config` says and leaves config.json, env.json, metrics.jsonl, events/, ckpt/ and crops.png in `out`.

    A folder that already holds a run is refused unless `resume`, which goes on from its newest complete checkpoint; resume="auto" starts
    where there is none. Raises preemption.Stopped where a signal ended the run before its last step.
    """
    config, ranks = resolved(config), distributed.start()
    resume = agree_on_folder(config, out, ranks, resume)
    run = build(config, ranks, fresh=not resume)
    first = take_back(run, out) if resume else 0
    if ranks.is_first:
        out.mkdir(parents=True, exist_ok=True)
        _write_at_once(out / "env.json", json.dumps(_environment(run), indent=2))
        _write_at_once(out / "config.json", config.to_json())
        say(_in_words(run))
    begun = (out / "metrics.jsonl").exists()
    log = RunLog(
        out,
        first_rank=ranks.is_first,
        start=first,
        total=run.total_steps,
        images_per_step=config.batch_size,
        device=ranks.device,
        crops_per_image=sum(view.count for view in run.method.views),
        mfu_of_an_image=mfu_of_an_image(config, ranks) if ranks.is_first else None,
    )
    if begun:
        log.event("resume", first)
    try:
        with (
            Preemption(ranks, check_every_steps=config.stop_check_every_steps, grace_seconds=config.stop_grace_seconds) as stop,
            run.writer,
        ):
            while first is not None:
                try:
                    first = _loop(run, out, log, first, stop)
                except Diverged as trouble:
                    first = recover(run, out, log, trouble)
    finally:
        log.close()
        run.loader.close()


def _loop(run: Run, out: Path, log: RunLog, first: int, stop: Preemption) -> None:
    """Trains from step `first` to the last. A step is one whether or not its update was applied: learning rate, momentum of teachers,
    method and data go by their number. Raises Diverged where it must not go on so, Stopped where it was asked to end."""
    config, ranks = run.config, run.ranks
    # under ZeRO 3 every rank takes part in a probe
    probe = KnnProbe.where_labelled(config) if config.knn.every_steps and (ranks.is_first or config.zero_stage == 3) else None
    batches = run.loader.batches((first + run.passed_over) * config.accumulation_steps)
    named: set[str] = set()
    monitor = Monitor(run.method.chance_loss(), config.batch_size, run.warmup_steps, run.total_steps)
    run.method.train()
    run.method.after_step(first)
    run.skipping.begin(run.skipped_steps)
    done, saved = first, first

    def checkpointed():
        refuse_broken_weights(run, done)
        save(run, out, done)

    while done < run.total_steps and not stop.agreed():
        run.writer.check()
        lr = _set_lr(run, done)
        loss = torch.zeros((), device=ranks.device)
        forget_gradients(run.engine.optimizer)
        for _ in range(config.accumulation_steps):
            batch = log.awaited(batches)
            if done == 0 and ranks.is_first and not (out / "crops.png").exists():
                crop_sheet(batch, out / "crops.png", mean=config.data.mean, std=config.data.std)
            total = run.engine(batch).total
            log.end("forward")
            run.engine.backward(run.skipping.guarded(total))
            log.end("backward")
            run.engine.step()
            log.end("update")
            loss += total.detach() / config.accumulation_steps
        done += 1
        run.teachers.update(done, run.skipping.settle())
        run.method.after_step(done)
        log.end("update")
        log.advance(done)
        if done % config.log_every_steps == 0 or done == run.total_steps:
            values = {"loss": _mean(loss, ranks), **run.method.diagnostics(), **run.skipping.counts()}
            numbers = log.train(done, done / run.index.steps_per_epoch, lr, values)
            _name_broken(run, log, done, named)
            judge(run, log, monitor, done, numbers)
        if done == run.total_steps or (config.checkpoint_every_steps and done % config.checkpoint_every_steps == 0):
            with log.paused():
                checkpointed()
            saved = done
        if probe and (done % config.knn.every_steps == 0 or done == run.total_steps):
            with log.paused(), suppress(GivenUp):
                backbone = _whole_backbone(run)
                if ranks.is_first:
                    log.event("knn", done, accuracy=probe.accuracy(backbone, ranks.device, stop.asked))
    if done < run.total_steps:
        stop.leave(done, saved=saved, writer=run.writer, save=checkpointed)


def _whole_backbone(run: Run) -> nn.Module | None:
    """The backbone as one rank alone can run it; where it is in shards (ZeRO 3) or half, a whole fp32 copy on the first rank, None on
    others. Every rank must call."""
    sharded = run.method.backbone
    if run.config.zero_stage < 3 and run.config.precision not in ("bf16", "fp16"):
        return sharded
    whole = None
    if run.ranks.is_first:
        with torch.random.fork_rng([run.ranks.device] if run.ranks.device.type == "cuda" else []):
            whole = initial_backbone(run.config).to(run.ranks.device)
    for name, parameter in sharded.named_parameters():
        with gathered([parameter]), torch.no_grad():
            if whole is not None:
                whole.get_parameter(name).copy_(parameter)
    if whole is not None:
        whole.load_state_dict(dict(sharded.named_buffers()), strict=False)
    return whole


def _set_lr(run: Run, step: int) -> float:
    optim, epoch = run.config.optim, run.index.steps_per_epoch
    rise = {"warmup_steps": run.warmup_steps, "start": optim.start_lr, "peak": optim.lr}
    if optim.schedule != "cosine":  # constant: no milestones
        milestones = optim.milestones_steps or [round(at * epoch) for at in optim.milestones_epochs]
        lr = warmup_milestones(step, **rise, milestones=milestones, factor=optim.milestone_factor)
    else:
        hold = epoch if optim.per_epoch else 0
        lr = warmup_cosine(step, **rise, total_steps=run.total_steps, final=optim.final_lr, hold_steps=hold)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    return lr


def _mean(loss: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    if ranks.group is not None:
        dist.all_reduce(loss)
    return loss / ranks.world_size


def _name_broken(run: Run, log: RunLog, step: int, named: set[str]) -> None:
    """Names every broken image once, whichever rank met it."""
    found = [dict(run.reader.broken)]
    if run.ranks.group is not None:
        found *= run.ranks.world_size
        dist.all_gather_object(found, dict(run.reader.broken))
    for path, reason in {path: reason for part in found for path, reason in part.items()}.items():
        if path not in named and run.ranks.is_first:
            named.add(path)
            say(f"skipped a broken image: {shown(path)}: {reason}")
            log.event("broken", step, file=shown(path), reason=reason)


def _write_at_once(path: Path, text: str) -> None:
    """A process killed in the middle leaves the file that was there before, or none."""
    part = path.with_name(f".{path.name}")
    part.write_text(text)
    part.replace(path)


def _in_words(run: Run) -> str:
    config, ranks = run.config, run.ranks
    parameters = sum(shape_of(p).numel() for p in run.method.parameters()) / 1e6
    where = f"{ranks.world_size} rank{'s' * (ranks.world_size > 1)} on {ranks.device.type}, {torch.get_num_threads()} threads each"
    return (
        f"{config.recipe}: {config.model.name}, {parameters:.2f} M parameters with head; {len(run.reader.source):,} images through "
        f"{config.data.pipeline}, {run.index.steps_per_epoch} steps an epoch; {where}; {config.precision}, ZeRO {config.zero_stage}"
    )


def _environment(run: Run) -> dict:
    ranks, packages, chance = run.ranks, {}, run.method.chance_loss()
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "absent"
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "host": {"system": platform.platform(), "processor": platform.machine(), "cores": distributed.cores()},
        "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "ranks": ranks.world_size,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
        **({} if chance is None else {"chance_loss": chance}),
    }
