"""Are losses, gradients and statistics of recomputed blocks those of kept ones, bit for bit, and is less kept?"""

import copy
import functools
import gc
import weakref
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fuseer.engine.config import ModelConfig, TrainConfig, apply_overrides
from fuseer.engine.models import recompute
from fuseer.engine.models.backbone import build_backbone, initial_backbone
from fuseer.engine.models.norm import BatchNorm, recomputation, replace_batch_norm
from fuseer.engine.models.recompute import RecomputedStage
from fuseer.engine.recipes.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"depths": [1, 3, 2], "widths": [8, 16, 24], "group_widths": 8, "stem_width": 8, "stem_stride": 1}
VIT = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
SIZES = (16, 8)
COMPILED = {"depths": [1], "widths": [8], "group_widths": 8, "stem_width": 8}


def crops(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(4, 3, size, size, generator=generator) for size in SIZES]


def built(name="anynet", options=TINY, splits=1, **how):
    torch.manual_seed(0)
    net = build_backbone(name, **options, **how)
    return replace_batch_norm(net, splits=splits) if splits > 1 else net


def trained(net, steps=2, dtype=None):
    """Losses, gradients and whole state of a few steps, every one with a forward for each size of crop and one backward."""
    losses, gradients = [], []
    for step in range(steps):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = sum(net(images).float().square().mul(torch.arange(net.width)).mean() for images in crops(step))
        net.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.01 * parameter.grad
    return losses + gradients + [value.double().flatten() for value in net.state_dict().values()]


def same(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("wanted", ["all", (2,), ((1,), (2, 3), ()), ((), (2,), (1, 2))], ids=str)
def test_chunks_of_a_regnet_are_bitwise_those_kept(wanted):
    plain, again = built(), built(recompute=wanted)
    assert list(plain.state_dict()) == list(again.state_dict())
    assert same(trained(plain), trained(again))
    assert again.stages[1][0].conv1.bn.num_batches_tracked == 4, "two steps of two sizes"


@pytest.mark.parametrize(
    "case",
    [
        {"dtype": torch.bfloat16},
        {"splits": 2},
        {"name": "resnet10t", "options": {}},
        {"name": "vit_tiny", "options": VIT},
        {"name": "vit_tiny", "options": {**VIT, "drop_path_rate": 0.5}},
    ],
    ids=["bf16 autocast", "slices", "timm's ResNet", "ViT", "drop-path"],
)
def test_other_networks_and_precisions_too(case):
    case = dict(case)
    dtype = case.pop("dtype", None)
    found = []
    for wanted in ((), "all"):
        net = built(**case, recompute=wanted)
        torch.manual_seed(1)
        found.append(trained(net, dtype=dtype))
    assert same(*found)
    assert sum(isinstance(module, RecomputedStage) for module in net.modules()) == {"resnet10t": 4, "vit_tiny": 1}.get(case.get("name"), 3)


def kept_bytes(net, images):
    """Bytes of everything saved for backward, each storage once, parameters left out."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(images).sum()
    for parameter in net.parameters():
        seen.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(seen.values()), loss


def test_less_is_kept_and_only_of_images_large_enough():
    images, small = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)
    plain, _ = kept_bytes(built(), images)
    whole, _ = kept_bytes(built(recompute="all"), images)
    assert whole < 0.4 * plain
    last, _ = kept_bytes(built(recompute=(3,)), images)
    assert whole < last < plain
    sized = built(recompute="all", recompute_min_size=32)
    assert kept_bytes(sized, images)[0] == whole and kept_bytes(sized, small)[0] == kept_bytes(built(), small)[0]
    assert same(trained(built()), trained(built(recompute="all", recompute_min_size=16)))
    twin = copy.deepcopy(sized)
    assert kept_bytes(twin, images)[0] == whole
    with torch.no_grad():
        assert kept_bytes(built(recompute="all"), images)[0] == 0


def test_nothing_outlives_its_graph():
    net = built(recompute="all")
    alive = []

    def observed():
        passes = recomputation()
        alive.extend(map(weakref.ref, passes))
        return passes

    gc.disable()
    try:
        with mock.patch.object(recompute, "recomputation", observed):
            forgotten = net(crops(0)[0])
            used = net(crops(0)[1]).sum()
            used.backward()
        assert len(alive) == 2 * 2 * 6
        del forgotten, used
        assert not any(ref() for ref in alive)
    finally:
        gc.enable()


def test_a_graph_kept_for_two_backwards_is_recomputed_for_each():
    found = []
    for wanted in ((), "all"):
        net = built(recompute=wanted)
        loss = net(crops(0)[0]).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([p.grad for p in net.parameters()] + [value for value in net.state_dict().values()])
    assert same(*found)


def test_nested_calls_move_the_statistics_once():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4), nn.SiLU())
    kept, again = block, copy.deepcopy(block)
    images = crops(0)[0]
    kept(images).sin().sum().backward()

    def called(function, x):
        return checkpoint(function, x, use_reentrant=False, context_fn=recomputation)

    # the sine's input makes the outer call pass through the inner one again
    called(lambda x: called(again, x).sin(), images).sum().backward()
    assert same(list(kept.state_dict().values()), list(again.state_dict().values()))
    assert same([p.grad for p in kept.parameters()], [p.grad for p in again.parameters()])


def test_evaluation_reads_the_statistics_and_leaves_them():
    net = built(recompute="all")
    trained(net)
    before = copy.deepcopy(net.state_dict())
    net.eval()(crops(0)[0]).sum().backward()
    assert same(list(before.values()), list(net.state_dict().values()))


@pytest.mark.parametrize(
    ("name", "wanted", "words"),
    [
        ("anynet", (1, 4), "names stage 4; this backbone has stages 1 to 3"),
        ("anynet", ((1,), (4,), ()), r"3 stages of \[1, 3, 2\] blocks; got \[\[1\], \[4\], \[\]\]"),
        ("anynet", ((1,), (2,)), "each of 3 stages"),
        ("regnety_002", "all", "RegNet has none of these"),
    ],
)
def test_what_a_backbone_has_not_is_refused_in_words(name, wanted, words):
    with pytest.raises(ValueError, match=words):
        build_backbone(name, recompute=wanted, **(TINY if name == "anynet" else {}))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model.recompute": "some"}, "model.recompute: give all, the stages as in"),
        ({"model.recompute": "[2, [3]]"}, "give all, the stages"),
        ({"model.recompute": "[[3, 2]]"}, "give all, the stages"),
        ({"model.recompute": "[0]"}, "give all, the stages"),
        ({"model.recompute_min_size": "96"}, "give that too"),
        ({"model.recompute": "all", "model.compile_blocks": "true"}, "goes without recompute"),
        ({"model.compile_blocks": "true", "zero_stage": "3"}, "zero_stage 0 to 2"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=words):
        apply_overrides(load_recipe("tiny_swav").config(), settings)


def test_settings_reach_the_backbone_and_the_run_folder():
    config = load_recipe("tiny_swav").config()
    asked = {"model.recompute": "[[1], [], [], [1]]", "model.recompute_min_size": "20"}
    config = apply_overrides(config, {**asked, "model.name": "regnety_200mf", "model.options": "{}"})
    assert ModelConfig(**config.model.model_dump(mode="json")) == config.model
    stages = [stage for stage in initial_backbone(config).stages if isinstance(stage, RecomputedStage)]
    assert [(stage.ends, stage.min_size) for stage in stages] == [((1,), 20), ((1,), 20)]


def test_compiled_blocks_train_as_those_that_are_not():
    """Without Inductor, which takes a minute to compile this: what is asked is whether blocks with our norms can be traced whole."""
    traced = functools.partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True)
    with mock.patch.object(nn.Module, "compile", traced):
        config = TrainConfig.model_construct(seed=0, model=ModelConfig(name="anynet", options=COMPILED, compile_blocks=True))
        compiled = initial_backbone(config)
    config = TrainConfig.model_construct(seed=0, model=ModelConfig(name="anynet", options=COMPILED))
    plain = initial_backbone(config)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    assert all(block._compiled_call_impl is not None for stage in compiled.stages for block in stage)
    for one, other in zip(trained(plain), trained(compiled), strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()
