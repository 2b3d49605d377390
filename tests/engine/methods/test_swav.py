"""Is SwAV the published method, and the same on one process, on several, and under every ZeRO stage?"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fuseer.engine import checkpoint, distributed
from fuseer.engine.config import ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.data.view import Batch, View
from fuseer.engine.methods.method import Ground
from fuseer.engine.methods.swav import SwAV, SwAVConfig
from fuseer.engine.models.backbone import build_backbone
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import layout
from tests.ranks import on_ranks

STEPS, FREEZE, B = 10, 5, 12
STAGES = {2: (0, 1, 2), 4: (2,)}
ADAMW = OptimConfig(name="adamw", lr=1e-3, weight_decay=0.05)
ADAMW_STAGES = {2: (0, 2), 4: ()}
SMALL = {"depths": [1, 1], "widths": [16, 24], "group_widths": 8, "stem_width": 8, "stem_stride": 1, "activation": torch.nn.SiLU}
CONFIG = TrainConfig(
    recipe="tiny_swav",
    method=SwAVConfig(
        views=(View(size=12, count=2, scale=(0.5, 1.0)), View(size=8, count=1, scale=(0.2, 0.5))),
        hidden_widths=(32,),
        embedding_width=10,
        prototypes=7,
        head_bias=False,
        head_activation="silu",
        freeze_prototypes_steps=FREEZE,
        queue_length=2 * B,
        queue_start_step=2,
    ),
    model=ModelConfig(name="anynet"),
    optim=OptimConfig(name="sgd", lr=0.02, momentum=0.9, weight_decay=1e-4),
    batch_size=B,
    steps=STEPS,
)


def crops(step: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(v.count, B, 3, v.size, v.size, generator=generator).to(dtype) for v in CONFIG.method.views]


def batch_of(views: list[torch.Tensor], rows) -> Batch:
    index = torch.tensor(list(rows), dtype=torch.int64)
    return Batch([view[:, index] for view in views], index, torch.full((len(index),), -1), 0)


def build(rank: int = 0, world_size: int = 1, dtype=torch.float32) -> SwAV:
    torch.manual_seed(0)
    group = torch.distributed.group.WORLD if world_size > 1 else None
    backbone = build_backbone("anynet", group=group, **SMALL)
    return CONFIG.method.build(Ground(backbone, group, group, rank, world_size, B // world_size)).to(dtype)


def weights(method: SwAV) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in method.parameters()])


def plain_run(order=None, dtype=torch.float32):
    """Ten steps of plain torch on one process: SGD, prototypes held for FREEZE steps and normalised after every applied update."""
    method = build(dtype=dtype)
    prototypes = method.prototypes.weight
    rest = [p for p in method.parameters() if p is not prototypes]
    options = {"lr": CONFIG.optim.lr, "momentum": CONFIG.optim.momentum, "weight_decay": CONFIG.optim.weight_decay}
    optimizers = [torch.optim.SGD(rest, **options), torch.optim.SGD([prototypes], **options)]
    losses = []
    for step in range(STEPS):
        method.after_step(step)
        loss = method(batch_of(crops(step, dtype), order or range(B))).total
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        optimizers[0].step()
        if step >= FREEZE:
            optimizers[1].step()
            with torch.no_grad():
                prototypes.copy_(F.normalize(prototypes, dim=1))
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), weights(method), method


def engine_run(config: TrainConfig, ranks: distributed.Ranks, folder: Path | None = None):
    method = build(ranks.rank, ranks.world_size)
    optimizer = build_optimizer(method, config.optim)
    engine = distributed.initialize_deepspeed(method, optimizer, config, ranks.world_size)
    zero = engine.optimizer if config.zero_stage else None
    optimizer.bind(layout(method, zero), ranks.group, partitioned=zero is not None)
    own = range(ranks.rank * B // ranks.world_size, (ranks.rank + 1) * B // ranks.world_size)
    frozen = method.prototypes.weight.detach().clone()
    losses = []
    for step in range(STEPS):
        method.after_step(step)
        loss = engine(batch_of(crops(step), own)).total
        engine.backward(loss)
        engine.step()
        if ranks.group is not None:
            loss = loss.detach().clone()
            torch.distributed.all_reduce(loss)
        losses.append(loss.item() / ranks.world_size)
        if step < FREEZE:
            assert torch.equal(method.prototypes.weight, frozen), "a frozen prototype moved"
    rows = method.prototypes.weight.detach().norm(dim=1)
    if folder:
        checkpoint.save(folder, STEPS, method=method, optimizer=optimizer, ranks=ranks, meta={}, keep=1)
    return {"losses": torch.tensor(losses, dtype=torch.float64), "weights": weights(method), "rows": rows}


def on_rank(rank: int, world_size: int, folder: str) -> dict:
    ranks = distributed.Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    found = {"uneven": uneven_gradients(rank, world_size)}
    for stage in STAGES[world_size]:
        config = CONFIG.model_copy(update={"zero_stage": stage})
        found[stage] = engine_run(config, ranks, Path(folder) / f"stage{stage}")
    for stage in ADAMW_STAGES[world_size]:
        config = CONFIG.model_copy(update={"zero_stage": stage, "optim": ADAMW})
        found[f"adamw{stage}"] = engine_run(config, ranks, Path(folder) / f"adamw{stage}")
    return found


def uneven_gradients(rank: int, world_size: int) -> dict:
    """Loss and gradients in fp64 with another number of rows on every rank, one of them 0 when there are more than two."""
    torch.distributed.barrier()
    method = build(rank, world_size, torch.float64)
    bounds = {2: [0, 5, 12], 4: [0, 5, 5, 9, 12]}[world_size]
    loss = method(batch_of(crops(0, torch.float64), range(bounds[rank], bounds[rank + 1]))).total
    loss.backward()
    gradients = {name: p.grad / world_size for name, p in method.named_parameters() if p.grad is not None}
    for gradient in (*gradients.values(), total := loss.detach() / world_size):
        torch.distributed.all_reduce(gradient)
    return {"loss": total, "gradients": gradients}


@pytest.fixture(scope="module")
def plain():
    return plain_run()


@pytest.fixture(scope="module", params=[2, 4])
def several(request, tmp_path_factory):  # one spawn for each world size
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    return on_ranks(request.param, on_rank, request.param, str(folder)), folder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_the_control_run_is_calm(plain):
    losses, end, _ = plain_run(order=list(reversed(range(B))))
    assert relative(end, plain[1]) < 1e-6 and relative(losses, plain[0]) < 1e-6


def test_training_moves_the_weights(plain):
    start = weights(build())
    assert relative(plain[1], start) > 1e-3


def test_deepspeed_stages_equal_plain_torch(plain, several):
    for rank in several[0]:
        for stage in STAGES[len(several[0])]:
            assert relative(rank[stage]["losses"], plain[0]) < 1e-5, f"stage {stage}"
            assert relative(rank[stage]["weights"], plain[1]) < 1e-5, f"stage {stage}"
            torch.testing.assert_close(rank[stage]["rows"], torch.ones(CONFIG.method.prototypes), rtol=0, atol=2e-6)


def test_uneven_ranks_give_the_global_loss_and_gradient(several):
    method = build(dtype=torch.float64)
    loss = method(batch_of(crops(0, torch.float64), range(B))).total
    loss.backward()
    largest = max(p.grad.abs().max() for p in method.parameters() if p.grad is not None)
    for rank in several[0]:
        torch.testing.assert_close(rank["uneven"]["loss"], loss.detach(), rtol=1e-10, atol=0)
        for name, parameter in method.named_parameters():
            if parameter.grad is not None:
                assert (rank["uneven"]["gradients"][name] - parameter.grad).abs().max() <= 1e-9 * largest, name


def test_checkpoints_of_any_stage_and_world_load_into_one_process(plain, several):
    momenta = {}
    for stage in STAGES[len(several[0])]:
        method = build()
        optimizer = build_optimizer(method, CONFIG.optim)
        optimizer.bind(layout(method, None), None, partitioned=False)
        alone = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"))
        meta = checkpoint.load(several[1] / f"stage{stage}" / f"step_{STEPS:08d}", method=method, optimizer=optimizer, ranks=alone)
        assert meta["step"] == STEPS and method.queue_rows == method.queue.shape[1]
        assert relative(weights(method), plain[1]) < 1e-5
        mine = method.queue.double().flatten(0, 1).sort(dim=0).values
        theirs = plain[2].queue.double().flatten(0, 1).sort(dim=0).values
        assert relative(mine, theirs) < 1e-5, "the joined queue holds the same embeddings"
        momenta[stage] = torch.cat([optimizer.state[p]["momentum_buffer"].double().flatten() for p in method.parameters()])
        assert momenta[stage].norm() > 0
    first = next(iter(momenta.values()))
    assert all(relative(momentum, first) < 1e-5 for momentum in momenta.values()), "momentum differs between stages"


@pytest.mark.parametrize("several", [2], indirect=True)
def test_adamw_is_the_same_under_zero_and_counts_its_steps(several):
    ranks, folder = several
    assert relative(ranks[0]["adamw2"]["losses"], ranks[0]["adamw0"]["losses"]) < 1e-4
    for stage in ADAMW_STAGES[2]:
        method = build()
        optimizer = build_optimizer(method, ADAMW)
        optimizer.bind(layout(method, None), None, partitioned=False)
        alone = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"))
        checkpoint.load(folder / f"adamw{stage}" / f"step_{STEPS:08d}", method=method, optimizer=optimizer, ranks=alone)
        steps = {name: optimizer.state[p]["step"].item() for name, p in method.named_parameters()}
        assert steps.pop("prototypes.weight") == STEPS - FREEZE and set(steps.values()) == {STEPS}


def test_views_and_queue_are_checked():
    with pytest.raises(ValueError, match="at least 2 views"):
        SwAVConfig(views=(View(size=8, count=1, scale=(0.5, 1)),))
    with pytest.raises(ValueError, match="assign_crops"):
        SwAVConfig(assign_crops=(0, 8))
    with pytest.raises(ValueError, match="queue_length"):
        SwAVConfig(queue_length=5).build(Ground(build_backbone("anynet", **SMALL), None, None, 0, 1, 12))
