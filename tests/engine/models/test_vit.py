"""Are tokens those of a vision transformer, positions those of the paper, frozen patches frozen, and the start MoCo v3's?"""

import math

import pytest
import torch
from torch import nn

from fuseer.engine.config import OptimConfig
from fuseer.engine.models.backbone import build_backbone
from fuseer.engine.models.vit import NAMED, ViT, build_vit, sincos_positions
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import layout

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4}


def tiny(**options) -> ViT:
    torch.manual_seed(0)
    return build_vit("vit_tiny", **{**TINY, **options})


def images(size: int = 12) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_positions_are_the_oracle():
    found = sincos_positions(2, 2, 8, dtype=torch.float64)
    expected = [
        [0, 0, 1, 1, 0, 0, 1, 1],
        [0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1],
        [0, 0, 1, 1, 0.841471, 0.01, 0.540302, 0.99995],
        [0.841471, 0.01, 0.540302, 0.99995, 0.841471, 0.01, 0.540302, 0.99995],
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    wide = sincos_positions(2, 3, 8)
    assert torch.equal(wide[:3, 4:], wide[:1, 4:].expand(3, 4)), "a row shares its height"
    assert torch.equal(wide[[0, 3], :4], wide[:1, :4].expand(2, 4)), "a column shares its place"
    with pytest.raises(ValueError, match="multiple of 4; got 10"):
        sincos_positions(2, 2, 10)


def test_is_timms_transformer_with_these_positions():
    """timm's own forward, given the same weights and the positions as its parameter, is the independent answer."""
    import timm

    ours = tiny().double()
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=12, **TINY).double()
    state = ours.model.state_dict()
    positions = torch.cat([torch.zeros(1, 16, dtype=torch.float64), sincos_positions(3, 3, 16, dtype=torch.float64)])
    theirs.load_state_dict({**state, "pos_embed": positions[None]})
    torch.testing.assert_close(ours(images().double()), theirs(images().double()), rtol=1e-12, atol=1e-12)
    ours.pool = "mean"
    truth = theirs.forward_features(images().double())[:, 1:].mean(1)
    torch.testing.assert_close(ours(images().double()), truth, rtol=1e-12, atol=1e-12)


def test_any_grid_of_whole_patches_and_any_subset_of_patches():
    vit = tiny()
    assert vit(images(12)).shape == vit(images(20)).shape == (3, vit.width) == (3, 16)
    patches = vit.embed(images())
    assert patches.shape == (3, 9, 16) and vit.encode(patches[:, [0, 4]]).shape == (3, 3, 16)
    torch.testing.assert_close(vit(images()), vit.encode(patches)[:, 0])
    with pytest.raises(ValueError, match=r"whole 4x4 patches; got \[3, 3, 10, 10\]"):
        vit(images(10))


def test_the_tokens_stay_float32_under_autocast():
    vit = tiny()
    with torch.autocast("cpu", torch.bfloat16):
        assert vit.embed(images()).dtype == torch.float32


def test_mocov3_small_is_wider_in_heads_only():
    with torch.device("meta"):
        sizes = {name: build_vit(name) for name in ("vit_small", "mocov3_vit_small", "mocov3_vit_base")}
    assert [vit.model.blocks[0].attn.num_heads for vit in sizes.values()] == [6, 12, 12]
    counts = [sum(p.numel() for p in vit.parameters()) for vit in sizes.values()]
    # 12 blocks of 12 D² + 13 D, last norm 2 D, patches 768 D + D, class token D
    assert counts == [12 * (12 * D * D + 13 * D) + 772 * D for D in (384, 384, 768)]


def test_starts_as_moco_v3():
    vit = build_vit("vit_tiny", embed_dim=192, depth=1, num_heads=3)
    block, patches = vit.model.blocks[0], vit.model.patch_embed.proj
    bounds = {
        block.attn.qkv: math.sqrt(6 / (192 + 192)),
        block.attn.proj: math.sqrt(6 / (192 + 192)),
        block.mlp.fc1: math.sqrt(6 / (192 + 768)),
        block.mlp.fc2: math.sqrt(6 / (768 + 192)),
        patches: math.sqrt(6 / (3 * 16 * 16 + 192)),
    }
    for layer, bound in bounds.items():
        assert layer.bias.abs().max() == 0
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert abs(layer.weight.std() / (bound / math.sqrt(3)) - 1) < 0.02
    assert 5e-7 < vit.model.cls_token.std() < 2e-6


def test_starts_as_mae():
    """q, k and v as one matrix, the patches' bias as torch leaves a convolution's, a class token of 0.02."""
    vit = build_vit("vit_tiny", embed_dim=192, depth=1, num_heads=3, start="mae")
    block, patches = vit.model.blocks[0], vit.model.patch_embed.proj
    for layer, bound in ((block.attn.qkv, math.sqrt(6 / (192 + 576))), (patches, math.sqrt(6 / (3 * 16 * 16 + 192)))):
        assert 0.99 * bound < layer.weight.abs().max() <= bound
    assert block.attn.qkv.bias.abs().max() == 0 and 0.9 / math.sqrt(768) < patches.bias.abs().max() <= 1 / math.sqrt(768)
    assert 0.016 < vit.model.cls_token.std() < 0.024
    assert {norm.eps for norm in vit.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}


def official_positions(side: int, D: int) -> torch.Tensor:
    """pos_embed [1, 1 + P, D] of MAE's files, number by number, in float32 as they are."""
    rows = [[0.0] * D]
    for row in range(side):
        for column in range(side):
            waves = []
            for place in (column, row):
                angles = [place / 10000 ** (i / (D / 4)) for i in range(D // 4)]
                waves += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(waves)
    return torch.tensor([rows], dtype=torch.float32)


def published(**options) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """timm's own network of 12 px images, every number random, and its state dict."""
    import timm

    torch.manual_seed(3)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=12, **TINY, **options).eval()
    return theirs, {name: torch.randn_like(value) / 4 for name, value in theirs.state_dict().items()}


def test_timm_and_dino_files_load_by_key_with_their_learnt_positions():
    theirs, state = published()
    theirs.load_state_dict(state)
    ours = tiny(learnt_positions=True, img_size=12)
    ours.load_published({**state, "head.weight": torch.zeros(10, 16), "head.bias": torch.zeros(10)})
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="it was learnt; build the network with learnt_positions=true"):
        tiny().load_published(state)


def test_mae_files_load_by_key_and_their_positions_are_the_computed_ones():
    theirs, state = published()
    state["pos_embed"] = official_positions(3, 16)
    theirs.load_state_dict(state)
    ours = tiny()
    ours.load_published(state)
    assert "model.pos_embed" not in ours.state_dict()
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-4, atol=1e-5)


def test_fine_tuned_mae_files_have_their_norm_behind_the_mean():
    theirs, state = published(global_pool="avg", fc_norm=True)
    assert "norm.weight" not in state
    theirs.load_state_dict(state)
    ours = tiny(pool="fc_norm", learnt_positions=True, img_size=12)
    ours.load_published(state)
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-4, atol=1e-5)


def test_learnt_positions_are_resized_as_officially():
    _, state = published()
    same, wider = (tiny(learnt_positions=True, img_size=size) for size in (12, 20))
    for vit in (same, wider):
        vit.load_published(state)
    grid = state["pos_embed"][:, 1:].reshape(1, 3, 3, 16).permute(0, 3, 1, 2)
    truth = nn.functional.interpolate(grid, size=(5, 5), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(25, 16)
    torch.testing.assert_close(wider.model.pos_embed[0, 1:], truth)
    torch.testing.assert_close(same.positions(5, 5), truth)
    assert torch.equal(wider.model.pos_embed[0, 0], state["pos_embed"][0, 0])
    torch.testing.assert_close(same(images(20)), wider(images(20)), rtol=1e-4, atol=1e-5)
    oblong = same.positions(2, 4).reshape(2, 4, 16)
    truth = nn.functional.interpolate(grid, size=(2, 4), mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    torch.testing.assert_close(oblong, truth)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"norm.weight": None}, "norm.weight is missing"),
        ({"blocks.7.attn.qkv.bias": torch.zeros(48)}, r"blocks.7.attn.qkv.bias \[48\] is strange here"),
        ({"cls_token": torch.zeros(1, 1, 24)}, r"cls_token is \[1, 1, 24\], wanted \[1, 1, 16\]"),
        ({"pos_embed": torch.zeros(1, 9, 16)}, r"square grid with a class token; got \[1, 9, 16\]"),
        ({"pos_embed": torch.zeros(1, 10, 24)}, r"pos_embed must be \[1, 1 \+ P, 16\]"),
    ],
)
def test_files_of_other_networks_are_refused_by_name(change, words):
    _, state = published()
    changed = {name: value for name, value in {**state, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=words):
        tiny(learnt_positions=True, img_size=12).load_published(changed)


def test_attention_maps_are_timms_own():
    """The last block's softmax as timm's own attention makes it when it is not fused."""
    vit, seen = tiny().eval(), []
    attention = vit.model.blocks[-1].attn
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda module, given, made: seen.append(made))
    oblong = torch.randn(2, 3, 8, 20, generator=torch.Generator().manual_seed(4))
    vit(oblong)
    maps = vit.class_attention(oblong)
    assert maps.shape == (2, 4, 2, 5) and not maps.requires_grad
    torch.testing.assert_close(maps, seen[0][:, :, 0, 1:].reshape(2, 4, 2, 5))


def test_frozen_patches_get_no_gradient_and_the_optimizer_leaves_them():
    vit = tiny(frozen_patches=True)
    patches = vit.model.patch_embed.proj
    before = [p.detach().clone() for p in patches.parameters()]
    optimizer = build_optimizer(vit, OptimConfig(name="adamw", lr=0.1, weight_decay=0.5, decay_thin=True))
    optimizer.bind(layout(vit, None), None, partitioned=False)
    vit(images()).square().sum().backward()
    assert all((p.grad is None) == ("patch_embed" in name) for name, p in vit.named_parameters())
    for parameter in patches.parameters():  # as under ZeRO, whose flat gradients have a place for every parameter
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip(patches.parameters(), before, strict=True))
    thawed = tiny()
    thawed(images()).square().sum().backward()
    assert thawed.model.patch_embed.proj.weight.grad.abs().max() > 0
    torch.testing.assert_close(thawed(images()), tiny(frozen_patches=True)(images()))


def test_is_a_backbone_by_name():
    backbone = build_backbone("mocov3_vit_small", channels_last=True, **{**TINY, "num_heads": 2}, frozen_patches=True)
    assert isinstance(backbone, ViT) and backbone.memory_format == torch.channels_last
    assert backbone(images()).shape == (3, backbone.width)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build_vit("vit_giant"), f"one of {', '.join(NAMED)}; got 'vit_giant'"),
        (lambda: build_vit("vit_tiny", pretrained=True), "got pretrained"),
        (lambda: tiny(start="simclr"), "start must be moco_v3 or mae; got 'simclr'"),
        (lambda: tiny(pool="max"), "token or mean or fc_norm; got 'max'"),
        (lambda: tiny()(torch.zeros(2, 1, 8, 8)), r"got \[2, 1, 8, 8\]"),
    ],
)
def test_refuses_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
