"""Does a checkpoint that some ranks wrote under one ZeRO stage land whole on other ranks under another?"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fuseer.engine import checkpoint, distributed
from fuseer.engine.config import MethodConfig, ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.distributed import Ranks
from fuseer.engine.methods.method import Loss
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import gathered, layout
from fuseer.engine.teacher import Teachers
from tests.ranks import on_ranks

B, CPU = 12, torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)
OPTIMIZERS = {"sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq"], "lars": ["momentum_buffer"]}
PACE = {
    "sgd": {"lr": 0.02, "weight_decay": 0.0},
    "adamw": {"lr": 0.02, "weight_decay": 0.0},
    # what no forward uses stays all the same: larc does not decay a layer without gradient
    "lars": {"lr": 0.5, "weight_decay": 0.01, "trust_coefficient": 0.05},
}
# (ranks, stage, steps done at the end): each goes on from the checkpoint of the one before
CHAIN = [(4, 1, 3), (2, 3, 5), (3, 2, 6)]


class Toy(nn.Module):
    """What a layout can hold: shapes that no number of ranks divides, tagged, untrained and unused parameters, rows apart on each rank."""

    teacher_of = {"key": "body"}
    sharded = {"queue": 0}

    def __init__(self, ranks: Ranks):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.SiLU(), nn.Linear(13, 11))
        self.head = nn.Linear(11, 5, bias=False)
        self.head.weight.unit_rows = True
        self.body[0].bias.requires_grad_(False)
        self.frozen, self.unused = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(9))
        self.frozen.frozen = True
        self.frozen.data[0, 0] = -0.0
        rows = B // ranks.world_size
        self.register_buffer("queue", torch.arange(float(B)).view(B, 1)[ranks.rank * rows :][:rows].clone())
        self.register_buffer("seen", torch.tensor(float(ranks.rank)))

    def teacher_momentum(self, step: int) -> float:
        return 0.6 + 0.01 * step

    def forward(self, batch: torch.Tensor) -> Loss:
        with torch.no_grad():
            keys = self.key(batch.flip(1))
        loss = (self.body(batch) - keys).square().mean() + self.head(self.body(batch)).square().mean()
        return Loss(loss + 0 * self.frozen.detach().sum(), {})

    def counters(self) -> dict[str, int]:
        return {"rows": 5}

    def load_counters(self, counters: dict[str, int], same_world: bool) -> None:
        self.taken = counters, same_world


def config_of(name: str, stage: int) -> TrainConfig:
    optim = OptimConfig(name=name, **PACE[name])
    return TrainConfig(
        recipe="toy", method=MethodConfig(), model=ModelConfig(name="none"), optim=optim, batch_size=B, steps=9, zero_stage=stage
    )


def whole(run: dict) -> dict[str, torch.Tensor]:
    """Everything by name as DeepSpeed itself puts it together (it does so on all ranks): not by the code under test."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    method, optimizer, stage = run["method"], run["optimizer"], run["stage"]
    found = {}
    if stage in (1, 2):
        run["engine"].optimizer._lazy_init_hp_params_optimizer_state()  # else it knows of no state before its first step
    for name, p in method.named_parameters():
        with gathered([p]):
            found[f"runs/{name}"] = p.detach().clone()
        if p.requires_grad and stage:
            found[f"master/{name}"] = safe_get_full_fp32_param(p).clone().view(p.ds_shape if stage == 3 else p.shape)
        for key in run["states"] if p.requires_grad else ():
            state = safe_get_full_optimizer_state(p, key) if stage else optimizer.state[p][key]
            found[f"{key}/{name}"] = state.clone().view(found[f"runs/{name}"].shape)
    for name, p in run["teachers"].named_parameters():
        with gathered([p]):
            found[f"teacher/{name}"] = p.detach().clone()
    return found


def started(name: str, stage: int, ranks: Ranks) -> dict:
    method = Toy(ranks)
    config = config_of(name, stage)
    optimizer, teachers = build_optimizer(method, config.optim), Teachers(method)
    engine = distributed.initialize_deepspeed(method, optimizer, config, ranks.world_size)
    zero = engine.optimizer if stage else None
    optimizer.bind(layout(method, zero), ranks.group, partitioned=zero is not None)
    teachers.follow(optimizer, ranks.group)
    return {"method": method, "optimizer": optimizer, "teachers": teachers, "engine": engine, "stage": stage, "states": OPTIMIZERS[name]}


def go_on(run: dict, ranks: Ranks, first: int, last: int) -> None:
    rows = B // ranks.world_size
    for step in range(first, last):
        batch = torch.randn(B, 7, generator=torch.Generator().manual_seed(step))[ranks.rank * rows :][:rows]
        run["engine"].backward(run["engine"](batch).total)
        run["engine"].step()
        run["teachers"].update(step + 1)


def link(ranks: Ranks, folder: Path, name: str, at: int) -> dict:
    """One part of the chain: what was there at its beginning and at its end, and the method afterwards."""
    _, stage, last = CHAIN[at]
    first = CHAIN[at - 1][2] if at else 0
    run = started(name, stage, ranks)
    kept = {key: run[key] for key in ("method", "optimizer", "teachers")}
    if at:
        checkpoint.load(folder / name / f"step_{first:08d}", ranks=ranks, **kept)
    found = {"taken": whole(run), "queue": run["method"].queue.clone(), "told": getattr(run["method"], "taken", None)}
    # what is frozen makes no step
    found["step"] = max((state["step"].item() for state in run["optimizer"].state.values() if "step" in state), default=None)
    go_on(run, ranks, first, last)
    found["left"] = whole(run)
    checkpoint.save(folder / name, last, ranks=ranks, meta={}, keep=9, **kept)
    return found


def on_rank(rank: int, world_size: int, folder: str, at: int) -> dict:
    made = distributed.deepspeed_config
    # DeepSpeed keeps small parameters whole under stage 3, which here would be all
    few_whole = {"stage3_param_persistence_threshold": 20}
    distributed.deepspeed_config = lambda *given: (whole := made(*given)) | {"zero_optimization": whole["zero_optimization"] | few_whole}
    return {name: link(Ranks(rank, world_size, rank, world_size, CPU), Path(folder), name, at) for name in OPTIMIZERS}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    return [on_ranks(ranks, on_rank, ranks, str(folder), at) for at, (ranks, _, _) in enumerate(CHAIN)], folder


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("at", range(1, len(CHAIN)))
def test_all_lands_bitwise_on_other_ranks_under_another_stage(chain, name, at):
    left = chain[0][at - 1][0][name]["left"]
    for rank in chain[0][at]:
        taken = rank[name]["taken"]
        assert {key.partition("/")[0] for key in taken} >= {"runs", "teacher", *OPTIMIZERS[name]}
        for key, tensor in taken.items():
            assert torch.equal(tensor, left[key]), key
            if key.startswith("master/"):
                assert torch.equal(tensor, taken[key.replace("master", "runs", 1)]), "what runs is what is updated"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_agree_and_move(chain, name):
    for ranks in chain[0]:
        for rank in ranks:
            assert rank[name]["left"].keys() == ranks[0][name]["left"].keys()
            assert all(torch.equal(tensor, ranks[0][name]["left"][key]) for key, tensor in rank[name]["left"].items())
        taken, left = ranks[0][name]["taken"], ranks[0][name]["left"]
        still = {key for key in left if torch.equal(taken[key], left[key])}
        untrained = ("body.0.bias", "key.0.bias", "frozen", "unused")
        assert "runs/frozen" in still and all(key.endswith(untrained) for key in still), still


@pytest.fixture
def plain():
    """One process without DeepSpeed that has taken a checkpoint back."""

    def taken(place: Path, name: str) -> dict:
        method = Toy(ALONE)
        optimizer, teachers = build_optimizer(method, config_of(name, 0).optim), Teachers(method)
        optimizer.bind(layout(method, None), None, partitioned=False)
        run = {"method": method, "optimizer": optimizer, "teachers": teachers}
        checkpoint.load(place, ranks=ALONE, **run)
        return run | {"engine": Plain(method, optimizer), "stage": 0, "states": OPTIMIZERS[name]}

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield taken
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_lands_bitwise_in_one_process_without_zero(chain, plain, name):
    for (_, _, last), ranks in zip(CHAIN, chain[0], strict=True):
        run, left = plain(chain[1] / name / f"step_{last:08d}", name), ranks[0][name]["left"]
        for key, tensor in whole(run).items():
            assert torch.equal(tensor, left[key]), key
        steps = {state["step"].item() for state in run["optimizer"].state.values() if "step" in state}
        assert steps == ({0, last} if name == "adamw" else set()), "what is frozen makes no step"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_one_process_would(chain, plain, name):
    """One process takes the first checkpoint and makes the same steps; the whole vector, not each tensor."""
    run = plain(chain[1] / name / "step_00000003", name)
    for at in range(1, len(CHAIN)):
        go_on(run, ALONE, CHAIN[at - 1][2], CHAIN[at][2])
        left = chain[0][at][0][name]["left"]
        for kind, module in (("runs", run["method"]), ("teacher", run["teachers"])):
            ours = torch.cat([p.detach().flatten() for _, p in module.named_parameters()]).double()
            theirs = torch.cat([left[f"{kind}/{key}"].flatten() for key, _ in module.named_parameters()]).double()
            assert (ours - theirs).norm() < 1e-5 * ours.norm(), (at, kind)
    torch.testing.assert_close(run["method"].head.weight.norm(dim=1), torch.ones(5))


class Plain:
    """The face of a DeepSpeed engine over plain torch."""

    def __init__(self, method, optimizer):
        self.method, self.optimizer = method, optimizer

    def __call__(self, batch):
        return self.method(batch)

    def backward(self, loss):
        self.optimizer.zero_grad()
        loss.backward()

    def step(self):
        self.optimizer.step()


def test_rows_apart_buffers_and_counts_follow(chain):
    for (ranks, _, _), found in zip(CHAIN[1:], chain[0][1:], strict=True):
        for rank, of in enumerate(found):
            rows = B // ranks
            assert of["sgd"]["queue"].flatten().tolist() == list(range(rank * rows, (rank + 1) * rows))
            assert of["sgd"]["told"] == ({"rows": 5}, False)
    assert [rank["adamw"]["step"] for found in chain[0] for rank in found] == 4 * [0] + 2 * [3] + 3 * [5]
    first, second = (checkpoint.read(chain[1] / "sgd" / f"step_{CHAIN[at][2]:08d}", checkpoint.MODEL) for at in (0, 1))
    assert first["seen"] == 1.5, "the mean of 0, 1, 2, 3"
    assert second["frozen"][0, 0].signbit(), "put together from shards and still -0.0"


def test_the_file_tells_who_held_what(chain):
    for ranks, _, last in CHAIN:
        text = (chain[1] / "sgd" / f"step_{last:08d}" / "meta.json").read_text()
        tables = json.loads(text)["tensors"]
        shapes = {name: p.shape for name, p in Toy(ALONE).named_parameters() if p.requires_grad}
        for kind, prefix in ((checkpoint.MODEL, ""), (checkpoint.OPTIMIZER, "momentum_buffer/")):
            for name, shape in shapes.items():
                rows = tables[kind][prefix + name]["pieces"]
                held = sorted(at for _, offset, numel in rows for at in range(offset, offset + numel))
                assert held == list(range(shape.numel())) and {row[0] for row in rows} <= set(range(ranks))
            sizes = [sum(n for facts in tables[kind].values() for at, _, n in facts["pieces"] if at == rank) for rank in range(ranks)]
            assert all(sizes), "every rank writes"
        rows = [facts["pieces"] for facts in tables[checkpoint.MODEL].values()]
        assert any(len(pieces) > 1 for pieces in rows), "something lies on several ranks"
        assert f"[{', '.join(map(str, tables[checkpoint.MODEL]['unused']['pieces'][0]))}]" in text, "a piece is one line"
