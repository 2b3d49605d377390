"""Are MoCo v1, v2 and v3 the published methods, the same on one process and on several, and is the leak of BatchNorm stopped?"""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fuseer.engine import checkpoint, distributed
from fuseer.engine.config import OptimConfig
from fuseer.engine.data.view import Batch, View
from fuseer.engine.methods import moco
from fuseer.engine.methods.method import Ground, Method
from fuseer.engine.methods.moco import MoCoConfig, MoCoV3Config, queue_views, shuffled_order, symmetric_views
from fuseer.engine.models.backbone import build_backbone
from fuseer.engine.models.norm import replace_batch_norm
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import layout
from fuseer.engine.teacher import Teachers
from tests.ranks import on_ranks

B, SLICE, STEPS = 24, 2, 3
UNEVEN = {2: [0, 11, 24], 3: [0, 13, 13, 24], 4: [0, 10, 11, 15, 24]}
SMALL = {"depths": [1, 1], "widths": [16, 24], "group_widths": 8, "stem_width": 8, "stem_stride": 1, "activation": nn.SiLU}
PAIR = {"views": (View(size=8, count=1, scale=(0.5, 1.0)), View(size=8, count=1, scale=(0.5, 1.0), solarize=0.2))}
QUEUE = {"embedding_width": 10, "queue_length": 40, "norm_images": SLICE, "teacher_momentum": 0.9, **PAIR}
CONFIGS = {
    "v1": MoCoConfig(hidden_widths=(), temperature=0.07, **QUEUE),
    "v2": MoCoConfig(hidden_widths=(20,), **QUEUE),
    "v3": MoCoV3Config(hidden_widths=(20,), embedding_width=10, predictor_widths=(14,), predictor_last_norm=True, temperature=0.5, **PAIR),
}
SGD = OptimConfig(name="sgd", lr=0.05, momentum=0.9)


def build(name: str, rank: int = 0, world_size: int = 1) -> Method:
    """The method in fp64, its teacher a little behind, so that queries and keys are told apart."""
    torch.manual_seed(0)
    group = torch.distributed.group.WORLD if world_size > 1 else None
    norms = group if name == "v3" else None
    method = CONFIGS[name].build(Ground(build_backbone("anynet", group=norms, **SMALL), group, norms, rank, world_size, B // world_size))
    method = method.double()
    method.teachers = [Teachers(method)]
    generator = torch.Generator().manual_seed(1)
    for parameter in [*method.key_backbone.parameters(), *method.key_head.parameters()]:
        parameter += 0.1 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return method


def batch_of(rows, step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(step)
    index = torch.tensor(list(rows), dtype=torch.int64)
    views = [torch.randn(1, B, 3, 8, 8, generator=generator, dtype=torch.float64)[:, index] for _ in range(2)]
    return Batch(views, 1000 * step + index, torch.full((len(index),), -1), step)


def calm(method: Method) -> Method:
    """Queue methods with BatchNorm at its running statistics, for batches that no slices divide."""
    if isinstance(method, moco.MoCo):
        method.backbone.eval()
        method.key_backbone.eval()
    return method


def gradients(method: Method, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    method.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in method.named_parameters() if parameter.grad is not None}


def train(method: Method, own: range, world_size: int = 1):
    """Three steps of SGD on global gradients; the losses, and the optimizer for the checkpoint."""
    optimizer = build_optimizer(method, SGD)
    optimizer.bind(layout(method, None), None, partitioned=False)
    losses = []
    for step in range(STEPS):
        loss = method(batch_of(own, step)).total
        method.zero_grad()
        loss.backward()
        total = loss.detach() / world_size
        if world_size > 1:
            torch.distributed.all_reduce(total)
        for parameter in method.parameters():
            if world_size > 1:
                torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world_size
        optimizer.step()
        method.teachers[0].update(step + 1)
        losses.append(total)
    return torch.stack(losses), optimizer


def on_rank(rank: int, world_size: int, folder: str) -> dict:
    ranks = distributed.Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    even, cuts = [row * B // world_size for row in range(world_size + 1)], UNEVEN[world_size]
    found = {}
    for name in CONFIGS:
        for kind, bounds in (("even", even), ("uneven", cuts)):
            method = build(name, rank, world_size)
            method.same_rows = kind == "even"
            if kind == "uneven":
                calm(method)
            batch = batch_of(range(bounds[rank], bounds[rank + 1]))
            loss = method(batch).total
            grads = gradients(method, loss)
            for tensor in (total := loss.detach() / world_size, *grads.values()):
                torch.distributed.all_reduce(tensor)
            found[name, kind] = {"loss": total, "gradients": {key: gradient / world_size for key, gradient in grads.items()}}
            found[name, kind]["std"] = method.diagnostics()["embedding_std"]
            if name == "v2":
                found[kind, "order"] = shuffled_order(batch, method.group, [b - a for a, b in zip(bounds, bounds[1:], strict=False)], "cpu")
        method = build(name, rank, world_size)
        losses, optimizer = train(method, range(even[rank], even[rank + 1]), world_size)
        found[name, "trained"] = {
            "losses": losses,
            "state": {key: value for key, value in method.state_dict().items() if "running" not in key},
        }
        place = Path(folder) / name
        checkpoint.save(place, STEPS, method=method, optimizer=optimizer, ranks=ranks, meta={}, keep=1, teachers=method.teachers[0])
    return found


@pytest.fixture(scope="module", params=[2, 3, 4])
def several(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    return on_ranks(request.param, on_rank, request.param, str(folder)), folder


@pytest.fixture(scope="module")
def trained():
    """One process after three steps, for each version."""
    found = {}
    for name in CONFIGS:
        method = build(name)
        losses, _ = train(method, range(B))
        found[name] = losses, method
    return found


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize("name", CONFIGS)
def test_several_processes_give_the_global_loss_and_gradient(several, name, kind):
    """With whole batches BatchNorm trains: slices of the shuffled batch are the same wherever they are computed."""
    method = build(name)
    if kind == "uneven":
        calm(method)
    loss = method(batch_of(range(B))).total
    truth = gradients(method, loss)
    largest = max(gradient.abs().max() for gradient in truth.values())
    assert largest > 1e-3
    for rank in several[0]:
        found = rank[name, kind]
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-10, atol=0)
        assert found["gradients"].keys() == truth.keys()
        for key, gradient in truth.items():
            assert (found["gradients"][key] - gradient).abs().max() <= 1e-9 * largest, key
        torch.testing.assert_close(found["std"], method.diagnostics()["embedding_std"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_training_and_queue_are_the_same_and_survive_another_world_size(several, trained, name):
    losses, method = trained[name]
    for rank in several[0]:
        torch.testing.assert_close(rank[name, "trained"]["losses"], losses, rtol=1e-8, atol=0)
        for key, value in rank[name, "trained"]["state"].items():
            torch.testing.assert_close(value, method.state_dict()[key], rtol=1e-7, atol=1e-9, msg=key)
    resumed = build(name)
    optimizer = build_optimizer(resumed, SGD)
    optimizer.bind(layout(resumed, None), None, partitioned=False)
    alone = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"))
    place = several[1] / name / f"step_{STEPS:08d}"
    checkpoint.load(place, method=resumed, optimizer=optimizer, ranks=alone, teachers=resumed.teachers[0])
    ahead, following = copy.deepcopy(method), resumed
    ahead.key_backbone, ahead.key_head = copy.deepcopy(method.key_backbone), copy.deepcopy(method.key_head)
    expected = ahead(batch_of(range(B), STEPS)).total
    torch.testing.assert_close(following(batch_of(range(B), STEPS)).total, expected, rtol=1e-7, atol=0)
    if name != "v3":
        torch.testing.assert_close(following.queue.rows, ahead.queue.rows, rtol=1e-6, atol=1e-9)
        assert following.queue.pointer == ahead.queue.pointer == (STEPS + 1) * B % 40


def test_the_order_is_one_permutation_for_all_ranks(several):
    batch = batch_of(range(B))
    order = shuffled_order(batch, None, [B], "cpu")
    assert torch.equal(order.sort().values, torch.arange(B)) and not torch.equal(order, torch.arange(B))
    for rank in several[0]:
        assert torch.equal(rank["even", "order"], order) and torch.equal(rank["uneven", "order"], order)


def test_the_order_is_new_for_other_epochs_and_samples_and_needs_no_history():
    batch = batch_of(range(B))
    later = Batch(batch.crops, batch.samples, batch.labels, 1)
    others = Batch(batch.crops, batch.samples + 1, batch.labels, 0)
    orders = [shuffled_order(b, None, [B], "cpu") for b in (batch, later, others, batch)]
    assert torch.equal(orders[0], orders[3])
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    repeated = Batch(batch.crops, torch.zeros(B, dtype=torch.int64), batch.labels, 0)
    assert torch.equal(shuffled_order(repeated, None, [B], "cpu").sort().values, torch.arange(B)), "a sample may come twice"


def test_keys_come_back_in_the_order_of_their_images():
    method, batch = calm(build("v2")), batch_of(range(B))
    own, keys = method._keys(batch.crops[1][0], batch)
    assert torch.equal(own, keys)
    torch.testing.assert_close(keys, method.key_head(method.key_backbone(batch.crops[1][0])), rtol=1e-12, atol=1e-14)


def official_queue(method, batch: Batch, order: torch.Tensor) -> torch.Tensor:
    """The published step on B / SLICE devices: each normalises its own images, keys are shuffled over devices, the queue is cloned."""
    q_net, q_head, k_net, k_head = (
        replace_batch_norm(copy.deepcopy(net)) for net in (method.backbone, method.head.layers, method.key_backbone, method.key_head.layers)
    )
    x_q, x_k, devices = batch.crops[0][0], batch.crops[1][0], B // SLICE
    q = F.normalize(torch.cat([q_head(q_net(x)) for x in x_q.view(devices, SLICE, 3, 8, 8)]), dim=1)
    with torch.no_grad():
        gathered = torch.cat([k_head(k_net(x_k[idx])) for idx in order.view(devices, SLICE)])
        k = F.normalize(gathered, dim=1)[torch.argsort(order)]
    l_pos = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    l_neg = torch.einsum("nc,ck->nk", q, method.queue.rows.clone().detach().T)
    logits = torch.cat([l_pos, l_neg], dim=1) / method.config.temperature
    loss = F.cross_entropy(logits, torch.zeros(B, dtype=torch.long))
    return (
        loss,
        {f"{net}.{key}": p for net, module in (("backbone", q_net), ("head.layers", q_head)) for key, p in module.named_parameters()},
        k,
    )


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_queue_loss_gradient_and_queue_are_the_published_ones(name):
    method, batch = build(name), batch_of(range(B))
    before = method.queue.rows.clone()
    expected, parameters, keys = official_queue(method, batch, shuffled_order(batch, None, [B], "cpu"))
    found = method(batch).total
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(method.queue.rows, torch.cat([keys, before[B:]]), rtol=1e-10, atol=1e-12)
    expected.backward()
    found = gradients(method, found)
    largest = max(parameter.grad.abs().max() for parameter in parameters.values())
    assert found.keys() == parameters.keys()
    for key, parameter in parameters.items():
        assert (found[key] - parameter.grad).abs().max() <= 1e-11 * largest, key


def test_the_symmetric_loss_and_gradient_are_the_published_ones():
    method, twin, batch = build("v3"), build("v3"), batch_of(range(B))
    x1, x2 = batch.crops[0][0], batch.crops[1][0]
    tau = method.config.temperature

    def contrastive(q, k):
        logits = torch.einsum("nc,mc->nm", F.normalize(q, dim=1), F.normalize(k, dim=1)) / tau
        return F.cross_entropy(logits, torch.arange(B)) * (2 * tau)

    q1, q2 = (twin.predictor.layers(twin.head.layers(twin.backbone(x))) for x in (x1, x2))
    with torch.no_grad():
        k1, k2 = (twin.key_head.layers(twin.key_backbone(x)) for x in (x1, x2))
    expected = contrastive(q1, k2) + contrastive(q2, k1)
    found = method(batch).total
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)
    found, expected = gradients(method, found), gradients(twin, expected)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert found.keys() == expected.keys() == dict(method.named_parameters()).keys()
    for key, gradient in expected.items():
        assert (found[key] - gradient).abs().max() <= 1e-11 * largest, key


def slice_means(batch: Batch, images: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [slices, C] that the first BatchNorm of backbone and key backbone take, for equal networks and equal views."""
    config = CONFIGS["v2"].model_copy(update={"norm_images": images})
    method = config.build(Ground(build_backbone("anynet", **SMALL), None, None, 0, 1, B)).double()
    Teachers(method)
    seen = []
    for net in (method.backbone, method.key_backbone):
        norm = next(module for module in net.modules() if hasattr(module, "running_mean"))
        norm.register_forward_hook(lambda module, given, out: seen.append(given[0].detach()))
    method(Batch([batch.crops[0]] * 2, batch.samples, batch.labels, batch.epoch))
    query, key = (x.unflatten(0, (-1, images)).mean((1, 3, 4)) for x in seen)
    return query, key


def test_without_the_shuffle_the_statistics_tell_query_and_key(monkeypatch):
    query, key = slice_means(batch_of(range(B)))
    typical = torch.pdist(query).mean()
    assert torch.cdist(key, query).min() > 0.1 * typical, "a slice of keys has the statistics of a slice of queries"
    monkeypatch.setattr(moco, "shuffled_order", lambda batch, group, counts, device: torch.arange(B))
    query, key = slice_means(batch_of(range(B)))
    torch.testing.assert_close(query, key, rtol=1e-12, atol=1e-14)


def test_the_queue_stands_still_outside_training():
    method = build("v2").eval()
    before = method.queue.rows.clone()
    method(batch_of(range(B)))
    assert torch.equal(method.queue.rows, before) and method.queue.pointer == 0


def test_chance_losses():
    ground = Ground(build_backbone("anynet", **SMALL), None, None, 0, 16, 256)
    assert abs(MoCoConfig().build(ground).chance_loss() - 11.0904) < 1e-4
    assert abs(MoCoV3Config().build(ground).chance_loss() - 4 * math.log(4096)) < 1e-12
    for name in CONFIGS:  # all embeddings the same: what the loss then is
        method = build(name)
        same = F.normalize(torch.ones(B, 10, dtype=torch.float64), dim=1)
        module = method.predictor if name == "v3" else method.head
        module.forward = lambda x, same=same: same
        method.key_head.forward = lambda x, same=same: same
        if name != "v3":
            method.queue.rows.copy_(same[:1].expand(40, 10))
        torch.testing.assert_close(method(batch_of(range(B))).total.item(), method.chance_loss(), rtol=1e-12, atol=0)
        assert method.diagnostics()["embedding_std"] < 1e-3


def test_momentum_is_constant_or_grows_to_one_along_half_a_cosine():
    ground = Ground(build_backbone("anynet", **SMALL), None, None, 0, 1, B, total_steps=100)
    assert [CONFIGS["v2"].build(ground).teacher_momentum(step) for step in (1, 50, 100)] == [0.9] * 3
    found = [MoCoV3Config().build(ground).teacher_momentum(step) for step in (0, 50, 100)]
    assert found == pytest.approx([0.99, 0.995, 1.0], abs=1e-12)
    held = MoCoV3Config(momentum_cosine=False, teacher_momentum=0.996).build(ground)
    assert [held.teacher_momentum(step) for step in (0, 100)] == [0.996] * 2


def test_the_published_heads():
    def shapes(head):
        return [(type(layer).__name__, getattr(layer, "bias", None) is not None) for layer in head.layers]

    backbone = build_backbone("anynet", **SMALL)
    ground = Ground(backbone, None, None, 0, 1, 256)
    linear, norm, relu = ("FP32Linear", True), ("BatchNorm", True), ("ReLU", False)
    assert shapes(MoCoConfig(hidden_widths=()).build(ground).head) == [linear]
    assert shapes(MoCoConfig().build(ground).head) == [linear, relu, linear]
    bare, plain = ("FP32Linear", False), ("BatchNorm", False)
    v3 = MoCoV3Config().build(ground)
    assert shapes(v3.head) == [bare, norm, relu, bare, plain] and shapes(v3.predictor) == [bare, norm, relu, bare]
    vit = MoCoV3Config(hidden_widths=(4096, 4096), predictor_last_norm=True).build(ground)
    assert shapes(vit.head) == [bare, norm, relu] * 2 + [bare, plain] and shapes(vit.predictor) == [bare, norm, relu, bare, plain]
    assert vit.head.layers[-1].weight is None and vit.predictor.dims == (256, 4096, 256)


def test_the_published_views():
    (view,) = queue_views()
    assert (view.count, view.scale, view.hue, view.blur) == (2, (0.2, 1.0), 0.1, 0.5)
    first, second = symmetric_views(0.08)
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert first.scale == second.scale == (0.08, 1.0) and first.count == second.count == 1


def test_refuses_in_words():
    backbone = build_backbone("anynet", **SMALL)
    with pytest.raises(ValueError, match="2 views of an image; got 1"):
        MoCoConfig(views=(View(size=8, count=1, scale=(0.5, 1)),))
    with pytest.raises(ValueError, match="norm_images must divide .* 24; got 32"):
        MoCoConfig().build(Ground(backbone, None, None, 0, 1, 24))
    with pytest.raises(ValueError, match="sync_norm_ranks must be 0"):
        CONFIGS["v2"].build(Ground(backbone, None, object(), 0, 1, B))
