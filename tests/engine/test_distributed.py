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
    assert not {"torch_autocast", "bf16", "fp16", "data_types"} & said.keys(), "autocast is ours"


def test_half_weights_are_deepspeeds_and_several_gradients_are_summed_in_fp32():
    said = deepspeed_config(configured(precision="bf16", zero_stage=1), world_size=8)
    assert said["bf16"] == {"enabled": True} and not {"fp16", "data_types"} & said.keys()
    said = deepspeed_config(configured(precision="fp16", zero_stage=1, accumulation_steps=2), world_size=8)
    assert said["fp16"]["loss_scale"] == 0 and said["data_types"] == {"grad_accum_dtype": "fp32"}
    with pytest.raises(ValueError, match="zero_stage=0 would sum the gradients of 2 micro-batches in half"):
        configured(precision="bf16", accumulation_steps=2)


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


def test_a_process_alone_copies_no_gradient_and_leaves_none_out():
    """Stage 0: nothing is flattened, the gradient is autograd's own tensor, and a parameter that no forward used gets 0 as under ZeRO."""
    ranks = start()
    try:
        module = torch.nn.ModuleDict({"used": torch.nn.Linear(3, 2), "unused": torch.nn.Linear(3, 2)})
        module.forward = lambda x: module["used"](x).sum()
        config = load_recipe("tiny_swav").config().model_copy(update={"batch_size": 4, "precision": "fp32", "zero_stage": 0})
        engine = initialize_deepspeed(module, torch.optim.SGD(module.parameters(), lr=0.1), config, ranks.world_size)
        engine.flatten = None
        engine.backward(engine(torch.ones(4, 3)))
        assert module["used"].weight.grad.eq(4).all() and module["unused"].weight.grad.eq(0).all()
    finally:
        stop()
