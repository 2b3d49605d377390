"""Which rank is this process, with whom does it talk, and what is DeepSpeed told?"""

import ctypes
import datetime
import functools
import logging
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fuseer.engine.config import TrainConfig
from fuseer.kernels import dispatch

TIMEOUT = datetime.timedelta(minutes=30)
# elements of gradients, or under stage 3 of weights, that travel at once
BUCKET = 20_000_000
HALF = {"bf16-autocast": torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Ranks:
    """This process among all; `group` is the whole world, or None for a process alone."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.world_size > 1 else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def cores() -> int:
    """Cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(local_world_size: int) -> int:
    return max(1, cores() // local_world_size)


def fastest_precision() -> str:
    """'bf16-autocast' where the processor or the GPU multiplies bf16 by itself, else 'fp32'."""
    if torch.cuda.is_available():
        return "bf16-autocast" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16-autocast" if found.get("avx512_bf16") or found.get("amx_bf16") else "fp32"


def keep_freed_memory(limit: int = 2**30) -> None:
    """Has glibc keep freed blocks below 32 MiB, up to `limit` bytes; else every activation of a small network faults its pages in anew.

    `limit=0` has it give back all from 128 KiB on: where the weights alone fill the memory, RegNetY-64GF peaked 0.36 GiB lower.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 32 * 2**20 if limit else 2**17)
        libc.mallopt(trim_threshold, max(limit, 2**17))


def start() -> Ranks:
    """Joins the process group that the launcher (deepspeed, torchrun, or none) describes: gloo on CPU, NCCL on GPUs."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for a process alone
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ["LOCAL_RANK"])
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(threads_per_rank(local_world))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if world > 1:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(rank, world, local_rank, local_world, device)


def stop() -> None:
    """Leaves the process group; a later start() begins anew."""
    if not dist.is_initialized():
        return
    # DeepSpeed keeps groups of its own in module globals; left there, its next engine would talk to a world that is gone
    deepspeed = sys.modules.get("deepspeed")
    world = deepspeed.comm if deepspeed and deepspeed.comm.is_initialized() else dist
    world.destroy_process_group()


def norm_group(ranks: Ranks, size: int) -> dist.ProcessGroup | None:
    """The ranks that share BatchNorm statistics with this one: consecutive groups of `size`; None for size 0 or 1.

    Every rank makes every group in the same order, as torch.distributed demands.
    """
    if size <= 1 or ranks.world_size == 1:
        return None
    if ranks.world_size % size:
        raise ValueError(f"model.sync_norm_ranks must divide the number of ranks, {ranks.world_size}; got {size}")
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, ranks.world_size, size)]
    return groups[ranks.rank // size]


def gather_rows(
    x: torch.Tensor, group: dist.ProcessGroup | None, *, same_rows: bool = False, counts: list[int] | None = None
) -> tuple[torch.Tensor, list[int]]:
    """x [n, ...] of every rank of `group` in rank order, [M, ...], and the ranks' counts; n may differ and be 0. No gradient.

    `same_rows=True` promises equal n everywhere, `counts` gives what is known: either spares an exchange that waits for the device.
    """
    rows, counts, _ = dispatch.gather_rows(x.detach(), dispatch.group_name("gather_rows", group), same_rows, counts)
    return rows, counts


def deepspeed_config(config: TrainConfig, world_size: int) -> dict:
    """The one place where DeepSpeed's JSON is made.

    Clipping is named because its default is 1.0; round-robin gradients stay off because they break the map from flat partitions
    to parameters; stage 3 must not put its own function in the place of torch's `linear`, for the whole process and for good.
    Precisions bf16 and fp16 keep half weights, whose gradients travel as such, and fp32 masters in the optimizer. Several micro-batches
    are summed in fp32, for which stage 1 holds a whole fp32 gradient on every rank. One overflow halves the loss scale under all stages,
    and half gradients are divided by the number of ranks before they are added, not after: the stages differ in both otherwise.
    """
    sections = {}
    if config.precision == "fp16":
        sections["fp16"] = {"enabled": True, "loss_scale": 0, "hysteresis": 1}
    if config.precision == "bf16":
        sections["bf16"] = {"enabled": True}
    if sections and config.accumulation_steps > 1:
        sections["data_types"] = {"grad_accum_dtype": "fp32"}
    if sections and config.zero_stage == 0:
        sections["prescale_gradients"] = True
    return {
        **sections,
        "train_micro_batch_size_per_gpu": micro_batch(config, world_size),
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.zero_stage,
            "round_robin_gradients": False,
            "reduce_bucket_size": BUCKET,
            "stage3_prefetch_bucket_size": BUCKET,
            "memory_efficient_linear": False,
        },
    }


def loss_scale(engine) -> float:
    """By what the caller multiplies its loss for engine.backward: 1 but at stage 0 in fp16, where DeepSpeed 0.19.8 leaves it out and
    divides the gradients all the same."""
    scaler = getattr(engine.optimizer, "loss_scale_config", None)
    return float(scaler.cur_scale) if scaler is not None and scaler.use_grad_scaling else 1.0


def scaler_state(engine) -> dict[str, float]:
    """What a checkpoint must carry of fp16's loss scale; empty in other precisions. The same on all ranks."""
    scaler = _scaler(engine)
    return {} if scaler is None else {name: getattr(scaler, name) for name in ("cur_scale", "cur_iter", "last_overflow_iter")}


def load_scaler_state(engine, state: dict[str, float]) -> None:
    """Takes `scaler_state` back; a scale saved under another precision is not taken over."""
    scaler = _scaler(engine)
    for name, value in state.items() if scaler is not None else ():
        setattr(scaler, name, value)


def _scaler(engine):
    scaler = getattr(engine.optimizer, "loss_scale_config", None) or getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "use_grad_scaling", False) or getattr(scaler, "dynamic", False) else None


def micro_batch(config: TrainConfig, world_size: int) -> int:
    """Images of one forward pass on one rank."""
    parts = world_size * config.accumulation_steps
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of ranks × accumulation_steps = {world_size} × {config.accumulation_steps}; "
            f"got {config.batch_size}"
        )
    return config.batch_size // parts


def initialize_deepspeed(module: torch.nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, world_size: int):
    """deepspeed.initialize without its compiled shared-memory op, which needs a compiler and leaves files in /dev/shm.

    In every half precision the module's forward runs under torch's autocast, so that products are half and norms fp32 whatever the
    dtype of weights and images; a process-wide switch, as DeepSpeed's own section is, would reach other engines.
    Raises RuntimeError where this processor cannot train in fp16.
    """
    import deepspeed

    if config.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise RuntimeError("precision=fp16 is not for this processor, which has no half-precision arithmetic; take bf16 or bf16-autocast")

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed takes a step over zero gradients while it wraps half weights, and decay would move them
    optimizer.step = lambda: None
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config, world_size))
    del optimizer.step
    if config.precision == "fp16" and config.zero_stage:
        # at its smallest scale DeepSpeed would end the run without a word of why; max_skipped_steps does
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    if config.precision in HALF:
        # computed again backward, a weight would be cast again anyway, and the cache keeps every half copy until then
        options = {"dtype": HALF[config.precision], "cache_enabled": not config.model.recompute}
        module.forward = torch.autocast(engine.device.type, **options)(module.forward)
    _reduce_in_small_parts(engine, world_size)
    return engine


def _reduce_in_small_parts(engine, world_size: int) -> None:
    """Stage 0 flattens gradients to reduce them, 2 GB at a time unless told otherwise, and also for a process alone, which has nobody to
    add them to: that one only gives gradient 0 to what no forward used, as the others do (names as in DeepSpeed 0.19.8)."""
    if world_size > 1:
        engine.allreduce_gradients = functools.partial(engine.allreduce_gradients, bucket_size=BUCKET)
    elif not hasattr(engine.optimizer, "get_grads_for_reduction"):
        engine.buffered_allreduce_fallback = lambda **_: engine._get_gradients_for_reduction()
