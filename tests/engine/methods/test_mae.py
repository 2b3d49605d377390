"""Is MAE the official formulation in loss and gradient, blind to what is hidden, free of history, and able to train and go on exactly?"""

import json
import math
import shutil

import pytest
import torch
from torch import nn

from benchmarks.engine.mae_step import official_loss
from fuseer.engine import distributed
from fuseer.engine.config import OptimConfig, apply_overrides
from fuseer.engine.data.view import Batch, View
from fuseer.engine.methods.mae import MAE, MAEConfig, mask_noise, one_view, visible
from fuseer.engine.methods.method import Ground
from fuseer.engine.models.backbone import build_backbone
from fuseer.engine.models.vit import build_vit
from fuseer.engine.optim import build_optimizer
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.engine.train import train
from fuseer.kernels.testing import eager_outputs, error_vs_eager

TINY = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "start": "mae"}
HEIGHT, WIDTH, P = 12, 16, 12


@pytest.fixture(scope="module", autouse=True)
def leave_the_world():
    yield
    distributed.stop()


def tiny(size: int = 16, **changes) -> MAE:
    torch.manual_seed(0)
    settings = {"views": (View(size=size, count=1, scale=(0.2, 1.0)),), "decoder_width": 8, "decoder_depth": 2, "decoder_heads": 2}
    method = MAEConfig(**{**settings, **changes}).build(Ground(build_vit("vit_tiny", **TINY), None, None, 0, 1, 4))
    with torch.no_grad():  # biases and norms as they begin would hide where they are applied
        for p in method.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return method


def images(B: int, dtype=torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(B, 3, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def noise(B: int, seed: int = 2) -> torch.Tensor:
    return torch.rand(B, P, generator=torch.Generator().manual_seed(seed))


def found(method: MAE, loss, dtype, B: int, batches: int, half: bool) -> dict[str, torch.Tensor]:
    """The losses of so many batches, and the gradient of their sum in all parameters, end to end."""
    method, losses = method.to(dtype), []
    method.zero_grad()
    for seed in range(batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses.append(loss(method, images(B, dtype, seed), noise(B, seed)))
        losses[-1].backward()
    return {"loss": torch.stack(losses).detach(), "gradient": torch.cat([p.grad.flatten() for p in method.parameters()])}


def judged(method: MAE, precision: str, B: int) -> dict:
    half, dtype = precision == "bf16-autocast", torch.float64 if precision == "float64" else torch.float32
    batches = 32 if half else 1  # the error of a few half losses may be luckily small
    reached = found(method, MAE.loss, dtype, B, batches, half)
    assert all(value.dtype == dtype for value in reached.values())

    def official(to):
        return found(method, official_loss, to, B, batches, half and to != torch.float64)

    truth = official(torch.float64)
    eager = eager_outputs(official, dtype, truth)
    return {name: error_vs_eager(reached[name], eager[name], truth[name]) for name in truth}


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("precision", ["float64", "float32", "bf16-autocast"])
@pytest.mark.parametrize(("normalize", "B"), [(True, 3), (False, 3), (True, 1)])
def test_loss_and_gradients_are_the_official_ones(precision, ratio, normalize, B):
    """From one hidden patch of twelve (0.05) to all but one (0.9)."""
    for name, verdict in judged(tiny(mask_ratio=ratio, normalize_targets=normalize), precision, B).items():
        assert verdict, f"{name}: {verdict}"


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_decoders_of_any_depth_are_the_official_one(depth):
    for name, verdict in judged(tiny(decoder_depth=depth), "float64", 2).items():
        assert verdict, f"{name}: {verdict}"


@pytest.mark.parametrize(("ratio", "masked"), [(0.05, 1), (0.45, 6), (0.5, 6), (0.75, 9), (0.9, 11), (0.99, 11), (0.001, 1)])
def test_as_many_patches_are_hidden_as_asked_for(ratio, masked):
    assert P - visible(P, ratio) == masked
    pred, ids = tiny(mask_ratio=ratio).painted(images(2, torch.float32), noise(2))
    assert pred.shape == (2, masked, 48) and ids.shape == (2, masked)
    assert all(set(row.tolist()) == set(n.argsort()[P - masked :].tolist()) for row, n in zip(ids, noise(2), strict=True))


def test_the_published_sizes_keep_a_quarter():
    assert visible(196, 0.75) == 49 and visible(256, 0.75) == 64
    with pytest.raises(ValueError, match="at least 2 patches, of which one is hidden; got 1"):
        visible(1, 0.75)


def test_what_is_hidden_cannot_be_seen():
    method, shown = tiny().eval(), images(2, torch.float32)
    pred, ids = method.painted(shown, noise(2))
    changed = shown.clone()
    for b, patches in enumerate(ids.tolist()):
        for patch in patches:
            row, column = divmod(patch, WIDTH // 4)
            changed[b, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 10.0
    assert torch.equal(method.painted(changed, noise(2))[0], pred)
    assert not torch.equal(method.painted(shown + 1.0, noise(2))[0], pred)


def batch(samples: list[int], epoch: int = 0, size: int = 16) -> Batch:
    drawn = torch.cat([torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(sample)) for sample in samples])
    return Batch([drawn[None]], torch.tensor(samples), torch.full((len(samples),), -1), epoch)


def test_masks_depend_on_epoch_and_sample_alone():
    together = mask_noise(batch([5, 9, 2**40]), 1000)
    assert torch.equal(torch.cat([mask_noise(batch([sample]), 1000) for sample in (5, 9, 2**40)]), together)
    others = [mask_noise(batch([6]), 1000), mask_noise(batch([5], epoch=1), 1000), together[1:2], together[2:]]
    assert all((other - together[0]).abs().mean() > 0.3 for other in others), "a third, for independent uniform numbers"
    assert together.dtype == torch.float32 and together.min() >= 0 and together.max() < 1
    assert (together.mean(1) - 0.5).abs().max() < 0.05 and len(together.unique()) > 2990


def test_ranks_with_parts_of_the_batch_have_the_loss_of_the_whole():
    method = tiny().double()
    whole = batch([3, 8, 1, 4])
    whole.crops[0] = whole.crops[0].double()
    parts = [Batch([whole.crops[0][:, i : i + 2]], whole.samples[i : i + 2], whole.labels[i : i + 2], 0) for i in (0, 2)]
    assert sum(method(part).total for part in parts).item() / 2 == pytest.approx(method(whole).total.item(), rel=1e-12)


def test_starts_as_officially():
    torch.manual_seed(0)
    method = MAEConfig(decoder_width=64, decoder_depth=2, decoder_heads=4).build(
        Ground(build_vit("vit_tiny", **{**TINY, "embed_dim": 64}), None, None, 0, 1, 4)
    )
    block = method.decoder_blocks[0]
    for layer, rows, columns in (
        (method.decoder_embed, 64, 64), (block.attn.qkv, 192, 64), (block.mlp.fc1, 256, 64), (method.decoder_pred, 48, 64),
        (method.backbone.model.blocks[0].attn.qkv, 192, 64), (method.backbone.model.patch_embed.proj, 64, 48),
    ):  # fmt: skip
        bound = math.sqrt(6 / (rows + columns))
        assert layer.weight.shape[0] == rows and 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer is method.backbone.model.patch_embed.proj or layer.bias.abs().max() == 0
    assert 0.9 / math.sqrt(48) < method.backbone.model.patch_embed.proj.bias.abs().max() <= 1 / math.sqrt(48)
    assert 0.014 < method.mask_token.std() < 0.026 and 0.014 < method.backbone.model.cls_token.std() < 0.026
    assert {norm.eps for norm in method.modules() if isinstance(norm, nn.LayerNorm)} == {1e-6}
    with torch.device("meta"):
        large = MAEConfig().build(Ground(build_vit("vit_large", start="mae"), None, None, 0, 1, 4))
    # 8 blocks of 12 D² + 13 D, decoder_embed 1024 D + D, last norm 2 D, decoder_pred 768 D + 768, mask token D
    D = 512
    assert sum(p.numel() for name, p in large.named_parameters() if not name.startswith("backbone.")) == (
        8 * (12 * D * D + 13 * D) + 1024 * D + D + 2 * D + 768 * D + 768 + D
    )


def test_tokens_are_decayed_and_norms_and_biases_are_not():
    optimizer = build_optimizer(tiny(), OptimConfig(name="adamw", lr=1e-3, weight_decay=0.05, betas=(0.9, 0.95)))
    decayed = {name: group["weight_decay"] > 0 for group in optimizer.param_groups for name in group["names"]}
    assert decayed["mask_token"] and decayed["backbone.model.cls_token"] and decayed["backbone.model.patch_embed.proj.weight"]
    spared = {name for name, is_decayed in decayed.items() if not is_decayed}
    assert spared == {name for name, p in tiny().named_parameters() if p.ndim == 1} and len(spared) > 20


SMALL = {
    "model.options": json.dumps(TINY),
    "method.decoder_width": "8",
    "method.decoder_heads": "2",
    "batch_size": "16",
    "optim.warmup_steps": "2",
    "log_every_steps": "1",
    "checkpoint_every_steps": "3",
    "keep_checkpoints": "2",
    "knn.every_steps": "0",
    "steps": "6",
}


def test_trains_and_goes_on_bitwise(tmp_path):
    config, whole, stopped = apply_overrides(load_recipe("tiny_mae").config(), SMALL), tmp_path / "whole", tmp_path / "stopped"
    train(config, whole)
    losses = logged(whole)
    assert sorted(losses) == [1, 2, 3, 4, 5, 6] and all(0 < loss < 5 for loss in losses.values())
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "ckpt" / "step_00000006")
    (stopped / "metrics.jsonl").write_text("")
    train(config, stopped, resume=True)
    assert logged(stopped) == {step: losses[step] for step in (4, 5, 6)}


def logged(out) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def test_learns_one_batch_by_heart():
    method = tiny(decoder_width=32)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    first = method(batch([1, 2])).total
    for _ in range(60):
        optimizer.zero_grad()
        total = method(batch([1, 2])).total
        total.backward()
        optimizer.step()
    assert total < 0.5 * first


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: MAEConfig(views=(*one_view(), *one_view())), "1 view of an image; got 2"),
        (lambda: MAEConfig(decoder_width=10), "multiple of 4 .positions. and of decoder_heads; got 10 and 16"),
        (lambda: MAEConfig(mask_ratio=1.0), "less than 1"),
        (lambda: MAEConfig(mask_ratio=0.0), "greater than 0"),
        (lambda: tiny()(batch([1], size=10)), r"whole 4x4 patches; got \[1, 3, 10, 10\]"),
        (lambda: tiny()(batch([1], size=4)), "at least 2 patches"),
    ],
)
def test_refuses_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_refuses_other_backbones():
    with pytest.raises(TypeError, match="one of our ViTs, e.g. model.name=vit_base; got AnyNet"):
        MAEConfig().build(Ground(build_backbone("regnety_400mf"), None, None, 0, 1, 4))
