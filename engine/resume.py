"""When may a run begin in a folder or go on there, and from where?"""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from fuseer.engine import checkpoint
from fuseer.engine.config import TrainConfig
from fuseer.engine.distributed import Ranks
from fuseer.engine.run import Run

# What may differ when a run goes on. The learning rate follows a new length; nothing else here changes what a step computes.
FREE_ON_RESUME = {"steps", "epochs", "log_every_steps", "checkpoint_every_steps", "keep_checkpoints", "zero_stage"} | {
    "knn", "linear", "finetune"
}
FREE_DATA = {"path", "threads", "prefetch_batches", "max_broken_share"}


def agree_on_folder(config: TrainConfig, out: Path, ranks: Ranks, resume: bool) -> None:
    """Checks the run folder on the first rank, and has all ranks agree on the outcome."""
    refusal = [_folder_refusal(config, out, resume) if ranks.is_first else None]
    dist.broadcast_object_list(refusal, device=torch.device("cpu"))
    if refusal[0]:
        raise ValueError(refusal[0])


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
    changed = [key for key in now if key not in FREE_ON_RESUME and now[key] != before.get(key)]
    if changed:
        key = changed[0]
        was, is_now = json.dumps(before.get(key)), json.dumps(now[key])
        return f"resume: {key} was {was} when the run began and is now {is_now}; keep it, or start a new run"
    return None


def take_back(run: Run, out: Path) -> int:
    """Takes the newest complete checkpoint below `out` back; returns its step. Raises ValueError where `run` could not go on from it."""
    place = checkpoint.latest(out / "ckpt")
    meta = checkpoint.read_meta(place)
    source = run.reader.source
    if "source" not in meta:
        raise ValueError(f"resume: {place} holds imported weights and no optimizer state; it can be evaluated, fine-tuned and exported")
    if meta["source"] != source.fingerprint():
        raise ValueError(
            f"resume: the images have changed since {place.name} ({meta['images']} then, {len(source)} now, or other names); "
            "the sample order would not go on; start a new run"
        )
    checkpoint.load(place, method=run.method, teachers=run.teachers, optimizer=run.optimizer, ranks=run.ranks)
    if meta["step"] >= run.total_steps:
        raise ValueError(f"resume: {out} is already at step {meta['step']} of {run.total_steps}; raise steps or epochs to train on")
    run.skipped_steps = meta["skipped_steps"]
    return meta["step"]


def save(run: Run, out: Path, step: int) -> None:
    """Writes checkpoint `step` of `run` below `out`; every rank must call."""
    source = run.reader.source
    checkpoint.save(
        out / "ckpt",
        step,
        method=run.method,
        teachers=run.teachers,
        optimizer=run.optimizer,
        ranks=run.ranks,
        meta={"source": source.fingerprint(), "images": len(source), "skipped_steps": run.skipped_steps},
        keep=run.config.keep_checkpoints,
    )
