"""How does a test run a function on several real gloo processes and take back what each returned?"""

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world_size: int, function, *arguments) -> list:
    """[function(rank, *arguments) of every rank]; results travel through torch.save, a failing rank fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world_size, folder, function, arguments), nprocs=world_size)
        return [torch.load(Path(folder) / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function, arguments) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"result_{rank}.pt")
    finally:
        dist.destroy_process_group()
