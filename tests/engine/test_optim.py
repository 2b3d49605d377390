"""Do the optimizers compute their published formulas and honour tags?"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fuseer.engine.config import OptimConfig
from fuseer.engine.optim import LARC, AdamW, build_optimizer, layout


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 4)
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


def test_larc_is_the_published_formula():
    toy, optimizer = prepared("larc", weight_decay=0.1, momentum=0.9, trust_coefficient=0.02, eps=1e-8)
    assert isinstance(optimizer, LARC)
    truth = {name: p.detach().double() for name, p in toy.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in truth.items()}
    for step in range(3):
        set_gradients(toy, step)
        for name, p in toy.named_parameters():
            w, g = truth[name], p.grad.double()
            if w.norm() > 0 and g.norm() > 0:
                g = 0.02 * w.norm() / (g.norm() + 0.1 * w.norm() + 1e-8) * (g + 0.1 * w)
            momentum[name] = 0.9 * momentum[name] + g
            truth[name] = w - 0.5 * momentum[name]
        truth["prototypes"] = F.normalize(truth["prototypes"], dim=1)
        optimizer.step()
        for name, p in toy.named_parameters():
            torch.testing.assert_close(p.double(), truth[name], rtol=1e-5, atol=1e-6, msg=name)


def test_larc_leaves_a_zero_gradient_alone():
    toy, optimizer = prepared("larc", weight_decay=0.1)
    before = toy.body.weight.detach().clone()
    set_gradients(toy, 0)
    toy.body.weight.grad.zero_()
    optimizer.step()
    assert torch.equal(toy.body.weight, before)


@pytest.mark.parametrize("name", ["larc", "sgd", "adamw"])
def test_frozen_is_untouched_and_unit_rows_stay_unit(name):
    toy, optimizer = prepared(name, weight_decay=0.1)
    before = toy.prototypes.detach().clone()
    toy.prototypes.frozen = True
    set_gradients(toy, 0)
    optimizer.step()
    state = optimizer.state[toy.prototypes]
    assert torch.equal(toy.prototypes, before), "no update, no decay"
    assert all(not value.any() for value in state.values()), "no momentum"
    toy.prototypes.frozen = False
    set_gradients(toy, 1)
    optimizer.step()
    assert not torch.equal(toy.prototypes, before)
    torch.testing.assert_close(toy.prototypes.norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)
    assert len(optimizer.param_groups) == (3 if name == "adamw" else 2), "the hidden groups came back"


def test_adamw_does_not_decay_thin_parameters():
    toy, optimizer = prepared("adamw", weight_decay=0.1)
    assert isinstance(optimizer, AdamW)
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {"weights": 0.1, "norms and biases": 0.0, "prototypes": 0.1}


def test_adamw_decays_thin_parameters_where_told():
    _, optimizer = prepared("adamw", weight_decay=0.1, decay_thin=True)
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {"weights": 0.1, "prototypes": 0.1}


def test_sgd_leaves_thin_parameters_undecayed_where_told():
    _, optimizer = prepared("sgd", weight_decay=0.1, decay_thin=False)
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {"weights": 0.1, "norms and biases": 0.0, "prototypes": 0.1}


@pytest.mark.parametrize(("adapt", "decay"), [(True, True), (True, False), (False, True), (False, False)])
def test_larc_treats_thin_parameters_as_told(adapt, decay):
    """adapt False, decay False is the exclusion of biases and norms from both that SimCLR's and MoCo v3's LARS make."""
    toy, optimizer = prepared("larc", weight_decay=0.1, momentum=0.9, trust_coefficient=0.02, adapt_thin=adapt, decay_thin=decay)
    toy.prototypes.frozen = True
    nn.init.normal_(toy.zero)
    truth = {name: p.detach().double() for name, p in toy.named_parameters() if name != "prototypes"}
    momentum = {name: torch.zeros_like(p) for name, p in truth.items()}
    for step in range(3):
        set_gradients(toy, step)
        for name, w in truth.items():
            g, thin = toy.get_parameter(name).grad.double(), w.ndim <= 1
            wd = 0.1 if decay or not thin else 0.0
            rate = 0.02 * w.norm() / (g.norm() + wd * w.norm() + 1e-8) if adapt or not thin else 1.0
            momentum[name] = 0.9 * momentum[name] + rate * (g + wd * w)
            truth[name] = w - 0.5 * momentum[name]
        optimizer.step()
        for name, w in truth.items():
            torch.testing.assert_close(toy.get_parameter(name).double(), w, rtol=1e-5, atol=1e-6, msg=name)


def test_a_tagged_thin_parameter_is_treated_as_thin():
    toy = Toy()
    toy.zero.frozen = False
    optimizer = build_optimizer(toy, OptimConfig(name="larc", lr=0.5, weight_decay=0.1, adapt_thin=False, decay_thin=False))
    assert {g["name"]: (g["adapt"], g["decay"]) for g in optimizer.param_groups} == {
        "weights": (True, 0.1), "norms and biases": (False, 0.0), "zero": (False, 0.0), "prototypes": (True, 0.1),
    }  # fmt: skip
