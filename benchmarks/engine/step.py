"""What does a faster loss give to a whole training step? (What fused patch operations give to MAE's: mae_step.py.)

The same method, network, optimizer and DeepSpeed engine, its loss being ours, the official loop, or that loop compiled.
The crops are noise.
"""

import statistics
from dataclasses import dataclass

import torch

from benchmarks import measure
from benchmarks.engine import mae_step
from benchmarks.kernels.swapped_prediction import official
from fuseer.engine import distributed
from fuseer.engine.config import ModelConfig, OptimConfig, TrainConfig
from fuseer.engine.data.view import Batch, View
from fuseer.engine.methods import swav
from fuseer.engine.methods.swav import SwAVConfig
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import layout
from fuseer.engine.recipes import tiny_swav
from fuseer.engine.run import build_method
from fuseer.kernels.functional import swapped_prediction


def _config(name, backbone, batch, sizes, prototypes, **method):
    big, small = sizes
    views = (View(size=big, count=2, scale=(0.14, 1.0)), View(size=small, count=4, scale=(0.05, 0.14)))
    return TrainConfig(
        recipe=name,
        method=SwAVConfig(views=views, prototypes=prototypes, freeze_prototypes_steps=0, **method),
        model=ModelConfig(name=backbone, channels_last=True),
        optim=OptimConfig(name="sgd", lr=1e-3),
        batch_size=batch,
        steps=1,
        precision=distributed.fastest_precision(),
    )


def configs():
    """The demo's own step, and steps shaped like the published ones with images, batches and networks that two cores can bear."""
    seer = {"hidden_widths": (2048, 2048), "embedding_width": 256}
    return {
        "tiny_swav": tiny_swav.config(),
        "swav_rn50": _config("swav_rn50", "resnet50", 16, (64, 32), 3000),
        "seer_3000": _config("seer", "regnety_400mf", 16, (64, 32), 3000, **seer),
        "seer_16000": _config("seer", "regnety_400mf", 16, (64, 32), 16000, **seer, sinkhorn_iterations=10),
    }


@dataclass
class Step:
    """One engine, and the loss function that its method calls for now."""

    engine: object
    batch: Batch
    scores: torch.Tensor | None = None
    options: dict | None = None

    def with_loss(self, function):
        """A whole step: forward, backward, update."""

        def loss(scores, **options):
            self.scores, self.options = scores.detach(), options
            return function(scores, **options)

        def program():
            own, swav.swapped_prediction = swav.swapped_prediction, loss
            try:
                total = self.engine(self.batch).total
                self.engine.backward(total)
                self.engine.step()
            finally:
                swav.swapped_prediction = own

        return program

    def alone(self, function):
        """The loss, forward and backward, on the scores of the last step."""

        def program():
            function(self.scores.clone().requires_grad_(), **self.options).backward()

        return program


def built(config, ranks):
    method = build_method(config, ranks)
    optimizer = build_optimizer(method, config.optim)
    engine = distributed.initialize_deepspeed(method, optimizer, config, ranks.world_size)
    optimizer.bind(layout(method, None), ranks.group, partitioned=False)
    method.train()
    method.after_step(0)
    B = config.batch_size
    generator = torch.Generator().manual_seed(0)
    crops = [torch.randn(v.count, B, 3, v.size, v.size, generator=generator).to(ranks.device) for v in method.views]
    return Step(engine, Batch(crops, torch.arange(B), torch.full((B,), -1), 0))


def losses(with_compile):
    """{program: loss function of the method's call}."""

    def official_call(scores, *, group, queue_scores=None, **options):
        return official(scores, queue_scores, **options)

    found = {"official": official_call, "fuseer": swapped_prediction}
    if with_compile:
        found["compile"] = torch.compile(official_call, dynamic=False)
    return found


def one(name, config, ranks, options, machine):
    device = ranks.device.type
    step, seconds_of = built(config, ranks), measure.stopwatch(device)
    functions = losses(options["compile"] == "true")
    whole = {program: step.with_loss(function) for program, function in functions.items()}
    alone = {f"{program} alone": step.alone(function) for program, function in functions.items()}
    rounds = measure.repeats_for(whole | alone, seconds_of, warmup=2, budget=15.0, most=31)
    timing = measure.timed(whole | alone, measure.control_loop(device), repeats=int(options["repeats"]) or rounds, seconds_of=seconds_of)
    views = " + ".join(f"{view.count}×{view.size} px" for view in config.method.views)
    found = []
    for program in functions:
        p50 = statistics.median(timing.seconds[program])
        loss = statistics.median(timing.seconds[f"{program} alone"])
        found.append(
            {
                "op": "step",
                "case": name,
                "told": f"{config.model.name}, {config.batch_size} images of {views}, {config.precision}",
                "shape": "×".join(map(str, step.scores.shape)),
                "program": program,
                **measure.quantiles(timing.seconds[program]),
                "loss_ms": float(f"{1e3 * loss:.4g}"),
                "loss_share": float(f"{loss / p50:.3g}"),
                "ratio": float(f"{p50 / statistics.median(timing.seconds['official']):.4g}"),
                "control_spread": round(timing.spread, 2),
                "attempts": timing.attempts,
                "repeats": len(timing.seconds[program]),
                **machine,
            }
        )
        row = found[-1]
        said = f"step {row['p50_ms']:9.2f} ms  loss alone {row['loss_ms']:9.3f} ms  {row['loss_share']:6.1%} of it  ×{row['ratio']:.3f}"
        measure.say(f"{name:<12}{program:<10}{said}")
    return found


def bench(options):
    """Times every step that options["case"] names, all without it; the sentences of those rejected."""
    known = configs() | mae_step.configs()
    if options["case"] not in ("", *known):
        raise ValueError(f"bench step: case must be one of {', '.join(known)}; got {options['case']}")
    ranks, rejected = distributed.start(), []
    if ranks.device.type != options["device"]:
        raise RuntimeError(f"bench step: the engine takes {ranks.device.type} on this machine; give device={ranks.device.type}")
    machine = measure.header(ranks.device.type)
    try:
        for name, config in known.items():
            if options["case"] not in ("", name):
                continue
            try:
                masked = name in mae_step.configs()
                if masked:
                    found = mae_step.one(name, config, built(config, ranks), options, machine)
                else:
                    found = one(name, config, ranks, options, machine)
            except measure.Rejected as error:
                rejected.append(f"step {name}: rejected: {error}")
                continue
            if options["store"] == "true":
                measure.store("mae_step" if masked else "step", found)
    finally:
        distributed.stop()
    return rejected
