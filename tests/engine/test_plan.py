"""Is what a plan foretells counted on the model itself, and measured where it can be?"""

import json

import pytest
import torch

from benchmarks import measure
from benchmarks.engine import seer_step
from fuseer.engine import costs, plan
from fuseer.engine.accelerators import ACCELERATORS, GIB, accelerator
from fuseer.engine.cli import main
from fuseer.engine.config import apply_overrides
from fuseer.engine.data.view import Batch
from fuseer.engine.distributed import Ranks
from fuseer.engine.models.regnet import build_regnet, complexity
from fuseer.engine.recipes.recipe import load_recipe
from fuseer.engine.run import build_method

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
SMALL = {
    "model.name": "anynet",
    "model.options": json.dumps({"depths": [1, 2], "widths": [16, 48], "group_widths": 8, "stem_width": 8, "stem_stride": 1}),
    "method.hidden_widths": "[32]",
    "method.embedding_width": "16",
    "method.prototypes": "24",
    "precision": "fp32",
}


def small(**overrides):
    return apply_overrides(load_recipe("tiny_swav").config(), {**SMALL, **overrides})


def batch_for(method, B):
    generator = torch.Generator().manual_seed(0)
    crops = [torch.randn(view.count, B, 3, view.size, view.size, generator=generator) for view in method.views]
    return Batch(crops, torch.arange(B), torch.full((B,), -1), 0)


def saved_by(config, B):
    """Bytes that real autograd keeps of a real forward, each storage once, weights and images apart."""
    method = build_method(config.model_copy(update={"batch_size": B}), ALONE).train()
    method.after_step(0)
    batch, found = batch_for(method, B), {}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = method(batch).total
    for tensor in (*method.parameters(), *method.buffers(), *batch.crops):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(found.values()), total


@pytest.fixture(scope="module")
def seer():
    """Size and costs of the true RegNetY-256GF with its head, 16 images a GPU."""
    config = load_recipe("seer_regnety_256gf").config()
    return costs.size_of(*costs.built(config, 16)), costs.traced(config, 16)


def test_seer_256gf_is_counted_as_published(seer):
    """1.43 G parameters, 254.4 G multiply-adds at 224 px, four times the forward with all of the trunk computed again."""
    size, found = seer
    assert size.parts == {"trunk": 1_272_156_138, "head": 154_779_904, "prototypes": 4_096_000}
    assert size.trained == 1_431_032_042 and size.layers == 373 and size.rows == 16_000
    with torch.device("meta"):
        network = build_regnet("regnety_256gf").eval()
        published = complexity(network, torch.empty(1, 3, 224, 224))["flops"]
    biases = sum(p.numel() for name, p in network.named_parameters() if ".se." in name and name.endswith("bias"))
    (large, crops, spent), (small_px, _, less) = found.passes
    assert (large, crops, small_px) == (224, 32, 96)
    assert published - biases == spent and less == pytest.approx(46.86e9, rel=1e-3)
    assert len(found.norms) == 2 * 86
    assert found.forward > 2 * spent + 4 * less and 3.99 < found.executed / found.forward < 4.0


def test_what_waits_for_backward_is_what_autograd_keeps():
    config, B = small(), 8
    truly, _ = saved_by(config, B)
    found = costs.traced(config, B)
    # views of a loss's own results and of the embeddings that diagnostics keep are counted by one and not by the other
    assert found.kept == pytest.approx(truly, rel=0.03)
    recomputed = costs.traced(small(**{"model.recompute": "all"}), B)
    assert recomputed.kept < 0.5 * found.kept and recomputed.peak < found.peak
    assert recomputed.forward == found.forward
    assert found.executed < 3 * found.forward < recomputed.executed < 4 * found.forward
    # a gradient that is taken away leaves room
    assert found.peak_consumed <= found.peak
    assert costs.traced(config, 2 * B).kept == pytest.approx(2 * found.kept, rel=0.02)


def test_a_plan_leaves_the_random_state_and_the_model_of_a_run_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    costs.traced(small(), 4)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["tiny_mae", "tiny_moco_v2", "tiny_simclr", "tiny_moco_v3"])
def test_other_methods_are_traced_too(name):
    found = costs.traced(load_recipe(name).config(), 32)
    assert 0 < found.forward < found.executed and 0 < found.kept <= found.peak


@pytest.fixture
def planned(seer, monkeypatch):
    """plan() of the true network, traced once."""
    monkeypatch.setattr(plan, "built", lambda config, B: ())
    monkeypatch.setattr(plan, "size_of", lambda *_: seer[0])
    monkeypatch.setattr(plan, "traced", lambda config, B: seer[1])
    return plan.plan


def test_stages_are_told_apart_and_the_smallest_that_fits_is_chosen(planned):
    config, N = load_recipe("seer_regnety_256gf").config(), 1_431_032_042
    found = planned(config, 512, "v100")
    parts = found.memory[0]["update"]
    assert parts["weights"] == parts["momenta"] == parts["gradients"] == 4 * N and parts["masters"] == 0
    assert found.memory[1]["backward"]["masters"] == found.memory[3]["backward"]["weights"] == 4 * -(-N // 512)
    assert found.memory[1]["backward"]["weights"] == 4 * N
    assert found.peak(0) > found.peak(1) > found.peak(3)
    assert found.stage == min(stage for stage in range(4) if found.peak(stage) <= found.usable) == 0
    # one fp32 gradient all-reduced in a ring, 86 norms in two passes forward and backward, one MAX and ten sums
    assert found.messages["gradients"][1] == pytest.approx(2 * 4 * N, rel=0.01)
    assert found.messages["BatchNorm"][0] == 344
    assert found.messages["Sinkhorn"][0] == 11
    smaller = planned(config, 512, "v100-16")
    assert smaller.peak(0) > smaller.usable and smaller.stage != 0
    alone = planned(config.model_copy(update={"batch_size": 16}), 1, "v100")
    assert alone.messages == {} and alone.peak(1) > alone.peak(0)
    halves = planned(config.model_copy(update={"precision": "bf16"}), 512, "v100")
    assert halves.memory[0]["update"]["copies of gradients"] == 4 * N and halves.memory[1]["update"]["weights"] == 2 * N


def test_time_follows_the_formula_of_the_published_run(planned, capsys):
    """1.8 img/s a V100 and 155 thousand GPU-hours a billion images at 8 %: 2x224 + 4x96, four times the forward."""
    assert main(["plan", "recipe=seer_regnety_256gf", "gpus=512", "gpu=v100"]) == 0
    told = capsys.readouterr().out
    for part in ("1,431,032,042", "254.4 G", "1.79", "154,8", "zero_stage=", "Assumed:", "A V100 has no bf16"):
        assert part in told, told
    # a batch that the V100 of 16 GB cannot hold under any stage
    assert main(["plan", "recipe=seer_regnety_256gf", "gpus=2", "gpu=v100-16"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Does not fit" in told and "take more GPUs" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpus=2", "gpu=h100"], "recipe=… is missing"),
        (["recipe=tiny_swav", "gpus=x", "gpu=h100"], "whole number"),
        (["recipe=tiny_swav", "gpus=2", "gpu=k80"], "got k80"),
        (["recipe=tiny_swav", "gpus=3", "gpu=h100"], "batch_size must be a multiple"),
    ],
)
def test_mistakes_are_one_sentence(capsys, words, said):
    assert main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_accelerators_are_known_by_their_names():
    names = {"NVIDIA H100 80GB HBM3": "h100", "Tesla V100-SXM2-32GB": "v100", "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA H200": "h200"}
    for shown, key in names.items():
        assert next(k for k, known in ACCELERATORS.items() if all(mark in shown for mark in known.marks)) == key
    assert 0.1 * GIB < accelerator("cpu").memory < 10_000 * GIB


def test_what_was_measured_was_foretold():
    """benchmarks/engine/seer_step.py stores both; the plan of today still says the same of the smallest network."""
    rows = measure.load(measure.RESULTS / "seer_step.jsonl")
    assert rows
    for row in rows:
        assert abs(row["foretold_gib"] / row["peak_gib"] - 1) < 0.10, row
    row = next(row for row in rows if row["case"].startswith("8gf, ZeRO 0"))
    large, small_px = (part.partition("×")[2].split()[0] for part in row["shape"].split(" of ")[1].split(" + "))
    options = {**seer_step.OPTIONS, "case": "8gf", "large": large, "small": small_px}
    foretold = plan.plan(seer_step.config_of(options), 1, "cpu").peak(0) / GIB
    assert foretold == pytest.approx(row["foretold_gib"], rel=0.02)
