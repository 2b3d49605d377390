"""Do the optimizers compute their published formulas and honour tags?"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fuseer.engine.config import OptimConfig
from fuseer.engine.models.norm import BatchNorm
from fuseer.engine.optim import LARS, VARIANTS, AdamW, build_optimizer
from fuseer.engine.partitions import layout

LR, WD, TRUST, MOMENTUM = (0.5, 0.25, 0.5, 0.125), 0.1, 0.02, 0.9
# what a parameter of Toy is called, and which variants neither decay nor adapt it
SPARED = {
    "body.weight": (),
    "body.bias": ("mocov3", "simclr", "byol", "paws"),
    "bn.weight": ("mocov3", "simclr", "byol", "paws"),
    "bn.bias": ("mocov3", "simclr", "byol", "paws"),
    # two norms that go by another name, one of them with two dimensions
    "downsample.weight": ("mocov3", "simclr", "byol"),
    "downsample.bias": ("mocov3", "simclr", "byol", "paws"),
    "plane.weight": ("simclr", "byol"),
    "plane.bias": ("simclr", "byol", "paws"),
    "scale": ("mocov3",),
    "zero": ("mocov3",),
    "prototypes": (),
}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 4)
        self.bn, self.downsample, self.plane = BatchNorm(4), BatchNorm(3), nn.LayerNorm((2, 3))
        self.scale = nn.Parameter(torch.randn(4))
        self.zero = nn.Parameter(torch.zeros(3))
        self.prototypes = nn.Parameter(F.normalize(torch.randn(6, 4), dim=1))
        self.prototypes.unit_rows = True
        self.prototypes.frozen = False


def prepared(name: str, **options):
    toy = Toy()
    optimizer = build_optimizer(toy, OptimConfig(name=name, lr=0.5, **options))
    optimizer.bind(layout(toy, None), None, partitioned=False)
    return toy, optimizer


def set_gradients(toy: Toy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in toy.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def published(variant: str, w, g, buf, lr: float, spared: bool):
    """(w, buf) after one step as the five codes have it, line by line; a norm that is 0 means a ratio of 1."""
    if spared:
        wd, rate = 0.0, 1.0
    elif variant in ("larc", "paws"):
        live = w.norm() > 0 and g.norm() > 0
        wd, rate = (WD, TRUST * w.norm() / (g.norm() + WD * w.norm() + 1e-8)) if live else (0.0, 1.0)
    else:
        both = (g + WD * w).norm()
        wd, rate = WD, TRUST * w.norm() / both if w.norm() > 0 and both > 0 else 1.0
    d = rate * (g + wd * w)
    if variant in ("simclr", "paws"):
        buf = MOMENTUM * buf + lr * d
        return w - buf, buf
    buf = MOMENTUM * buf + d
    return w - lr * buf, buf


@pytest.mark.parametrize("variant", VARIANTS)
def test_lars_is_the_published_formula(variant):
    toy, optimizer = prepared("lars", variant=variant, weight_decay=WD, momentum=MOMENTUM, trust_coefficient=TRUST)
    assert isinstance(optimizer, LARS) and SPARED.keys() == dict(toy.named_parameters()).keys()
    truth = {name: (p.detach().double(), torch.zeros_like(p, dtype=torch.float64)) for name, p in toy.named_parameters()}
    for step, lr in enumerate(LR):
        set_gradients(toy, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, (w, buf) in truth.items():
            truth[name] = published(variant, w, toy.get_parameter(name).grad.double(), buf, lr, variant in SPARED[name])
        w, buf = truth["prototypes"]
        truth["prototypes"] = F.normalize(w, dim=1), buf
        optimizer.step()
        for name, (w, buf) in truth.items():
            torch.testing.assert_close(toy.get_parameter(name).double(), w, rtol=1e-5, atol=1e-6, msg=name)
            found = optimizer.state[toy.get_parameter(name)]["momentum_buffer"].double()
            torch.testing.assert_close(found, buf, rtol=1e-5, atol=1e-6, msg=name)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="LARS: variant must be one of larc, .*; got 'lamb'"):
        LARS([nn.Parameter(torch.ones(2))], lr=1.0, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001, variant="lamb")


def test_larc_leaves_a_zero_gradient_alone():
    toy, optimizer = prepared("lars", weight_decay=0.1)
    before = toy.body.weight.detach().clone()
    set_gradients(toy, 0)
    toy.body.weight.grad.zero_()
    optimizer.step()
    assert torch.equal(toy.body.weight, before)


@pytest.mark.parametrize("bad", [1.0, torch.inf, torch.nan], ids=["told", "inf", "nan"])
@pytest.mark.parametrize("kind", ["lars", "sgd", "adamw", "sgd, fused", "adamw, fused"])
def test_a_step_thrown_away_changes_nothing(kind, bad):
    """Told by the flag, read at each step anew, or by a gradient; rows that are to be unit are not divided again. Fused as on GPUs."""
    name, _, fused = kind.partition(", ")
    toy, optimizer = prepared(name, weight_decay=0.1)
    for settings in (optimizer.defaults, *optimizer.param_groups) if fused else ():
        settings["fused"] = True
    optimizer.skip = torch.tensor(0.0)
    set_gradients(toy, 0)
    optimizer.step()
    # not quite unit, so that a division would show
    toy.prototypes.data.mul_(1.01)
    before = {name: p.detach().clone() for name, p in toy.named_parameters()}
    states = {name: {key: x.clone() for key, x in optimizer.state[p].items()} for name, p in toy.named_parameters()}
    set_gradients(toy, 1)
    toy.body.weight.grad[0, 0] = bad
    optimizer.skip.fill_(bad == 1.0)
    assert not optimizer.thrown
    optimizer.step()
    assert optimizer.thrown
    for name, p in toy.named_parameters():
        assert torch.equal(p, before[name]), name
        assert all(torch.equal(x, states[name][key]) for key, x in optimizer.state[p].items()), name
    toy.body.weight.grad[0, 0] = 1.0
    optimizer.skip.zero_()
    optimizer.step()
    assert not optimizer.thrown
    assert not any(torch.equal(p, before[name]) for name, p in toy.named_parameters())


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_frozen_is_untouched_and_unit_rows_stay_unit(name):
    toy, optimizer = prepared(name, weight_decay=0.1)
    before = toy.prototypes.detach().clone()
    toy.prototypes.frozen = True
    set_gradients(toy, 0)
    optimizer.step()
    state = optimizer.state[toy.prototypes]
    assert torch.equal(toy.prototypes, before), "no update, no decay"
    assert state.keys() == set(optimizer.state_names) and all(not value.any() for value in state.values()), "no momentum"
    toy.prototypes.frozen = False
    set_gradients(toy, 1)
    optimizer.step()
    assert not torch.equal(toy.prototypes, before)
    torch.testing.assert_close(toy.prototypes.norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)
    assert len(optimizer.param_groups) == (3 if name == "adamw" else 2), "the hidden groups came back"


def decays(optimizer) -> dict[str, float]:
    return {group["name"]: group["weight_decay"] for group in optimizer.param_groups}


def test_adamw_does_not_decay_thin_parameters():
    _, optimizer = prepared("adamw", weight_decay=0.1)
    assert isinstance(optimizer, AdamW)
    assert decays(optimizer) == {"weights": 0.1, "norms and biases": 0.0, "prototypes": 0.1}


def test_adamw_decays_thin_parameters_where_told():
    _, optimizer = prepared("adamw", weight_decay=0.1, decay_thin=True)
    assert decays(optimizer) == {"weights": 0.1, "prototypes": 0.1}


def test_sgd_leaves_thin_parameters_undecayed_where_told():
    _, optimizer = prepared("sgd", weight_decay=0.1, decay_thin=False)
    assert decays(optimizer) == {"weights": 0.1, "norms and biases": 0.0, "prototypes": 0.1}


def test_a_tagged_parameter_is_spared_as_any_other_and_what_is_not_trained_has_no_group():
    toy = Toy()
    toy.zero.frozen = False
    toy.scale.requires_grad_(False)
    optimizer = build_optimizer(toy, OptimConfig(name="lars", variant="mocov3", lr=0.5, weight_decay=0.1))
    assert {g["name"]: (g["adapt"], g["weight_decay"]) for g in optimizer.param_groups} == {
        "weights": (True, 0.1), "norms and biases": (False, 0.0), "zero": (False, 0.0), "prototypes": (True, 0.1),
    }  # fmt: skip
    named = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(named) == sorted(SPARED.keys() - {"scale"}) == sorted(piece.name for piece in layout(toy, None))
