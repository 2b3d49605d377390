"""Does every name give a network with features [B, width], ours first, timm's else, and a wrong one the nearest?"""

import pytest
import torch
from torch import nn

from fuseer.engine.config import ModelConfig, TrainConfig
from fuseer.engine.models.backbone import OURS, TimmBackbone, build_backbone, initial_backbone
from fuseer.engine.models.norm import BatchNorm
from fuseer.engine.models.regnet import AnyNet


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "test_vit"])
def test_timm_models_offer_features_and_width(name):
    backbone = build_backbone(name, pretrained=False)
    assert isinstance(backbone, TimmBackbone)
    size = 160 if name == "test_vit" else 64
    features = backbone.eval()(torch.randn(2, 3, size, size))
    assert features.shape == (2, backbone.width)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())


def test_timm_norms_are_ours():
    backbone = build_backbone("resnet10t")
    assert any(isinstance(module, BatchNorm) for module in backbone.modules())


def test_our_names_build_ours_with_options():
    backbone = build_backbone("regnety_200mf", stem_stride=1, strides=[1, 2, 2, 2])
    assert isinstance(backbone, AnyNet) and backbone.width == 368
    assert backbone.feature_map(torch.randn(2, 3, 28, 28)).shape == (2, 368, 4, 4)
    tiny = build_backbone("anynet", depths=[1], widths=[16], stem_width=8)
    assert tiny(torch.randn(2, 3, 16, 16)).shape == (2, 16)
    assert build_backbone("regnet", depth=4, w0=8, wa=8.0, wm=2.0, group_width=8).width == 32


def test_no_name_of_ours_hides_one_of_timm():
    import timm

    assert not set(OURS) & set(timm.list_models())


@pytest.mark.parametrize(
    ("name", "words"),
    [("regnety_200fm", "'regnety_200fm'; the nearest names are regnety_200mf"), ("resnet5", "resnet50"), ("?", "nearest names are none")],
)
def test_unknown_name_is_told_the_nearest(name, words):
    with pytest.raises(ValueError, match=words):
        build_backbone(name)


def test_initial_backbone_is_decided_by_the_seed_alone():
    options = {"depths": [1], "widths": [16], "stem_width": 8}

    def weights(seed, draws_before):
        torch.randn(draws_before)
        backbone = initial_backbone(TrainConfig.model_construct(seed=seed, model=ModelConfig(name="anynet", options=options)))
        return torch.cat([parameter.flatten() for parameter in backbone.parameters()])

    assert torch.equal(weights(3, 1), weights(3, 100)) and not torch.equal(weights(3, 1), weights(4, 1))


@pytest.mark.parametrize("name", ["anynet", "resnet18"])
def test_channels_last_changes_the_layout_and_not_the_features(name):
    options = {"depths": [1, 1], "widths": [16, 32], "stem_width": 8} if name == "anynet" else {}
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        backbone = build_backbone(name, channels_last=channels_last, **options).double()
        seen = []
        first = next(module for module in backbone.modules() if isinstance(module, torch.nn.Conv2d))
        first.register_forward_hook(lambda module, given, out, seen=seen: seen.append(out))
        found.append(backbone(images))
        assert seen[0].is_contiguous(memory_format=torch.channels_last) == channels_last
        assert first.weight.is_contiguous(), "DeepSpeed views weights as bytes"
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
