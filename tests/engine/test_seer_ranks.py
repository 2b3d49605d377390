"""Does SEER's shape train alike under every ZeRO stage, on 1, 2 and 4 real processes, with blocks kept and with blocks recomputed?"""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fuseer.engine import distributed
from fuseer.engine.config import apply_overrides
from fuseer.engine.data.view import Batch, View
from fuseer.engine.distributed import Ranks
from fuseer.engine.models.norm import BatchNorm
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import forget_gradients, gathered, layout
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.engine.run import build_method
from tests.ranks import on_ranks

STEPS, B = 10, 8
WORLDS = (1, 2, 4)
# as published, but narrow and shallow, and smooth, so that no rounding turns a unit on or off
TRUNK = {"depths": [1, 1, 1, 1], "widths": [8, 16, 24, 32], "group_widths": 8, "stem_width": 8, "activation": nn.SiLU}
SETTINGS = {
    "method.head_batch_norm": "false",
    "method.head_activation": "silu",
    "method.hidden_widths": "[32, 32]",
    "method.embedding_width": "16",
    "method.prototypes": "24",
    "method.sinkhorn_iterations": "10",
    "method.epsilon": "0.05",
    "method.freeze_prototypes_steps": "1",
    "model.name": "anynet",
    "model.recompute_min_size": "0",
    "optim.name": "lars",
    "optim.weight_decay": "1e-5",
    "optim.lr": "0.1",
    "optim.trust_coefficient": "0.01",
    "batch_size": str(B),
    "precision": "fp32",
}
VIEWS = (View(size=16, count=2, scale=(0.14, 1.0)), View(size=8, count=2, scale=(0.05, 0.14)))
# no layer is so small, or needed again so soon, that stage 3 leaves it whole; norms are
LAYERS_GO = {"stage3_param_persistence_threshold": 40, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
KEPT, AGAIN = "[]", "[1, 2, 3]"
# one process tries all; several take their time, and there kept blocks meet the extremes
KEPT_STAGES = {1: (0, 1, 2, 3), 2: (0, 3), 4: (0,)}
RUNS = {world: [(stage, AGAIN) for stage in (0, 1, 2, 3)] + [(stage, KEPT) for stage in KEPT_STAGES[world]] for world in WORLDS}


def configured(stage, recompute, world, norm_ranks):
    asked = {"zero_stage": str(stage), "model.recompute": recompute, "model.sync_norm_ranks": str(norm_ranks or (world > 1) * world)}
    config = apply_overrides(load_recipe("tiny_swav").config(), {**SETTINGS, **asked})
    method = config.method.model_copy(update={"views": VIEWS})
    return config.model_copy(update={"method": method, "model": config.model.model_copy(update={"options": TRUNK})})


def batch(step, rank, world, order):
    generator = torch.Generator().manual_seed(step)
    rows = order[rank * B // world : (rank + 1) * B // world]
    crops = [torch.randn(view.count, B, 3, view.size, view.size, generator=generator)[:, rows] for view in VIEWS]
    return Batch(crops, rows, torch.full((len(rows),), -1), 0)


def run(ranks, stage, recompute, *, order=None, norm_ranks=0, steps=STEPS):
    """Global losses of every step, the weights, this rank's statistics, and how many collectives norms and method asked for."""
    config = configured(stage, recompute, ranks.world_size, norm_ranks)
    method = build_method(config, ranks, STEPS)
    optimizer = build_optimizer(method, config.optim)
    made = distributed.deepspeed_config(config, ranks.world_size)
    made["zero_optimization"] |= LAYERS_GO
    with mock.patch.object(distributed, "deepspeed_config", lambda *_: made):
        engine = distributed.initialize_deepspeed(method, optimizer, config, ranks.world_size)
    optimizer.bind(layout(method, engine.optimizer if stage else None), ranks.group, partitioned=stage > 0)
    method.train()
    method.after_step(0)
    order, losses = torch.arange(B) if order is None else order, []
    start = weights(method)
    counted = [mock.patch.object(dist, name, wraps=getattr(dist, name)) for name in ("all_gather", "all_reduce")]
    with counted[0] as gathers, counted[1] as sums:
        for step in range(steps):
            forget_gradients(engine.optimizer)
            loss = engine(batch(step, ranks.rank, ranks.world_size, order)).total
            engine.backward(loss)
            engine.step()
            method.after_step(step + 1)
            losses.append(loss.detach())
    losses = torch.stack(losses)
    if ranks.group is not None:
        dist.all_reduce(losses)
    return {
        "losses": losses / ranks.world_size,
        "start": start,
        "weights": weights(method),
        "statistics": torch.cat([value.double().flatten() for value in method.buffers()]),
        "collectives": (gathers.call_count, sums.call_count),
        "norms": sum(isinstance(module, BatchNorm) for module in method.modules()),
    }


def weights(method):
    found = []
    for parameter in method.parameters():
        with gathered([parameter]):
            found.append(parameter.detach().flatten().clone())
    return torch.cat(found)


def on_rank(rank, world):
    os.environ["FUSEER_BACKEND"] = "reference"
    ranks = Ranks(rank, world, rank, world, torch.device("cpu"))
    found = {(stage, recompute): run(ranks, stage, recompute) for stage, recompute in RUNS[world]}
    if world == 1:
        found["control"] = run(ranks, 0, KEPT, order=torch.tensor([5, 2, 7, 0, 3, 6, 1, 4]))
    if world == 4:
        found |= {("pairs", recompute): run(ranks, 0, recompute, norm_ranks=2, steps=2) for recompute in (KEPT, AGAIN)}
    return found


@pytest.fixture(scope="module")
def found():
    """{world size: what each rank found}; one spawn each."""
    return {world: on_ranks(world, on_rank, world) for world in WORLDS}


@pytest.fixture(scope="module")
def truth(found):
    """One process without ZeRO, once the control has shown what rounding alone does to it."""
    one = found[1][0][0, KEPT]
    control = found[1][0]["control"]
    assert apart(control["losses"], one["losses"]) < 1e-6 and distance(control["weights"], one["weights"]) < 1e-6
    assert distance(one["weights"], one["start"]) > 1e-2 and one["losses"].unique().numel() == STEPS, "training moves"
    return one


def apart(losses, others):
    return ((losses - others) / others).abs().max()


def distance(a, b):
    return (a.double() - b.double()).norm() / b.double().norm()


@pytest.mark.parametrize("world", WORLDS)
def test_stages_and_ranks_train_as_one_process(found, truth, world):
    for rank in found[world]:
        for name in RUNS[world]:
            assert apart(rank[name]["losses"], truth["losses"]) < 1e-5, name
            assert distance(rank[name]["weights"], truth["weights"]) < 1e-5, name


@pytest.mark.parametrize("world", WORLDS)
def test_recomputed_blocks_change_no_bit_and_ask_for_no_collective(found, world):
    for rank in found[world]:
        for stage in KEPT_STAGES[world]:
            kept, again = rank[stage, KEPT], rank[stage, AGAIN]
            for what in ("losses", "weights", "statistics"):
                assert torch.equal(kept[what], again[what]), (stage, what)
        assert rank[0, KEPT]["collectives"] == rank[0, AGAIN]["collectives"]
        gathers, sums = rank[0, AGAIN]["collectives"]
        # of every norm one gather for each of two sizes of crop, and as many sums backward
        passes = 2 * STEPS * rank[0, KEPT]["norms"] * (world > 1)
        assert gathers == passes and sums >= passes


def test_groups_of_norms_share_their_statistics_and_no_others(found):
    for recompute in (KEPT, AGAIN):
        held = [rank["pairs", recompute]["statistics"] for rank in found[4]]
        assert torch.equal(held[0], held[1]) and torch.equal(held[2], held[3]) and not torch.equal(held[0], held[2])
        assert not torch.equal(held[0], found[4][0][0, recompute]["statistics"]), "four ranks together are another batch"
    for rank in found[4]:
        kept, again = rank["pairs", KEPT], rank["pairs", AGAIN]
        assert all(torch.equal(kept[what], again[what]) for what in ("losses", "weights", "statistics"))
        assert kept["collectives"] == again["collectives"]
