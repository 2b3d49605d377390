"""What do the fused patch operations give to a whole MAE step?

The same network, DeepSpeed engine, optimizer and images, the forward being ours or the official formulation: embed every patch and gather,
repeat the mask token and gather, predict every patch, build every target. Beside them the bound, which nobody who runs these blocks gets
below: encoder, decoder and last layer on tokens that are simply there. The images are noise.
"""

import statistics

import torch

from benchmarks import measure
from fuseer.engine.config import ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.methods.mae import MAEConfig, visible
from fuseer.engine.methods.method import Loss
from fuseer.engine.models.vit import sincos_positions
from fuseer.engine.recipes import tiny_mae

PROGRAMS = ("official", "fuseer", "bound")


def configs():
    """The demo's own step, and the published one of ViT-B with a batch that two cores can bear."""
    vit_b = TrainConfig(
        recipe="mae_vit_b",
        method=MAEConfig(),
        model=ModelConfig(name="vit_base", options={"start": "mae"}),
        optim=OptimConfig(name="adamw", lr=1e-4, weight_decay=0.05, betas=(0.9, 0.95)),
        batch_size=4,
        steps=1,
    )
    return {"tiny_mae": tiny_mae.config(), "mae_vit_b": vit_b}


def patchify(images, p):
    """[B, 3, H, W] -> [B, P, p * p * 3], pixels in the order row, column, channel."""
    B, C, H, W = images.shape
    x = images.reshape(B, C, H // p, p, W // p, p)
    return torch.einsum("nchpwq->nhwpqc", x).reshape(B, (H // p) * (W // p), p * p * C)


def rows_of(x, ids):
    return torch.gather(x, 1, ids.unsqueeze(-1).repeat(1, 1, x.shape[2]))


def official_loss(method, images, noise):
    """The loss of `method`'s weights as facebookresearch/mae models_mae.py makes it, operation by operation."""
    vit, p = method.backbone, method.backbone.patch[0]
    x = vit.embed(images)
    B, P, _ = x.shape
    keep = min(max(int(P * (1 - method.config.mask_ratio)), 1), P - 1)
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    x = rows_of(x, ids_shuffle[:, :keep])
    mask = torch.ones([B, P], device=x.device)
    mask[:, :keep] = 0
    mask = torch.gather(mask, 1, ids_restore)
    x = vit.model.norm(vit.model.blocks(torch.cat([vit.model.cls_token.expand(B, -1, -1), x], 1)))
    x = method.decoder_embed(x)
    hidden = method.mask_token.repeat(B, P - keep, 1)
    patches = rows_of(torch.cat([x[:, 1:], hidden], 1), ids_restore)
    x = torch.cat([x[:, :1], patches], 1) + _decoder_positions(method, *vit.grid(images))
    pred = method.decoder_pred(method.decoder_norm(method.decoder_blocks(x)))[:, 1:]
    target = patchify(images, p)
    if method.config.normalize_targets:
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(-1)
    return (loss * mask).sum() / mask.sum()


_positions = {}


def _decoder_positions(method, rows, columns):
    like = method.mask_token
    key = (rows, columns, like.shape[2], like.dtype, like.device)
    if key not in _positions:
        positions = sincos_positions(rows, columns, like.shape[2], dtype=like.dtype)
        _positions[key] = torch.cat([positions.new_zeros(1, like.shape[2]), positions]).to(like.device)
    return _positions[key]


def forwards(method):
    """{program: what the engine's module does with a batch}."""

    def official(batch):
        (images,) = batch.crops[0]
        rows, columns = method.backbone.grid(images)
        return Loss(official_loss(method, images, torch.rand(len(images), rows * columns, device=images.device)), {})

    def bound(batch):
        (images,) = batch.crops[0]
        rows, columns = method.backbone.grid(images)
        B, P, like = len(images), rows * columns, method.mask_token
        keep = visible(P, method.config.mask_ratio)
        code = torch.zeros(B, 1 + keep, method.backbone.width, dtype=like.dtype, device=like.device, requires_grad=True)
        tokens = torch.zeros(B, 1 + P, like.shape[2], dtype=like.dtype, device=like.device, requires_grad=True)
        encoded = method.decoder_embed(method.backbone.model.norm(method.backbone.model.blocks(code)))
        pred = method.decoder_pred(method.decoder_norm(method.decoder_blocks(tokens)[:, 1 + keep :]))
        return Loss(encoded.sum() + pred.sum(), {})

    return {"official": official, "fuseer": method.forward, "bound": bound}


def steps(taken):
    """{program: a whole step: forward, backward, update} of the engine and batch of a `step.Step`."""
    module = taken.engine.module

    def program(forward):
        def whole():
            module.forward = forward
            try:
                total = taken.engine(taken.batch).total
                taken.engine.backward(total)
                taken.engine.step()
            finally:
                del module.forward

        return whole

    return {name: program(forward) for name, forward in forwards(module).items()}


def one(name, config, taken, options, machine):
    """The rows of one case: times, the share of the gain there is (official - bound) that ours has, and peak memory."""
    device = taken.batch.crops[0].device.type
    seconds_of, timed = measure.stopwatch(device), steps(taken)
    rounds = measure.repeats_for(timed, seconds_of, warmup=2, budget=40.0, most=51)
    timing = measure.timed(timed, measure.control_loop(device), repeats=int(options["repeats"]) or rounds, seconds_of=seconds_of)
    p50 = {program: statistics.median(timing.seconds[program]) for program in PROGRAMS}
    share = (p50["official"] - p50["fuseer"]) / (p50["official"] - p50["bound"])
    view = config.method.views[0]
    found = []
    for program in PROGRAMS:
        extra = None if program == "bound" else measure.extra_memory(timed[program], device)
        found.append(
            {
                "op": "mae_step",
                "case": name,
                "told": f"{config.model.name}, {config.batch_size} images of {view.size} px, {config.precision}",
                "program": program,
                **measure.quantiles(timing.seconds[program]),
                "ratio": float(f"{p50[program] / p50['official']:.4g}"),
                "gain_share": float(f"{share:.3g}") if program == "fuseer" else None,
                "extra_mb": None if extra is None else round(extra / 1e6, 2),
                "control_spread": round(timing.spread, 2),
                "attempts": timing.attempts,
                "repeats": len(timing.seconds[program]),
                **machine,
            }
        )
        row = found[-1]
        share_said = f"  {row['gain_share']:.0%} of the gain there is" if row["gain_share"] is not None else ""
        measure.say(f"{name:<12}{program:<10}step {row['p50_ms']:9.2f} ms  ×{row['ratio']:.3f}  peak {row['extra_mb']} MB{share_said}")
    return found
