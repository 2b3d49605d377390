"""Are our RegNets those of the papers: exact counts, timm's numbers, the quantised linear rule?"""

import math

import pytest
import timm
import torch
from torch import nn

from fuseer.engine.models.regnet import (
    NAMED,
    AnyNet,
    Stage,
    anynet_stages,
    build_regnet,
    compatible_width,
    complexity,
    from_timm,
    regnet_stages,
    to_timm,
)

# name: widths, depths, parameters with a 1000-way classifier (exact, or in millions to three places), then GFLOPs and MActs with it
TABLE = {
    "regnetx_200mf": ((24, 56, 152, 368), (1, 1, 4, 7), 2.685),
    "regnetx_400mf": ((32, 64, 160, 384), (1, 2, 7, 12), 5.158),
    "regnetx_600mf": ((48, 96, 240, 528), (1, 3, 5, 7), 6.196),
    "regnetx_800mf": ((64, 128, 288, 672), (1, 3, 7, 5), 7.260),
    "regnetx_1_6gf": ((72, 168, 408, 912), (2, 4, 10, 2), 9.190),
    "regnetx_3_2gf": ((96, 192, 432, 1008), (2, 6, 15, 2), 15.297),
    "regnetx_4gf": ((80, 240, 560, 1360), (2, 5, 14, 2), 22.118),
    "regnetx_6_4gf": ((168, 392, 784, 1624), (2, 4, 10, 1), 26.209),
    "regnetx_8gf": ((80, 240, 720, 1920), (2, 5, 15, 1), 39.573),
    "regnetx_12gf": ((224, 448, 896, 2240), (2, 5, 11, 1), 46.106),
    "regnetx_16gf": ((256, 512, 896, 2048), (2, 6, 13, 1), 54.279),
    "regnetx_32gf": ((336, 672, 1344, 2520), (2, 7, 13, 1), 107.812),
    "regnety_200mf": ((24, 56, 152, 368), (1, 1, 4, 7), 3.163),
    "regnety_400mf": ((48, 104, 208, 440), (1, 3, 6, 6), 4.344),
    "regnety_600mf": ((48, 112, 256, 608), (1, 3, 7, 4), 6.055),
    "regnety_800mf": ((64, 128, 320, 768), (1, 3, 8, 2), 6.263),
    "regnety_1_6gf": ((48, 120, 336, 888), (2, 6, 17, 2), 11.202),
    "regnety_3_2gf": ((72, 216, 576, 1512), (2, 5, 13, 1), 19.436),
    "regnety_4gf": ((128, 192, 512, 1088), (2, 6, 12, 2), 20.647),
    "regnety_6_4gf": ((144, 288, 576, 1296), (2, 7, 14, 2), 30.583),
    "regnety_8gf": ((168, 448, 896, 2016), (2, 4, 10, 1), 39_180_068, 7.963, 17.97),
    "regnety_12gf": ((224, 448, 896, 2240), (2, 5, 11, 1), 51.823),
    "regnety_16gf": ((224, 448, 1232, 3024), (2, 4, 11, 1), 83_590_140, 15.912, 23.04),
    "regnety_32gf": ((232, 696, 1392, 3712), (2, 5, 12, 1), 145_046_770, 32.280, 30.26),
    "regnety_64gf": ((328, 984, 1968, 4920), (2, 5, 12, 1), 281_378_786, 64.070, 42.50),
    "regnety_128gf": ((528, 1056, 2904, 7392), (2, 7, 17, 1), 644_812_894, 127.518, 71.58),
    "regnety_256gf": ((746, 1492, 4103, 10444), (2, 7, 17, 1), 1_282_601_138, 254.385, 100.97),
    "regnety_10b": ((2020, 4040, 11110, 28280), (2, 7, 17, 1), 9_352_215_872, 1863.3, 272.70),
    "regnety_256gf_friendly": ((752, 1504, 4136, 10528), (2, 7, 17, 1), 1_303_188_514),
    "regnety_10b_friendly": ((2016, 4032, 11088, 28224), (2, 7, 17, 1), 9_315_068_788),
}
TRUNKS = {
    "regnety_8gf": 37_163_068,
    "regnety_16gf": 80_565_140,
    "regnety_32gf": 141_333_770,
    "regnety_64gf": 276_457_786,
    "regnety_128gf": 637_419_894,
    "regnety_256gf": 1_272_156_138,
    "regnety_10b": 9_323_934_872,
}
TIMM = {"regnetx_200mf": "regnetx_002", "regnety_400mf": "regnety_004", "regnety_1_6gf": "regnety_016"}
TINY = {"depths": [1, 2], "widths": [16, 32], "group_widths": 8, "stem_width": 8, "stem_stride": 1}


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_table_has_every_name():
    assert TABLE.keys() == NAMED.keys()


@pytest.mark.parametrize("name", TABLE)
def test_named_models_have_the_published_shapes_and_counts(name):
    with torch.device("meta"):
        model = build_regnet(name).eval()
    widths, depths, with_classifier, *cost = TABLE[name]
    assert tuple(stage[-1].conv3.conv.out_channels for stage in model.stages) == widths
    assert tuple(len(stage) for stage in model.stages) == depths
    assert model.width == widths[-1]
    count = parameters(model) + 1000 * model.width + 1000
    assert count == with_classifier if isinstance(with_classifier, int) else round(count / 1e6, 3) == with_classifier
    if name in TRUNKS:
        assert parameters(model) == TRUNKS[name]
    if cost:
        totals = complexity(model, torch.empty(1, 3, 224, 224, device="meta"))
        assert (totals["flops"] + 1000 * model.width + 1000) / 1e9 == pytest.approx(cost[0], abs=0.05 if name == "regnety_10b" else 5e-4)
        assert (totals["activations"] + 1000) / 1e6 == pytest.approx(cost[1], abs=5e-3)


@pytest.mark.parametrize(("ours", "theirs"), TIMM.items())
def test_equal_to_timm_with_its_weights(ours, theirs):
    torch.manual_seed(0)
    theirs = timm.create_model(theirs, num_classes=10, zero_init_last=False)
    for norm in [module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    theirs.reset_classifier(0)
    ours = build_regnet(ours)
    ours.load_state_dict(from_timm(theirs.state_dict()), strict=True)
    ours, theirs = ours.double(), theirs.double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for mode in (False, True):
        mine, truth = ours.train(mode)(images), theirs.train(mode)(images)
        assert (mine - truth).abs().max() <= 1e-12 * truth.abs().max()
    mine.square().sum().backward()
    truth.square().sum().backward()
    gradients = from_timm({key: parameter.grad for key, parameter in theirs.named_parameters()})
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert max((parameter.grad - gradients[key]).abs().max() for key, parameter in ours.named_parameters()) <= 1e-12 * largest
    back = to_timm(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(back, strict=True)


def test_from_timm_leaves_the_classifier_out():
    state = timm.create_model("regnety_002", num_classes=7).state_dict()
    assert not [key for key in from_timm(state) if "head" in key]
    assert to_timm(from_timm(state)).keys() == {key for key in state if not key.startswith("head.")}


def test_channels_last_stays_and_agrees():
    torch.manual_seed(0)
    model = build_regnet("anynet", **TINY).double()
    images = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    truth = model(images)
    model = model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    assert model.feature_map(images).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images), truth, rtol=1e-12, atol=1e-13)


def test_feature_map_pooled_is_the_output_in_fp32():
    model = build_regnet("anynet", **TINY)
    images = torch.randn(2, 3, 21, 17)
    with torch.autocast("cpu", torch.bfloat16):
        features, feature_map = model.eval()(images), model.feature_map(images)
    assert features.dtype == torch.float32 and feature_map.dtype == torch.bfloat16
    # stem 1, stages 2 and 2: 21 -> 11 -> 6, 17 -> 9 -> 5
    assert feature_map.shape == (2, 32, 6, 5) and features.shape == (2, model.width)
    torch.testing.assert_close(features, feature_map.float().mean((2, 3)))


def test_every_stage_has_its_own_numbers():
    model = build_regnet(
        "anynet",
        depths=[1, 2, 1],
        widths=[16, 24, 32],
        group_widths=[4, 12, 8],
        bottleneck_ratios=[1.0, 0.5, 2.0],
        se_ratios=[0.0, 0.5, 0.25],
        strides=[1, 2, 1],
        stem_width=12,
        stem_stride=2,
    )
    blocks = [block for stage in model.stages for block in stage]
    assert [block.conv2.conv.out_channels for block in blocks] == [16, 12, 12, 64]
    assert [block.conv2.conv.groups for block in blocks] == [4, 1, 1, 8]
    assert [block.conv2.conv.stride[0] for block in blocks] == [1, 2, 1, 1]
    # squeezed width comes from the block's input: 0.5 * 16, 0.5 * 24, 0.25 * 24
    assert [block.se.fc1.out_channels for block in blocks[1:]] == [8, 12, 6] and isinstance(blocks[0].se, nn.Identity)
    assert [isinstance(block.shortcut, nn.Identity) for block in blocks] == [False, False, True, False]
    assert model.feature_map(torch.randn(2, 3, 28, 28)).shape == (2, 32, 7, 7)


def test_initialisation_is_that_of_the_paper():
    torch.manual_seed(0)
    model = build_regnet("regnety_400mf", zero_init_last=True)
    block = model.stages[3][1]
    for conv in (model.stem.conv, block.conv2.conv, block.conv3.conv):
        fan_out = conv.kernel_size[0] ** 2 * conv.out_channels
        # the std of n samples is known to 1 / sqrt(2n): four of those
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=4 / math.sqrt(2 * conv.weight.numel()))
    assert block.conv3.bn.weight.abs().max() == 0 and block.conv2.bn.weight.min() == 1 and block.shortcut.__class__ is nn.Identity
    assert build_regnet("anynet", **TINY).stages[0][0].conv3.bn.weight.min() == 1


def test_activation_and_norm_options_reach_every_block():
    model = build_regnet("anynet", activation=nn.SiLU, **TINY)
    kinds = {type(module) for module in model.modules()}
    assert nn.SiLU in kinds and nn.ReLU not in kinds
    assert all(module.inplace for module in model.modules() if isinstance(module, nn.SiLU))


def test_quantised_linear_rule_worked_by_hand():
    # regnety_256gf: 640, 640 * 2.53 -> 1616, 640 * 2.53^2 -> 4096, 640 * 2.53^3 -> 10368, each to the nearest multiple of 373
    stages = regnet_stages(*NAMED["regnety_256gf"], se_ratio=0.25)
    assert [(s.width, s.group_width, s.depth) for s in stages] == [(746, 373, 2), (1492, 373, 7), (4103, 373, 17), (10444, 373, 1)]
    assert compatible_width(10368, 1.0, 373) == (10444, 373)
    assert compatible_width(80, 1.0, 120) == (80, 80)
    assert compatible_width(20, 1.0, 8) == (16, 8)  # 2.5 groups: half to even
    assert compatible_width(30, 4.0, 6) == (30, 6)
    assert compatible_width(100, 0.5, 16) == (96, 16)


def test_named_rows_take_overrides():
    with torch.device("meta"):
        model = build_regnet("regnety_256gf", group_width=376, strides=[1, 2, 2, 2], se_ratio=0.0)
    assert all(stage[0].conv2.conv.out_channels % 376 == 0 for stage in model.stages)
    assert model.stages[0][0].conv2.conv.stride == (1, 1)
    assert not [key for key, _ in model.named_parameters() if ".se." in key]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build_regnet("regnetz_1gf"), "regnety_256gf.*got 'regnetz_1gf'"),
        (lambda: Stage(1, 100, 16), r"got 100 \* 1.0 and 16; the nearest that fits is width=96, group_width=16"),
        (lambda: Stage(0, 16, 16), "depth must be positive; got 0"),
        (lambda: Stage(1, 16, 16, se_ratio=-0.1), "se_ratio.*got -0.1"),
        (lambda: anynet_stages([1, 2], [8, 16, 24]), r"widths must be one value or one per stage \(2\)"),
        (lambda: regnet_stages(4, 10, 8.0, 2.0, 8), "multiple of 8.*got 4, 10"),
        (lambda: regnet_stages(4, 16, 8.0, 1.0, 8), "wm > 1"),
        (lambda: AnyNet([]), "at least one stage"),
        (lambda: build_regnet("anynet", depths=[1], widths=[8], stem_stride=4), "stem_stride 1 or 2"),
        (lambda: build_regnet("anynet", depths=[1], widths=[8])(torch.zeros(2, 1, 8, 8)), r"\[B, 3, H, W\]; got \[2, 1, 8, 8\]"),
    ],
)
def test_refuses_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
