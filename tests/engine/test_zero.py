"""Is LARS under ZeRO 0 to 3, on real processes, the one that sees whole tensors?"""

import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from fuseer.engine import distributed, partitions
from fuseer.engine.config import OptimConfig, TrainConfig, apply_overrides
from fuseer.engine.data.view import Batch
from fuseer.engine.distributed import Ranks
from fuseer.engine.methods.method import Method
from fuseer.engine.optim import LARS, VARIANTS, build_optimizer
from fuseer.engine.partitions import forget_gradients, gathered, layout
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.engine.run import build_method
from fuseer.engine.teacher import Teachers
from fuseer.engine.train import _whole_backbone
from tests.ranks import on_ranks

STEPS, B = 10, 12
LR, WD, TRUST, MOMENTUM = 0.2, 0.05, 0.1, 0.9
NOTHING_STAYS = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
CONFIG = load_recipe("tiny_swav").config().model_copy(update={"batch_size": B, "precision": "fp32"})
# of Net: names of parameters of at most one dimension, which mocov3, simclr, byol and paws have in mind by other rules
THIN = {"conv.bias", "norm.weight", "norm.bias", "body.bias", "unused.bias", "scale"}
SPARED = {
    "larc": set(), "mocov3": THIN, "simclr": THIN - {"scale"}, "byol": THIN - {"scale"}, "paws": THIN - {"scale", "norm.weight"},
}  # fmt: skip


class Net(nn.Module):
    """944 numbers in shapes that no number of ranks divides: a layer used by nobody, one used now and then, a frozen one, one of unit
    rows, one of one element."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.body, self.unused = nn.Conv2d(3, 5, 3), nn.GroupNorm(1, 5), nn.Linear(45, 11), nn.Linear(3, 3)
        self.seldom = nn.Linear(11, 11, bias=False)
        self.frozen = nn.Parameter(torch.randn(7, 11))
        self.prototypes = nn.Parameter(F.normalize(torch.randn(7, 11), dim=1))
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.frozen.frozen = self.prototypes.unit_rows = True

    def forward(self, images, labels, seldom):
        z = F.silu(self.body(F.silu(self.norm(self.conv(images))).flatten(1))) * self.scale
        z = z + self.seldom(z) if seldom else z
        return F.cross_entropy(z @ self.prototypes.T, labels) + 0.1 * (z @ self.frozen.detach().T).square().mean()


class Unaware(LARS):
    """Takes every tensor that it is handed for a layer."""

    def _update(self):
        with mock.patch.object(self, "partitioned", False):
            super()._update()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(B, 3, 5, 5, generator=generator), torch.randint(0, 7, (B,), generator=generator)


def shares(step: int, ranks: int, accumulation: int, order=None) -> list[list[tuple[torch.Tensor, torch.Tensor, bool]]]:
    """For each rank its micro-batches of the batch of a step; in odd steps the last one uses `seldom`."""
    rows = torch.arange(B) if order is None else torch.tensor(order)
    images, labels = batch(step)
    used = [step % 2 == 1 and micro == accumulation - 1 for micro in range(accumulation)]
    return [[(images[m], labels[m], use) for m, use in zip(own.chunk(accumulation), used, strict=True)] for own in rows.chunk(ranks)]


def plain_run(variant: str, ranks: int = 1, accumulation: int = 1, order=None) -> dict[str, dict[str, torch.Tensor]]:
    """LARS on whole tensors in one process, on the mean of the gradients that so many ranks would have; 0 where nothing was used."""
    net = Net()
    momenta = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step in range(STEPS):
        total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        for micro in (micro for own in shares(step, ranks, accumulation, order) for micro in own):
            net.zero_grad()
            net(*micro).backward()
            for name, p in net.named_parameters():
                total[name] += 0 if p.grad is None else p.grad
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name != "frozen":
                    plain_update(variant, p, total[name] / (ranks * accumulation), momenta[name], name in SPARED[variant])
            net.prototypes.div_(net.prototypes.double().norm(dim=1, keepdim=True).float())
    return {"weights": {name: p.detach() for name, p in net.named_parameters()}, "momenta": momenta}


def plain_update(variant: str, p, g, m, spared: bool) -> None:
    w_norm, g_norm, both = (x.double().square().sum().sqrt() for x in (p, g, g.double() + WD * p.double()))
    wd, rate = (0.0 if spared else WD), torch.ones((), dtype=torch.float64)
    if not spared and variant in ("larc", "paws"):
        if w_norm > 0 and g_norm > 0:
            rate = TRUST * w_norm / (g_norm + WD * w_norm + 1e-8)
        else:
            wd = 0.0
    elif not spared and w_norm > 0 and both > 0:
        rate = TRUST * w_norm / both
    d = (g + wd * p) * rate.float()
    inside = variant in ("simclr", "paws")
    m.copy_(MOMENTUM * m + (LR * d if inside else d))
    p.copy_(p - m if inside else p - LR * m)


def started(ranks: Ranks, stage: int, variant: str = "larc", *, accumulation=1, kind=LARS, precision="fp32", **zero):
    """(engine, optimizer) on a new Net under a stage."""
    net = Net()
    optimizer = build_optimizer(
        net, OptimConfig(name="lars", variant=variant, lr=LR, weight_decay=WD, trust_coefficient=TRUST, momentum=MOMENTUM)
    )
    optimizer.__class__ = kind
    config = CONFIG.model_copy(update={"zero_stage": stage, "accumulation_steps": accumulation, "precision": precision})
    return initialized(net, optimizer, config, ranks, **zero), optimizer


def initialized(module: nn.Module, optimizer, config: TrainConfig, ranks: Ranks, **zero):
    """The engine, with `zero` told to DeepSpeed; under stage 3 no parameter is so small, or needed again so soon, that it stays whole."""
    made = distributed.deepspeed_config(config, ranks.world_size)
    made["zero_optimization"] |= {**NOTHING_STAYS, **zero}
    with mock.patch.object(distributed, "deepspeed_config", lambda *_: made):
        return distributed.initialize_deepspeed(module, optimizer, config, ranks.world_size)


def engine_run(ranks: Ranks, stage: int, *options, accumulation=1, thrown_at=None, skip=None, backend="reference", **more):
    """Ten steps; at `thrown_at` there is one more with rows of its own, which `skip` or an infinite gradient on rank 0 has thrown away."""
    os.environ["FUSEER_BACKEND"] = backend
    engine, optimizer = started(ranks, stage, *options, accumulation=accumulation, **more)
    optimizer.bind(layout(engine.module, engine.optimizer if stage else None), ranks.group, partitioned=stage > 0)
    momenta = {p.name for p in optimizer.pieces if optimizer.state[p.holder]["momentum_buffer"].any()}
    assert not momenta and len(optimizer.state) >= (3 if stage else len(list(engine.module.parameters()))), "momenta exist, and are 0"
    for step in range(STEPS):
        if step == thrown_at:
            images, labels, _ = shares(99, ranks.world_size, 1)[ranks.rank][0]
            images[0, 0, 0, 0] = float("inf") if skip is None and ranks.rank == 0 else 0.0
            optimizer.skip = skip
            one_step(engine, [(images, labels, True)])
            assert optimizer.thrown if not stage or skip is not None else not engine.was_step_applied()
            optimizer.skip = None
        one_step(engine, shares(step, ranks.world_size, accumulation)[ranks.rank])
        assert engine.was_step_applied() and not optimizer.thrown
    return {"weights": whole_weights(engine.module), "momenta": whole_momenta(engine.module, optimizer)}


def one_step(engine, micro_batches) -> None:
    """As train.py makes it."""
    forget_gradients(engine.optimizer)
    for micro in micro_batches:
        engine.backward(engine(*micro))
        engine.step()


def whole_weights(net: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in net.named_parameters():
        with gathered([parameter]):
            found[name] = parameter.detach().clone()
    return found


def whole_momenta(net: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in net.named_parameters():
        found[name] = torch.zeros(partitions.shape_of(parameter))
        for piece in optimizer.pieces_of.get(name, []):
            part = piece.of(optimizer.state[piece.holder]["momentum_buffer"])
            found[name].view(-1).narrow(0, piece.offset, piece.numel).copy_(part)
        if optimizer.partitioned:
            dist.all_reduce(found[name])
    return found


def method_run(ranks: Ranks, stage: int, name: str) -> dict:
    """Losses of every step and the weights after five steps of a method, as train.py runs it."""
    os.environ["FUSEER_BACKEND"] = "reference"
    settings = {key: value for key, value in {**SMALL, **METHODS[name], "zero_stage": str(stage)}.items() if value is not None}
    config = apply_overrides(load_recipe(name).config(), settings)
    method = build_method(config, ranks, 5)
    optimizer, teachers = build_optimizer(method, config.optim), Teachers(method)
    engine = initialized(method, optimizer, config, ranks)
    optimizer.bind(layout(method, engine.optimizer if stage else None), ranks.group, partitioned=stage > 0)
    teachers.follow(optimizer, ranks.group)
    method.after_step(0)
    losses = []
    for step in range(5):
        loss = engine(batch_of(method, step, ranks.rank)).total
        engine.backward(loss)
        engine.step()
        teachers.update(step + 1)
        method.after_step(step + 1)
        losses.append(loss.item())
    weights = whole_weights(method)
    whole = _whole_backbone(SimpleNamespace(method=method, config=config, ranks=ranks))
    if ranks.is_first:
        # the other ranks are elsewhere
        assert whole(batch_of(method, 0, 0).crops[0][0]).isfinite().all()
        assert all(torch.equal(p, weights[f"backbone.{name}"]) for name, p in whole.named_parameters())
    return {"losses": losses, "weights": weights, "momenta": whole_momenta(method, optimizer)}


def batch_of(method: Method, step: int, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(2 * step + rank)
    crops = [torch.randn(view.count, 4, 3, view.size, view.size, generator=generator) for view in method.views]
    return Batch(crops, torch.arange(4) + 4 * rank, torch.full((4,), -1), 0)


def refusals(ranks: Ranks) -> dict[str, str]:
    """What layout() says on this rank of partitions that are not as it thinks."""
    said = {}

    def refused(what: str, engine) -> None:
        with pytest.raises(RuntimeError) as error:
            layout(engine.module, engine.optimizer)
        said[what] = str(error.value)

    engine, _ = started(ranks, 2, round_robin_gradients=True)
    refused("round robin", engine)
    engine.optimizer.round_robin_gradients = False
    refused("round robin unnamed", engine)
    engine, _ = started(ranks, 1)
    if ranks.rank == 1:
        # the last rank that holds anything of it forgets the layer
        engine.module.body.weight._hp_mapping = None
    refused("a piece is missing on one rank", engine)
    engine, _ = started(ranks, 3)
    if ranks.rank == 1:
        moved = engine.optimizer.grad_position[engine.optimizer.get_param_id(engine.module.body.weight)]
        moved[1] += 1
    refused("a shard is elsewhere on one rank", engine)
    engine.optimizer.offload_optimizer, engine.optimizer.partial_offload = True, 0.5
    refused("half offloaded", engine)
    return said


RUNS = {
    1: {
        **{f"{variant} Z0": (0, variant) for variant in VARIANTS},
        **{f"{variant} Z{stage}": (stage, variant) for variant in ("larc", "mocov3") for stage in (1, 2, 3)},
    },
    2: {
        **{f"larc Z{stage}": (stage, "larc") for stage in (0, 1, 2, 3)},
        **{f"mocov3 Z{stage}": (stage, "mocov3") for stage in (0, 1, 3)},
    },
    3: {f"larc Z{stage}": (stage, "larc") for stage in (0, 1, 2, 3)},
    4: {f"larc Z{stage}": (stage, "larc") for stage in (0, 1, 2, 3)},
}
METHODS = {
    "tiny_swav": {"method.prototypes": "6", "method.freeze_prototypes_steps": "1", "method.queue_length": "16"},
    "tiny_simclr": {},
    "tiny_moco_v2": {"method.queue_length": "40", "method.norm_images": "4"},
    "tiny_moco_v3": {"method.predictor_widths": "[16]"},
    "tiny_mae": {
        "method.hidden_widths": None,
        "method.embedding_width": None,
        "method.decoder_width": "12",
        "model.options": '{"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "start": "mae"}',
    },
}
SMALL = {
    "method.hidden_widths": "[16]",
    "method.embedding_width": "8",
    "model.options": '{"depths": [1], "widths": [16], "group_widths": 8, "stem_width": 8, "stem_stride": 2}',
    "batch_size": "8",
    "precision": "fp32",
    "optim.name": "lars",
    "optim.weight_decay": "1e-4",
}


def on_rank(rank: int, world: int) -> dict:
    ranks = Ranks(rank, world, rank, world, torch.device("cpu"))
    found = {name: engine_run(ranks, *options) for name, options in RUNS[world].items()}
    if world == 2:
        for stage in (0, 1, 2, 3):
            found[f"accumulated Z{stage}"] = engine_run(ranks, stage, accumulation=2)
            found[f"overflow Z{stage}"] = engine_run(ranks, stage, thrown_at=4)
            found[f"skip Z{stage}"] = engine_run(ranks, stage, thrown_at=4, skip=torch.tensor(1.0))
        for stage in (1, 3):
            found[f"unaware Z{stage}"] = engine_run(ranks, stage, kind=Unaware)
        found["sub-groups Z3"] = engine_run(ranks, 3, sub_group_size=100)
        found["as dispatched Z0"], found["as dispatched Z3"] = (engine_run(ranks, stage, backend="") for stage in (0, 3))
        found["refusals"] = refusals(ranks)
        found |= {(name, stage): method_run(ranks, stage, name) for name in METHODS for stage in (0, 3)}
        # last: DeepSpeed's autocast is a switch of the process
        for stage in (0, 1, 3):
            found[f"autocast Z{stage}"] = engine_run(ranks, stage, precision="bf16-autocast")
    return found


@pytest.fixture(scope="module")
def found():
    """{world size: what each rank found}; one spawn each."""
    return {world: on_ranks(world, on_rank, world) for world in RUNS}


@pytest.fixture(scope="module")
def plain():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every rank has: a sum over two threads rounds otherwise
    yield {
        **{(variant, ranks): plain_run(variant, ranks) for variant in VARIANTS for ranks in (1, 2, 3, 4)},
        "accumulated": plain_run("larc", 2, 2),
    }
    torch.set_num_threads(threads)


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    a, b = (torch.cat([tensors[name].double().flatten() for name in sorted(tensors)]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


def differing(a: dict, b: dict) -> list[str]:
    """The weights and momenta in which two runs are not the same bits."""
    return [f"{kind} {name}" for kind in ("weights", "momenta") for name in a[kind] if not torch.equal(a[kind][name], b[kind][name])]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_control_is_calm_and_training_moves(plain, variant):
    control = plain_run(variant, order=list(reversed(range(B))))
    assert relative(control["weights"], plain[variant, 1]["weights"]) < 1e-6
    start = dict(Net().named_parameters())
    moved = {name for name, w in plain[variant, 1]["weights"].items() if (w - start[name]).norm() > 1e-2 * start[name].norm()}
    # without a gradient only the ratios of |g + wd w| let decay move a weight
    still = {"frozen", "unused.bias"} | ({"unused.weight"} if VARIANTS[variant].denominator == "sum" else set())
    assert start.keys() - moved == still


def test_one_rank_and_two_are_the_plain_loop_bitwise(plain, found):
    for world in (1, 2):
        for name, (_, variant) in RUNS[world].items():
            for rank in found[world]:
                assert differing(rank[name], plain[variant, world]) == [], f"{name} on {world} ranks"


def test_three_and_four_ranks_are_the_plain_loop(plain, found):
    for world in (3, 4):
        for name, (_, variant) in RUNS[world].items():
            for rank in found[world]:
                for kind in ("weights", "momenta"):
                    assert relative(rank[name][kind], plain[variant, world][kind]) < 5e-5, f"{kind} of {name} on {world} ranks"
                assert differing(rank[name], found[world][0][name]) == [], "ranks hold the same weights"


def test_accumulated_gradients_are_those_of_the_whole_batch(plain, found):
    for rank in found[2]:
        for stage in (0, 1, 2, 3):
            for kind in ("weights", "momenta"):
                assert relative(rank[f"accumulated Z{stage}"][kind], plain["accumulated"][kind]) < 5e-5


def test_one_ratio_a_partition_is_found_out(plain, found):
    for stage in (1, 3):
        assert relative(found[2][0][f"unaware Z{stage}"]["weights"], plain["larc", 2]["weights"]) > 1e-2


def test_groups_cut_into_sub_groups_change_nothing(plain, found):
    assert differing(found[2][0]["sub-groups Z3"], plain["larc", 2]) == []


def test_the_fastest_backend_is_as_exact(plain, found):
    for stage in (0, 3):
        assert relative(found[2][0][f"as dispatched Z{stage}"]["weights"], plain["larc", 2]["weights"]) < 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_under_stage_3_as_without(found, name):
    for rank in found[2]:
        assert len(set(rank[name, 0]["losses"])) == 5 and rank[name, 3]["losses"] == rank[name, 0]["losses"]
        assert differing(rank[name, 3], rank[name, 0]) == []


def test_under_autocast_the_stages_agree_bitwise(found):
    for stage in (1, 3):
        assert differing(found[2][0][f"autocast Z{stage}"], found[2][0]["autocast Z0"]) == []
    assert relative(found[2][0]["autocast Z0"]["weights"], found[2][0]["larc Z0"]["weights"]) > 1e-5, "it does round to bf16"


@pytest.mark.parametrize("thrown", ["overflow", "skip"])
def test_a_step_thrown_away_leaves_weights_and_momenta_as_they_were(found, thrown):
    for rank in found[2]:
        for stage in (0, 1, 2, 3):
            assert differing(rank[f"{thrown} Z{stage}"], rank[f"larc Z{stage}"]) == []


def test_a_layout_that_is_not_as_thought_is_refused_on_every_rank(found):
    for rank in found[2]:
        said = rank["refusals"]
        assert "must not run with round_robin_gradients=true" in said["round robin"]
        assert "do not hold their parameter's values" in said["round robin unnamed"]
        assert "0 pieces do not hold" in said["a piece is missing on one rank"]
        assert "1 pieces" in said["a shard is elsewhere on one rank"]
        assert "offload_optimizer.ratio below 1" in said["half offloaded"]
