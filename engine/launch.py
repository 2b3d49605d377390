"""How does a rank that srun started learn who it is, and what does a rank say when another one dies?"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


def take_ranks_from_slurm() -> None:
    """Sets what torchrun and the deepspeed launcher set, RANK and its kin, in a task of `srun`; what is set already stays.

    A batch script or salloc shell is no task of a step: there nothing is set. The first node of the step is the meeting point, on a port
    that follows from the job's number.
    """
    variables = os.environ
    if "RANK" in variables or "SLURM_STEP_NUM_TASKS" not in variables:
        return
    found = {
        "RANK": variables["SLURM_PROCID"],
        "WORLD_SIZE": variables["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": variables["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node(variables["SLURM_STEP_TASKS_PER_NODE"])[int(variables["SLURM_NODEID"])]),
        "MASTER_ADDR": first_host(variables["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(20_000 + int(variables["SLURM_JOB_ID"]) % 10_000),
    }
    for name, value in found.items():
        variables.setdefault(name, value)


def tasks_per_node(text: str) -> list[int]:
    """Slurm's '8(x2),4' as [8, 8, 4]."""
    return [int(count) for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """The first of Slurm's 'gpu[007-012,020]-ib,login1': gpu007-ib."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes).group())


@contextmanager
def loss_of_a_peer_in_words() -> Iterator[None]:
    """Turns what gloo, NCCL and the store say when another process is gone into one sentence; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        rank = f"rank {dist.get_rank()}" if dist.is_initialized() else "this rank"
        said = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).partition(". This is")[0]
        raise RuntimeError(
            f"{rank} lost another rank and ends ({said}); what stopped that one stands in its own output, or it was killed from outside; "
            "start all ranks again with resume=true to go on from the last complete checkpoint"
        ) from error
