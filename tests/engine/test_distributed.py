"""Is DeepSpeed told what the run was told, and nothing that would break it?"""

import pytest
import torch

from fuseer.engine.config import apply_overrides
from fuseer.engine.distributed import (
    Ranks,
    deepspeed_config,
    gather_rows,
    initialize_deepspeed,
    micro_batch,
    norm_group,
    start,
    stop,
    threads_per_rank,
)
from fuseer.engine.recipes.recipe import load_recipe


def configured(**overrides):
    return apply_overrides(load_recipe("swav_rn50").config(), {key.replace("__", "."): str(value) for key, value in overrides.items()})


def test_batch_arithmetic_agrees():
    said = deepspeed_config(configured(accumulation_steps=2), world_size=64)
    assert said["train_micro_batch_size_per_gpu"] * said["gradient_accumulation_steps"] * 64 == 4096


def test_dangerous_defaults_are_named():
    said = deepspeed_config(configured(), world_size=8)
    assert said["gradient_clipping"] == 0.0 and said["zero_optimization"]["round_robin_gradients"] is False
    assert said["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match="ranks × accumulation_steps = 3 × 1; got 4096"):
        micro_batch(configured(), 3)


def test_norm_groups_must_divide_the_world():
    ranks = Ranks(0, 6, 0, 6, torch.device("cpu"))
    assert norm_group(ranks, 0) is None
    with pytest.raises(ValueError, match="must divide the number of ranks, 6; got 4"):
        norm_group(ranks, 4)


def test_every_rank_gets_a_thread():
    assert threads_per_rank(10**6) == 1


def test_a_process_alone_gathers_its_own_rows():
    x = torch.randn(3, 2, requires_grad=True)
    rows, counts = gather_rows(x, None)
    assert torch.equal(rows, x) and counts == [3] and not rows.requires_grad


def test_a_process_can_leave_the_world_and_train_again():
    config = configured(optim__name="sgd", precision="fp32", batch_size=4)
    for stage in (0, 1):
        ranks = start()
        module = torch.nn.Linear(3, 2)
        before = module.weight.detach().clone()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        try:
            engine = initialize_deepspeed(module, optimizer, config.model_copy(update={"zero_stage": stage}), ranks.world_size)
            engine.backward(engine(torch.ones(4, 3)).sum())
            engine.step()
        finally:
            stop()
        assert not torch.distributed.is_initialized() and not torch.equal(module.weight, before)
