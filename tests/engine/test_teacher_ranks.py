"""Are teachers on several ranks, under every ZeRO stage, those of one process?"""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fuseer.engine import checkpoint, distributed, teacher
from fuseer.engine.config import TrainConfig
from fuseer.engine.distributed import Ranks
from fuseer.engine.methods.method import embedding_std
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import Piece, gathered, layout
from fuseer.engine.schedule import half_cosine
from fuseer.engine.teacher import Teachers
from fuseer.kernels.functional import ema_update_
from tests.ranks import on_ranks
from tests.taught import ALONE, CONFIG, STEPS, B, Half, batch_of, build, flat, official_run, relative


def whole(parameters) -> list[torch.Tensor]:
    parameters = list(parameters)
    with gathered(parameters):
        return [p.detach().clone() for p in parameters]


def engine_run(config: TrainConfig, ranks: Ranks, folder: Path | None = None) -> dict:
    method = build(ranks.rank, ranks.world_size)
    optimizer, teachers = build_optimizer(method, config.optim), Teachers(method)
    engine = distributed.initialize_deepspeed(method, optimizer, config, ranks.world_size)
    zero = engine.optimizer if config.zero_stage else None
    optimizer.bind(layout(method, zero), ranks.group, partitioned=zero is not None)
    teachers.follow(optimizer, ranks.group)
    own = range(ranks.rank * B // ranks.world_size, (ranks.rank + 1) * B // ranks.world_size)
    students = [*method.backbone.parameters(), *method.heads["projector"].parameters()]
    losses, expected, traffic = [], whole(students), Traffic()
    for step in range(STEPS):
        loss = engine(batch_of(step, own)).total
        engine.backward(loss)
        engine.step()
        if config.zero_stage == 3 and step == 4:
            next(teachers.parameters()).all_gather()  # as a forward that broke off leaves it
        with traffic:
            teachers.update(step + 1)
        ema_update_(expected, whole(students), half_cosine(step + 1, total_steps=STEPS, start=0.7))
        loss = loss.detach().clone()
        if ranks.group is not None:
            torch.distributed.all_reduce(loss)
        losses.append(loss.item() / ranks.world_size)
    if folder:
        checkpoint.save(folder, STEPS, method=method, teachers=teachers, optimizer=optimizer, ranks=ranks, meta={}, keep=1)
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "teacher": flat(whole(teachers.parameters())),
        "statistics": flat(b for b in teachers.buffers() if b.is_floating_point()),
        "student": flat(whole(method.parameters())),
        "average of what was seen": flat(expected),
        "moved here": sum(piece.numel for pieces in teachers.pieces_of.values() for piece in pieces),
        "kept here": sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in teachers.parameters()),
        "fp32": all(p.dtype == torch.float32 for p in teachers.parameters()),
        "collectives": traffic.calls,
    }


class Traffic(TorchDispatchMode):
    """Counts the collectives that torch dispatches."""

    calls = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.calls += operator.namespace in ("c10d", "_c10d_functional") and "wait" not in operator.__name__
        return operator(*arguments, **(options or {}))


def on_rank(rank: int, world_size: int, folder: str) -> dict:
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    rows = torch.arange(3.0 * 2).view(3, 2)[: 3 * rank] + 1
    found = {"gathered": distributed.gather_rows(rows.requires_grad_(), ranks.group)}
    z = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    found["std"] = embedding_std(3 * z[:4] if rank == 0 else z[4:], ranks.group)
    for stage in (0, 1, 2, 3):
        found[stage] = engine_run(CONFIG.model_copy(update={"zero_stage": stage}), ranks, Path(folder) / f"stage{stage}")
    found["half"] = half_run(ranks)
    found["autocast"] = engine_run(CONFIG.model_copy(update={"zero_stage": 2, "precision": "bf16-autocast"}), ranks)
    return found


def one_rank(rank: int) -> dict:
    return {stage: engine_run(CONFIG.model_copy(update={"zero_stage": stage}), ALONE) for stage in (0, 1, 2, 3)}


def half_run(ranks: Ranks) -> dict:
    """A layout as ZeRO 1 and 2 make it, over fp32 weights that no bf16 model shows: cut in the middle of parameters, exchanged in turns."""
    method = Half()
    teachers, masters = Teachers(method), {f"body.{name}": p.detach().float() for name, p in method.body.named_parameters()}
    flat_masters, pieces, end = torch.cat([master.flatten() for master in masters.values()]), {}, 0
    flat_masters += 1e-3 * torch.randn(len(flat_masters), generator=torch.Generator().manual_seed(99))
    share = -(-len(flat_masters) // ranks.world_size)
    mine = flat_masters[ranks.rank * share :][:share].clone()
    for name, master in masters.items():
        begin, end = end, end + master.numel()
        first, last = max(begin, ranks.rank * share), min(end, (ranks.rank + 1) * share)
        if first < last:
            parameter = method.get_parameter(name)
            pieces[name] = [Piece(name, parameter, mine, first - ranks.rank * share, first - begin, last - first)]
    teacher.EXCHANGED = 50
    teachers.follow(SimpleNamespace(partitioned=True, pieces_of=pieces), ranks.group)
    averages = flat_masters.clone()
    for step in range(20):
        flat_masters += 1e-3 * torch.randn(len(flat_masters), generator=torch.Generator().manual_seed(step))
        mine.copy_(flat_masters[ranks.rank * share :][:share])
        teachers.update(step)
        ema_update_([averages], [flat_masters], 0.9)
    kept = torch.cat([piece.of(piece.holder) for pieces in teachers.pieces_of.values() for piece in pieces])
    return {
        "runs": torch.cat([p.flatten() for p in teachers.parameters()]),
        "kept": torch.equal(kept, averages[ranks.rank * share :][:share]),
        "wanted": averages.bfloat16(),
        "collectives": len(teachers._exchanges),
    }


@pytest.fixture(scope="module")
def official():
    return official_run()


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, on_rank, 2, str(folder)), folder


@pytest.fixture(scope="module")
def alone():
    return on_ranks(1, one_rank)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_ranks_under_zero_equal_one_process(official, several, alone, stage):
    for rank in (*several[0], *alone):
        for name in ("losses", "student", "teacher", "statistics"):
            assert relative(rank[stage][name], official[name]) < 1e-5, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_differ_in_no_bit(several, alone, stage):
    for ranks in (several[0], alone):
        for rank in ranks:
            for name in ("student", "teacher"):
                assert torch.equal(rank[stage][name], ranks[0][0][name]), name


@pytest.mark.parametrize("run", [0, 1, 2, 3, "autocast"])
def test_the_teacher_is_the_average_of_whole_fp32_weights(several, run):
    for rank in several[0]:
        assert torch.equal(rank[run]["teacher"], rank[run]["average of what was seen"]) and rank[run]["fp32"]
        assert torch.equal(rank[run]["teacher"], several[0][0][run]["teacher"]), "ranks never drift apart"


def test_each_rank_moves_its_share_and_only_stages_1_and_2_talk(several):
    first, second = several[0]
    size = len(first[0]["teacher"])
    for rank in (first, second):
        assert rank[0]["moved here"] == rank[0]["kept here"] == size and rank[0]["collectives"] == 0
        assert all(0 < rank[stage]["moved here"] < size and rank[stage]["collectives"] == STEPS for stage in (1, 2))
        assert rank[3]["kept here"] < 0.51 * size and rank[3]["collectives"] == 0
    assert all(first[stage]["moved here"] + second[stage]["moved here"] == size for stage in (1, 2, 3))


def test_half_weights_have_an_fp32_average_and_a_teacher_rounded_once(several):
    for rank in several[0]:
        assert rank["half"]["kept"] and torch.equal(rank["half"]["runs"], rank["half"]["wanted"])
        assert rank["half"]["collectives"] == 4, "a rank's 167 and 166 elements, 50 at a time"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_teacher_of_two_ranks_loads_into_one_process(several, stage):
    method = build()
    teachers, optimizer = Teachers(method), build_optimizer(method, CONFIG.optim)
    optimizer.bind(layout(method, None), None, partitioned=False)
    place = checkpoint.latest(several[1] / f"stage{stage}")
    checkpoint.load(place, method=method, teachers=teachers, optimizer=optimizer, ranks=ALONE)
    assert torch.equal(flat(teachers.parameters()), several[0][0][stage]["teacher"])
    assert torch.equal(flat(method.parameters()), several[0][0][stage]["student"])
    assert torch.equal(flat(method.key_head.parameters()), flat(teachers.key_head.parameters())), "the method sees what was loaded"
    mean = (several[0][0][stage]["statistics"] + several[0][1][stage]["statistics"]) / 2
    assert relative(flat(b for b in teachers.buffers() if b.is_floating_point()), mean) < 1e-7


def test_rows_of_uneven_ranks_are_gathered_in_rank_order(several):
    for rank in several[0]:
        rows, counts = rank["gathered"]
        assert torch.equal(rows, torch.arange(6.0).view(3, 2) + 1) and counts == [0, 3] and not rows.requires_grad


def test_the_spread_of_embeddings(several):
    z = F.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    for rank in several[0]:
        torch.testing.assert_close(rank["std"], z.std(0, correction=0).mean() * 5**0.5, rtol=1e-5, atol=0)
    assert embedding_std(torch.randn(4000, 64), None) == pytest.approx(1, abs=0.01)
    assert embedding_std(torch.ones(50, 64) * torch.rand(50, 1), None) < 1e-3
