"""Which rank is this process, with whom does it talk, and what is DeepSpeed told?"""

import ctypes
import datetime
import logging
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fuseer.engine.config import TrainConfig
from fuseer.kernels import dispatch

TIMEOUT = datetime.timedelta(minutes=30)


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


def keep_freed_memory() -> None:
    """Has glibc keep freed blocks below 32 MiB, and 1 GiB of them; else every activation of a small network faults its pages in anew."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(mmap_threshold, 32 * 2**20)
        libc.mallopt(trim_threshold, 2**30)


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
    to parameters; under autocast every gradient is reduced in fp32, else stages 1 to 3 differ from stage 0; stage 3 must not put its own
    function in the place of torch's `linear`, for the whole process and for good.
    """
    return {
        "train_micro_batch_size_per_gpu": micro_batch(config, world_size),
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.zero_stage,
            "round_robin_gradients": False,
            "reduce_bucket_size": 20_000_000,
            "stage3_prefetch_bucket_size": 20_000_000,
            "memory_efficient_linear": False,
        },
        "torch_autocast": {
            "enabled": config.precision == "bf16-autocast",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
    }


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
    """deepspeed.initialize without its compiled shared-memory op, which needs a compiler and leaves files in /dev/shm."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config, world_size))
    return engine
