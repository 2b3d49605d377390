"""Do the steps that are compared differ in their loss function alone?"""

import pytest
import torch

from benchmarks import measure, run
from benchmarks.engine import mae_step, step
from fuseer.engine import distributed
from fuseer.engine.config import ModelConfig
from fuseer.engine.methods import swav
from fuseer.kernels.functional import swapped_prediction

STAGES = {"depths": [1, 1], "widths": [16, 24], "group_widths": 8, "stem_width": 8, "stem_stride": 1}


@pytest.mark.parametrize("queue", [None, 7])
def test_the_official_loss_is_the_methods_loss(queue):
    scores = torch.rand(4, 6, 9, dtype=torch.float64) * 2 - 1
    options = {"assign": (0, 1), "epsilon": 0.05, "iterations": 3, "temperature": 0.1, "group": None}
    options["queue_scores"] = None if queue is None else torch.rand(2, queue, 9, dtype=torch.float64) * 2 - 1
    losses = [function(scores, **options) for function in (step.losses(False)["official"], swapped_prediction)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)


def test_a_step_is_timed_with_each_loss():
    """In a process of its own: DeepSpeed remembers the process group of its first engine, and later tests have theirs."""
    torch.multiprocessing.spawn(_whole_steps, nprocs=1)


def _whole_steps(_):
    """Both programs take whole steps of one engine: the weights move under each, and the method's own loss is back afterwards."""
    tiny = step._config("tiny", "anynet", 4, (12, 8), 7, hidden_widths=(16,), embedding_width=8)
    tiny = tiny.model_copy(update={"model": ModelConfig(name="anynet", options=STAGES), "precision": "fp32"})
    measure.MAX_SPREAD = float("inf")
    try:
        ranks = distributed.start()
        found = step.one("tiny", tiny, ranks, {**run.OPTIONS, "compile": "false", "repeats": "3"}, {"device": "here"})
        taken = step.built(tiny, ranks)
        for function in step.losses(False).values():
            before = taken.engine.module.head.layers[0].weight.clone()
            taken.with_loss(function)()
            assert not torch.equal(before, taken.engine.module.head.layers[0].weight)
    finally:
        distributed.stop()
    assert [row["program"] for row in found] == ["official", "fuseer"] and swav.swapped_prediction is swapped_prediction
    for row in found:
        assert row["shape"] == "6×4×7" and row["device"] == "here" and row["loss_share"] > 0
    assert found[0]["ratio"] == 1.0


def test_a_mae_step_is_timed_beside_the_official_one_and_the_bound():
    torch.multiprocessing.spawn(_mae_steps, nprocs=1)


def _mae_steps(_):
    """All three take whole steps of one engine, the decoder moves under each, and the method's own forward is back afterwards."""
    tiny = mae_step.configs()["tiny_mae"]
    options = {"patch_size": 7, "embed_dim": 16, "depth": 1, "num_heads": 2, "start": "mae"}
    tiny = tiny.model_copy(update={"model": ModelConfig(name="vit_tiny", options=options), "batch_size": 4})
    measure.MAX_SPREAD = float("inf")
    try:
        taken = step.built(tiny, distributed.start())
        module = taken.engine.module
        for program in mae_step.steps(taken).values():
            before = module.decoder_pred.weight.clone()
            program()
            assert not torch.equal(before, module.decoder_pred.weight) and "forward" not in vars(module)
        found = mae_step.one("tiny", tiny, taken, {**run.OPTIONS, "repeats": "3"}, {"device": "here"})
    finally:
        distributed.stop()
    assert [row["program"] for row in found] == ["official", "fuseer", "bound"] and found[0]["ratio"] == 1.0
    assert found[1]["gain_share"] is not None and all(row["device"] == "here" for row in found)
