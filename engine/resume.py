"""When may a run begin in a folder or go on there, and from where?"""

import json
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from fuseer.engine import checkpoint
from fuseer.engine.config import TrainConfig
from fuseer.engine.distributed import Ranks, load_scaler_state, scaler_state
from fuseer.engine.run import Run

# What may differ when a run goes on. The learning rate follows a new length; nothing else here changes what a step computes.
FREE_ON_RESUME = {"steps", "epochs", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "zero_stage"} | {
    "knn", "linear", "finetune", "checkpoint_async", "stop_check_every_steps", "stop_grace_seconds", "max_skipped_steps",
    "on_divergence", "on_collapse", "max_rollbacks", "init",
}
FREE_MODEL = {"recompute", "recompute_min_size", "compile_blocks"}
FREE_DATA = {"path", "threads", "prefetch_batches", "max_broken_share"}


def agree_on_folder(config: TrainConfig, out: Path, ranks: Ranks, resume: bool | Literal["auto"]) -> bool:
    """Whether to go on from a checkpoint in `out`; decided on the first rank, agreed by all.

    resume="auto" goes on where there is any checkpoint, else starts: the one command that a scheduler may repeat. A folder whose
    checkpoints are all damaged is not started afresh. Raises ValueError where `out` does not allow what was asked.
    """
    decided = [None, None]
    if ranks.is_first:
        goes_on = any((out / "ckpt").glob("step_*")) if resume == "auto" else resume
        decided = [goes_on, None if resume == "auto" and not goes_on and not out.is_file() else _folder_refusal(config, out, goes_on)]
    dist.broadcast_object_list(decided, device=torch.device("cpu"))
    goes_on, refusal = decided
    if refusal:
        raise ValueError(refusal)
    return goes_on


def _folder_refusal(config: TrainConfig, out: Path, resume: bool) -> str | None:
    if out.exists() and not out.is_dir():
        return f"out={out} is a file; name a folder"
    if not resume:
        if (out / "config.json").exists():
            return f"out={out} already holds a run; add resume=true to go on with it, or name another folder"
        return None
    if not (out / "config.json").exists():
        return f"resume: {out} holds no run; leave resume=true out to start one"
    before, now = json.loads((out / "config.json").read_text()), config.model_dump(mode="json")
    for tree in (before, now):
        tree["data"] = {key: value for key, value in tree["data"].items() if key not in FREE_DATA}
        tree["model"] = {key: value for key, value in tree["model"].items() if key not in FREE_MODEL}
    changed = [key for key in now if key not in FREE_ON_RESUME and now[key] != before.get(key)]
    if changed:
        key = changed[0]
        was, is_now = json.dumps(before.get(key)), json.dumps(now[key])
        return f"resume: {key} was {was} when the run began and is now {is_now}; keep it, or start a new run"
    return None


def take_back(run: Run, out: Path) -> int:
    """Takes the newest complete, undamaged checkpoint below `out` back; returns its step.

    Every rank must call, at the beginning or in the middle of a run. Raises ValueError where there is none, or where `run` could not
    go on from it.
    """
    run.writer.finish()
    place = checkpoint.newest_sound(out / "ckpt", run.ranks)
    meta = checkpoint.read_meta(place)
    source = run.reader.source
    if "source" not in meta:
        raise ValueError(f"resume: {place} holds imported weights and no optimizer state; start another run from it, with init={out}")
    if meta["source"] != source.fingerprint():
        raise ValueError(
            f"resume: the images have changed since {place.name} ({meta['images']} then, {len(source)} now, or other names); "
            "the sample order would not go on; start a new run"
        )
    checkpoint.load(place, method=run.method, teachers=run.teachers, optimizer=run.optimizer, ranks=run.ranks, checked=True)
    if meta["step"] >= run.total_steps:
        raise ValueError(f"resume: {out} is already at step {meta['step']} of {run.total_steps}; raise steps or epochs to train on")
    run.skipped_steps, run.rollbacks = meta["skipped_steps"], meta.get("rollbacks", 0)
    # before steps were counted whether applied or not, each skipped one had taken a batch and no number
    run.passed_over = meta.get("passed_over", meta["skipped_steps"])
    load_scaler_state(run.engine, meta.get("loss_scale", {}))
    return meta["step"]


def save(run: Run, out: Path, step: int) -> None:
    """Writes checkpoint `step` of `run` below `out`, with checkpoint_async in the background; every rank must call."""
    source = run.reader.source
    run.writer.save(
        out / "ckpt",
        step,
        method=run.method,
        teachers=run.teachers,
        optimizer=run.optimizer,
        meta={
            "source": source.fingerprint(),
            "images": len(source),
            "skipped_steps": int(run.skipping.skipped),
            "passed_over": run.passed_over,
            "rollbacks": run.rollbacks,
            "loss_scale": scaler_state(run.engine),
        },
        keep=run.config.keep_checkpoints,
    )
