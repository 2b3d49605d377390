"""Is SimCLR the published method, and the same on one process and on several?"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fuseer.engine.data.view import Batch, View
from fuseer.engine.methods.method import Ground
from fuseer.engine.methods.simclr import SimCLR, SimCLRConfig
from fuseer.engine.models.backbone import build_backbone
from tests.ranks import on_ranks

B = 12
BOUNDS = {2: [0, 5, 12], 3: [0, 7, 7, 12], 4: [0, 5, 6, 9, 12]}
SMALL = {"depths": [1, 1], "widths": [16, 24], "group_widths": 8, "stem_width": 8, "stem_stride": 1, "activation": nn.SiLU}
CONFIG = SimCLRConfig(views=(View(size=12, count=2, scale=(0.5, 1.0)),), hidden_widths=(20,), embedding_width=10, temperature=0.3)


def build(rank: int = 0, world_size: int = 1, config: SimCLRConfig = CONFIG) -> SimCLR:
    torch.manual_seed(0)
    group = torch.distributed.group.WORLD if world_size > 1 else None
    backbone = build_backbone("anynet", group=group, **SMALL)
    method = config.build(Ground(backbone, group, group, rank, world_size, B // world_size)).double()
    for layer in method.head.layers:  # BatchNorm undoes the scale, but its eps would swallow what small weights give
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
    return method


def batch_of(rows) -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, B, 3, 12, 12, generator=generator, dtype=torch.float64)
    index = torch.tensor(list(rows), dtype=torch.int64)
    return Batch([images[:, index]], index, torch.full((len(index),), -1), 0)


def gradients(method: SimCLR, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    method.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in method.named_parameters()}


def official(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    """The published objective on one replica: masked similarities to the own view, similarities to the other one, labels, two sums."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    n, itself = len(z1), torch.eye(len(z1), dtype=z1.dtype) * 1e9
    labels = torch.arange(n)
    first = torch.cat([z1 @ z2.T / temperature, z1 @ z1.T / temperature - itself], 1)
    second = torch.cat([z2 @ z1.T / temperature, z2 @ z2.T / temperature - itself], 1)
    return F.cross_entropy(first, labels) + F.cross_entropy(second, labels)


def on_rank(rank: int, world_size: int) -> dict:
    method = build(rank, world_size)
    bounds = BOUNDS[world_size]
    found = {}
    even = [row * B // world_size for row in range(world_size + 1)]
    for name, cuts in (("even", even), ("uneven", bounds)):
        method.same_rows = name == "even"
        loss = method(batch_of(range(cuts[rank], cuts[rank + 1]))).total
        found[name] = {"loss": loss.detach() / world_size, "gradients": gradients(method, loss)}
        for tensor in (found[name]["loss"], *found[name]["gradients"].values()):
            torch.distributed.all_reduce(tensor)
        for gradient in found[name]["gradients"].values():
            gradient /= world_size
        found[name]["std"] = method.diagnostics()["embedding_std"]
    return found


@pytest.fixture(scope="module", params=[2, 3, 4])
def several(request):
    return on_ranks(request.param, on_rank, request.param)


def test_several_processes_give_the_global_loss_and_gradient(several):
    method = build()
    loss = method(batch_of(range(B))).total
    truth = gradients(method, loss)
    largest = max(gradient.abs().max() for gradient in truth.values())
    assert largest > 1e-3
    for rank in several:
        for found in rank.values():
            torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-10, atol=0)
            assert found["gradients"].keys() == truth.keys()
            for name, gradient in truth.items():
                assert (found["gradients"][name] - gradient).abs().max() <= 1e-9 * largest, name
            torch.testing.assert_close(found["std"], method.diagnostics()["embedding_std"], rtol=1e-5, atol=0)


def test_loss_and_gradient_are_the_published_ones():
    method, twin = build(), build()
    batch = batch_of(range(B))
    found = method(batch).total
    z1, z2 = twin.head(twin.backbone(batch.crops[0].flatten(0, 1))).chunk(2)
    expected = official(z1, z2, CONFIG.temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found, expected = gradients(method, found), gradients(twin, expected)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-12 * largest, name


class Pixels(nn.Module):
    """The first two pixels as features: lets a test choose the embeddings."""

    width = 2

    def forward(self, images):
        return images.flatten(1)[:, :2]


def of_embeddings(z1, z2, temperature: float) -> tuple[SimCLR, Batch]:
    z = torch.tensor([z1, z2], dtype=torch.float64)
    N = z.shape[1]
    method = CONFIG.model_copy(update={"temperature": temperature}).build(Ground(Pixels(), None, None, 0, 1, N))
    method.head = nn.Identity()
    crops = F.pad(z, (0, 1)).view(2, N, 3, 1, 1)
    return method, Batch([crops], torch.arange(N), torch.full((N,), -1), 0)


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 3.039674), (0.5, 2.504917), (1.0, 2.751179)])
def test_oracle(temperature, expected):
    method, batch = of_embeddings([[1, 0], [0.6, 0.8], [0, 1]], [[0.8, 0.6], [0, 1], [-0.6, 0.8]], temperature)
    assert abs(method(batch).total.item() - expected) < 1e-6


def test_chance_is_the_loss_of_equal_embeddings():
    method, batch = of_embeddings([[0.6, 0.8]] * 5, [[3.0, 4.0]] * 5, 0.1)
    torch.testing.assert_close(method(batch).total.item(), method.chance_loss(), rtol=1e-12, atol=0)
    assert method.diagnostics()["embedding_std"] < 1e-3
    spread, batch = of_embeddings([[1, 0], [0, 1]], [[-1, 0], [0, -1]], 0.1)
    spread(batch)
    torch.testing.assert_close(spread.diagnostics()["embedding_std"].item(), 1.0, rtol=1e-6, atol=0)
    published = SimCLRConfig().build(Ground(Pixels(), None, None, 0, 32, 128))
    assert abs(published.chance_loss() - 18.0216) < 1e-4 and abs(published.chance_loss() - 2 * math.log(8191)) < 1e-12


def test_the_published_head():
    """Linear without bias, BatchNorm, ReLU; the last BatchNorm scales and does not shift; weights N(0, 0.01²)."""
    torch.manual_seed(0)
    config = SimCLRConfig(hidden_widths=(64, 64), embedding_width=16)
    head = config.build(Ground(build_backbone("anynet", **SMALL), None, None, 0, 1, B)).head
    kinds = ["FP32Linear", "BatchNorm", "ReLU"] * 2 + ["FP32Linear", "BatchNorm"]
    assert [type(layer).__name__ for layer in head.layers] == kinds
    linear = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    assert [layer.weight.shape for layer in linear] == [(64, 24), (64, 64), (16, 64)] and all(layer.bias is None for layer in linear)
    assert all(abs(layer.weight.std() / 0.01 - 1) < 0.1 for layer in linear)
    norms = [layer for layer in head.layers if type(layer).__name__ == "BatchNorm"]
    assert [norm.bias is not None for norm in norms] == [True, True, False] and all(norm.weight is not None for norm in norms)


def test_head_and_loss_stay_float32_under_autocast():
    method = build().float()
    batch = batch_of(range(B))
    batch = Batch([batch.crops[0].float()], batch.samples, batch.labels, 0)
    twin = copy.deepcopy(method)
    features = []
    twin.backbone.register_forward_hook(lambda module, given, out: features.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(batch).total
        twin(batch)
    z1, z2 = twin.head(features[0].float()).double().chunk(2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), official(z1, z2, CONFIG.temperature), rtol=1e-5, atol=0)


@pytest.mark.parametrize("views", [(View(size=8, count=1, scale=(0.5, 1)),), (View(size=8, count=3, scale=(0.5, 1)),)])
def test_other_numbers_of_views_are_refused(views):
    with pytest.raises(ValueError, match="2 views of one size"):
        SimCLRConfig(views=views)


def test_views_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match=r"got \[\(1, 8\), \(1, 12\)\]"):
        SimCLRConfig(views=tuple(View(size=size, count=1, scale=(0.5, 1)) for size in (8, 12)))
