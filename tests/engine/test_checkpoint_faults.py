"""Does a process that dies between any two deeds of a save leave the checkpoint before, and does the next save work?"""

import json
import os
import shutil
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fuseer.engine import checkpoint
from fuseer.engine.config import OptimConfig
from fuseer.engine.distributed import Ranks
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import layout

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
DEEDS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


class Toy(nn.Module):
    """Weights that no two ranks can share evenly, rows of each rank's own along the second dimension, statistics that ranks hold apart."""

    sharded = {"queue": 1}

    def __init__(self, ranks: Ranks):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
        self.register_buffer("queue", torch.zeros(2, 6 // ranks.world_size, 3))
        self.register_buffer("apart", torch.zeros(3))

    def counters(self):
        return {}

    def load_counters(self, counters, same_world):
        pass


def made(ranks: Ranks, step: int) -> tuple[Toy, torch.optim.Optimizer]:
    """What a run at `step` holds: everything is decided by the step, but for what is a rank's own."""
    toy = Toy(ranks)
    optimizer = build_optimizer(toy, OptimConfig(name="adamw", lr=0.1))
    optimizer.bind(layout(toy, None), ranks.group, partitioned=False)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in [*toy.parameters(), *(value for state in optimizer.state.values() for value in state.values())]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        rows = torch.randn(2, 6, 3, generator=generator)
        toy.queue.copy_(rows.chunk(ranks.world_size, 1)[ranks.rank])
        toy.body[1].running_mean.copy_(torch.randn(5, generator=generator) / 3)
        toy.apart.fill_(step + ranks.rank)
    return toy, optimizer


def save(folder: Path, step: int, ranks: Ranks, background: bool = False) -> None:
    toy, optimizer = made(ranks, step)
    with checkpoint.Writer(ranks, background=background) as writer:
        writer.save(folder, step, method=toy, optimizer=optimizer, meta={}, keep=2)
        with torch.no_grad():
            for tensor in (*toy.parameters(), *toy.buffers()):
                tensor.zero_()  # as training goes on while a checkpoint is in flight


def held(folder: Path, ranks: Ranks, apart) -> int:
    """The step of the newest sound checkpoint, every bit of which is as it was saved."""
    toy, optimizer = made(ranks, 99)
    place = checkpoint.newest_sound(folder, ranks)
    step = checkpoint.load(place, method=toy, optimizer=optimizer, ranks=ranks, checked=True)["step"]
    wanted, wanted_optimizer = made(ranks, step)
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(toy.state_dict()[name], apart(step) if name == "apart" else tensor), (step, name)
    for name in wanted_optimizer.pieces_of:
        mine, theirs = (opt.state[opt.pieces_of[name][0].holder] for opt in (optimizer, wanted_optimizer))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs), name
    return step


def killed_at(count: int, folder: Path) -> None:
    """This process ends by SIGKILL before its deed number `count` below `folder`, a collective or an fsync being one too."""
    left = [count]

    def deed(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        # a tree is removed by names alone
        inside = event == "os.remove" or str(folder) in str(arguments[0])
        if event in DEEDS and inside and not (event == "open" and arguments[1] == "r"):
            deed()

    def before(function):
        return lambda *given, **named: (deed(), function(*given, **named))[1]

    sys.addaudithook(hook)
    os.fsync = before(os.fsync)
    dist.gather_object, dist.broadcast_object_list = before(dist.gather_object), before(dist.broadcast_object_list)


def forked(deed) -> int:
    """The number of a copy of this process that does `deed` and ends with 0, with 1 for a RuntimeError, else with 2."""
    child = os.fork()
    if child:
        return child
    code = 2
    try:
        deed()
        code = 0
    except RuntimeError:
        code = 1
    except (AssertionError, ValueError):
        traceback.print_exc()
    finally:
        os._exit(code)


def several(world_size: int, folder: Path, deed, die: tuple[int, int] | None = None) -> list[int]:
    """How `world_size` forked ranks end that do `deed(ranks)`, `die` being (rank, number of its deed)."""
    meeting = folder.with_name(f"{folder.name}.meeting")
    meeting.unlink(missing_ok=True)

    def on_rank(rank):
        ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
        if world_size > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timedelta(seconds=20)
            )
        if die and die[0] == rank:
            killed_at(die[1], folder)
        deed(ranks)

    children = [forked(lambda rank=rank: on_rank(rank)) for rank in range(world_size)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def mean(world_size: int):
    return lambda step: torch.full((3,), step + (world_size - 1) / 2)


def fault(template: Path, world_size: int, die: tuple[int, int], step: int, background: bool) -> dict:
    """One death while a step is saved where 1 and 2 are, what is there then, and after the next save."""
    place = template.with_name("place")
    shutil.copytree(template, place)
    ends = several(world_size, place, lambda ranks: save(place, step, ranks, background), die)
    found = {"world": world_size, "die": die, "step": step, "background": background, "ends": ends}
    found["left"] = sorted(path.name for path in place.iterdir())
    found["held"] = held(place, ALONE, mean(world_size))
    found["next"] = several(world_size, place, lambda ranks: save(place, 4, ranks)) if world_size > 1 else [save(place, 4, ALONE) or 0]
    found["then"] = held(place, ALONE, mean(world_size))
    found["remains"] = sorted(path.name for path in place.iterdir())
    shutil.rmtree(place)
    return found


def campaign(_: int, folder: str) -> None:
    """Every deed of a process alone; of two ranks those of the second, and of the first one those about its collectives."""
    torch.set_num_threads(1)
    made(ALONE, 0)  # what is imported for that is there in every fork
    template, found = Path(folder) / "template", {"faults": []}
    for world_size, rank, counts, step, background in (
        (1, 0, range(1, 99), 3, False), (1, 0, range(2, 99, 5), 3, True), (1, 0, range(16, 21), 2, False),
        (2, 1, range(1, 99), 3, False), (2, 0, (5, 12, 14, 17, 18, 24), 3, True),
    ):  # fmt: skip
        shutil.rmtree(template, ignore_errors=True)
        assert several(world_size, template, lambda ranks: [save(template, step, ranks) for step in (1, 2)]) == [0] * world_size
        (template / ".part_00000003").mkdir()
        (template / ".part_00000003" / "model.safetensors").write_bytes(b"half")
        for count in counts:
            found["faults"].append(fault(template, world_size, (rank, count), step, background))
            if set(found["faults"][-1]["ends"]) == {0}:
                break
    three = template.with_name("three")
    found["saved by three"] = several(3, three, lambda ranks: save(three, 5, ranks))
    found["read by three"] = several(3, three, lambda ranks: held(three, ranks, lambda step: torch.full((3,), step + ranks.rank)))
    found["read by two"] = several(2, three, lambda ranks: held(three, ranks, mean(3)))
    found["tensors"] = checkpoint.read_meta(three / "step_00000005")["tensors"]
    # one rank cannot write: a folder stands where its file belongs
    found["refused"] = several(2, three, lambda ranks: refused(three, ranks))
    found["after"] = sorted(path.name for path in three.iterdir())
    (Path(folder) / "found.json").write_text(json.dumps(found))


def refused(folder: Path, ranks: Ranks) -> None:
    write = checkpoint.shards.write

    def full(part, *given):
        if ranks.rank == 1:
            raise OSError(28, "No space left on device")
        return write(part, *given)

    checkpoint.shards.write = full
    for background in (False, True):
        writer = checkpoint.Writer(ranks, background=background)
        toy, optimizer = made(ranks, 6)
        with pytest.raises(RuntimeError, match=r"rank 1 could not write to .*: No space left on device; .* the checkpoints before stand"):
            writer.save(folder, 6, method=toy, optimizer=optimizer, meta={}, keep=2)
            assert background
            while True:
                writer.check()
        writer.finish()  # is told once


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    mp.spawn(campaign, (str(folder),), nprocs=1)
    return json.loads((folder / "found.json").read_text())


def test_whoever_dies_in_a_save_leaves_a_checkpoint_and_the_next_save_works(found):
    deaths = [fault for fault in found["faults"] if set(fault["ends"]) != {0}]
    for fault in deaths:
        assert fault["ends"][fault["die"][0]] == -signal.SIGKILL and set(fault["ends"]) <= {-signal.SIGKILL, 1}, fault
        assert fault["held"] == (3 if "step_00000003" in fault["left"] else 2), fault
        assert set(fault["next"]) == {0} and fault["then"] == 4, fault
        assert fault["remains"] == ["latest", f"step_{fault['held']:08d}", "step_00000004"], fault
    for world_size, fewest in ((1, 36), (2, 14)):
        met = [fault["held"] for fault in deaths if fault["world"] == world_size]
        assert set(met) == {2, 3} and len(met) >= fewest, "deaths before and after the rename"


def test_every_rank_writes_its_share_and_any_number_reads_it(found):
    assert found["saved by three"] == found["read by three"] == [0, 0, 0] and found["read by two"] == [0, 0]
    pieces = [row for name, facts in found["tensors"][checkpoint.OPTIMIZER].items() if "exp" in name for row in facts["pieces"]]
    assert [sum(numel for rank, _, numel in pieces if rank == wanted) for wanted in range(3)] == [34, 33, 33], "2 · (35 + 5 + 5 + 5)"
    assert [row[1:] for row in found["tensors"][checkpoint.MODEL]["queue"]["pieces"]] == [[at, 6] for at in range(0, 36, 6)]


def test_a_rank_that_cannot_write_is_named_on_all_ranks(found):
    assert found["refused"] == [0, 0] and found["after"] == ["latest", "step_00000005"]
