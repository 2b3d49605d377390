"""Does a true SEER model take an optimizer step on this machine, and is its peak memory what `fuseer plan` says?

python -m benchmarks.engine.seer_step [case=64gf] [stage=0] [precision=bf16-autocast] [batch=2] [large=64] [small=32] [steps=2] [store=true]

The recipe's network, head, 16,000 prototypes and LARC through our engine in one process, on noise: 2 crops of `large` and 4 of `small`
pixels an image, every block computed again. Peak memory is that of the whole process (VmHWM; on a GPU that of its tensors), of all
from its start: build, deepspeed.initialize, `steps` steps. Freed memory goes back at once. What does not fit, as plan foretells, is
not started; force=true starts it all the same.
"""

import math
import sys
import time

import torch

from benchmarks import measure
from fuseer.engine import distributed
from fuseer.engine.accelerators import GIB
from fuseer.engine.config import apply_overrides
from fuseer.engine.data.view import Batch
from fuseer.engine.log import peak_memory
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import forget_gradients, layout
from fuseer.engine.plan import plan
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.engine.run import build_method
from fuseer.engine.skipping import Skipping
from fuseer.engine.teacher import Teachers

OPTIONS = {
    "case": "64gf",
    "stage": "0",
    "precision": "bf16-autocast",
    "batch": "2",
    "large": "64",
    "small": "32",
    "steps": "2",
    "gpu": "cpu",
    "store": "true",
    "force": "false",
}


def config_of(options):
    """The recipe with crops, batch, precision and stage that one process bears; recomputed block by block, alone with its norms."""
    views = ", ".join(
        f'{{"size": {options[name]}, "count": {count}, "scale": {list(scale)}}}'
        for name, count, scale in (("large", 2, (0.14, 1.0)), ("small", 4, (0.05, 0.14)))
    )
    return apply_overrides(
        load_recipe(f"seer_regnety_{options['case']}").config(),
        {
            "method.views": f"[{views}]",
            "method.freeze_prototypes_steps": "0",
            "model.recompute": "all",
            "model.sync_norm_ranks": "0",
            "batch_size": options["batch"],
            "accumulation_steps": "1",
            "precision": options["precision"],
            "zero_stage": options["stage"],
        },
    )


def stepped(config, ranks, steps):
    """(parameters, losses, seconds of each step) of `steps` optimizer steps on noise; the weights after them are looked at."""
    method = build_method(config, ranks)
    parameters = sum(parameter.numel() for parameter in method.parameters())
    optimizer = build_optimizer(method, config.optim)
    engine = distributed.initialize_deepspeed(method, optimizer, config, ranks.world_size)
    wrapper = None if engine.optimizer is optimizer else engine.optimizer
    optimizer.bind(layout(method, wrapper), ranks.group, partitioned=config.zero_stage > 0)
    for group in optimizer.param_groups:
        group["lr"] = config.optim.lr
    method.train()
    method.after_step(0)
    B, generator = config.batch_size, torch.Generator().manual_seed(0)
    before = norm_of(method)
    skipping = Skipping(engine, optimizer, method, Teachers(method))
    skipping.begin(0)
    losses, seconds = [], []
    for _ in range(steps):
        began = time.perf_counter()
        crops = [torch.randn(view.count, B, 3, view.size, view.size, generator=generator).to(ranks.device) for view in method.views]
        forget_gradients(engine.optimizer)
        total = engine(Batch(crops, torch.arange(B), torch.full((B,), -1), 0)).total
        engine.backward(skipping.guarded(total))
        engine.step()
        thrown = bool(skipping.settle())
        losses.append(math.nan if thrown else total.item())
        seconds.append(time.perf_counter() - began)
        reached = f"peak {peak_memory(ranks.device) / GIB:.2f} GiB so far"
        measure.say(f"step {len(losses)}: loss {losses[-1]:.5f}, {seconds[-1]:.0f} s, {reached}")
    if not all(map(math.isfinite, losses)) or config.zero_stage < 3 and norm_of(method) == before:
        raise RuntimeError(f"seer_step: the losses are {losses}, nan where a step was thrown away, or the weights have not moved")
    return parameters, losses, seconds


def norm_of(method):
    """A number that tells whether the weights of the head's last layer moved, without a copy of them all."""
    return float(list(method.head.parameters())[-2].detach().float().norm())


def table(rows):
    lines = ["| network, stage, precision | parameters | images | peak, GiB | plan said | off | bytes a parameter |", "|---" * 7 + "|"]
    for row in rows:
        numbers = f"{row['peak_gib']:.2f} | {row['foretold_gib']:.2f} | {row['off']:+.1%} | {row['bytes_per_parameter']:.1f}"
        lines.append(f"| {row['case']} | {row['parameters']:,} | {row['shape']} | {numbers} |")
    return "\n".join(lines)


def main(words):
    options = measure.options("seer_step", OPTIONS, words)
    config = config_of(options)
    foretold = plan(config, 1, options["gpu"])
    predicted, stage = foretold.peak(config.zero_stage), config.zero_stage
    told = f"{config.recipe}, ZeRO {stage}, {config.precision}: plan foretells {predicted / GIB:.2f} GiB"
    if predicted > foretold.device.memory and options["force"] != "true":
        measure.say(f"{told}, and {foretold.device.memory / GIB:.2f} GiB are free: it does not fit, and is not started")
        return
    measure.say(told)
    ranks = distributed.start()
    if ranks.device.type == "cpu":
        distributed.keep_freed_memory(0)
    try:
        parameters, losses, seconds = stepped(config, ranks, int(options["steps"]))
    finally:
        distributed.stop()
    peak = peak_memory(ranks.device)
    off = predicted / peak - 1
    compared = f"peak {peak / GIB:.2f} GiB, foretold {predicted / GIB:.2f} ({off:+.1%})"
    measure.say(f"{parameters:,} parameters: {compared}; {min(seconds):.0f} s a step")
    row = {
        "op": "seer_step",
        "case": f"{options['case']}, ZeRO {stage}, {config.precision}",
        "shape": f"{options['batch']} images of 2×{options['large']} + 4×{options['small']} px",
        "parameters": parameters,
        "peak_gib": round(peak / GIB, 3),
        "foretold_gib": round(predicted / GIB, 3),
        "off": round(off, 4),
        "bytes_per_parameter": round(peak / parameters, 2),
        "step_seconds": [round(value, 1) for value in seconds],
        "losses": losses,
        **measure.header(ranks.device.type),
    }
    if options["store"] == "true":
        measure.store("seer_step", [row])


if __name__ == "__main__":
    measure.settle_threads()
    main(sys.argv[1:])
