"""Do the drop-in losses give what lightly's give, where lightly is installed and right?"""

import warnings

import pytest
import torch

from fuseer.kernels import modules
from tests.ranks import on_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("lightly.loss", reason="lightly is in the extra bench", exc_type=ImportError)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outcome(criterion, leaves, *rest):
    """(the loss as a scalar, its gradients at the leaves)"""
    loss = criterion(*leaves, *rest)
    return loss.detach().squeeze(), torch.autograd.grad(loss.squeeze(), leaves)


def same(found, expected, tolerance):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=0)
    for ours, its in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, its, rtol=0, atol=10 * tolerance * its.abs().max().item())


# a bank of lightly's is float32
def pair_of_banks(temperature, gather=False, size=(32, 8)):
    """(ours, lightly's) with the same rows."""
    own = modules.NTXentLoss(temperature, size, gather)
    its = theirs.NTXentLoss(temperature, memory_bank_size=size, gather_distributed=gather)
    own.memory_bank.rows.copy_(its.memory_bank.bank)
    return own, its


@pytest.mark.parametrize("temperature", [0.5, 0.1, -0.3])
def test_the_contrastive_loss(temperature):
    leaves = [normal(9, 6, seed=seed).requires_grad_() for seed in range(2)]
    same(*(outcome(library.NTXentLoss(temperature), leaves) for library in (modules, theirs)), tolerance=1e-11)


@pytest.mark.parametrize("temperature", [0.5, 0.07, -0.3])
def test_mocos_loss_over_the_steps_until_the_bank_wraps_around(temperature):
    own, its = pair_of_banks(temperature)
    for step, batch in enumerate((9, 4, 11, 7)):
        leaf, keys = normal(batch, 8, seed=step, dtype=torch.float32).requires_grad_(), normal(batch, 8, seed=step + 9, dtype=torch.float32)
        same(*(outcome(criterion, [leaf], keys) for criterion in (own, its)), tolerance=2e-6)
        torch.testing.assert_close(own.memory_bank.rows, its.memory_bank.bank, rtol=0, atol=1e-7)
    assert own.memory_bank.pointer.item() == its.memory_bank.bank_ptr.item() == 31


def test_at_the_end_of_the_ring_lightly_drops_what_ours_keeps():
    """Should lightly one day keep the tail of the batch as well, the documentation's word about it is to go."""
    own, its = pair_of_banks(0.2)
    for criterion in (own, its):
        for step in range(2):
            criterion(normal(20, 8, seed=step, dtype=torch.float32).requires_grad_(), normal(20, 8, seed=step + 9, dtype=torch.float32))
    tail = torch.nn.functional.normalize(normal(20, 8, seed=10, dtype=torch.float32), dim=1)[12:]
    assert torch.equal(own.memory_bank.rows[:8], tail) and own.memory_bank.pointer.item() == 8
    assert not torch.isclose(its.memory_bank.bank[:8], tail).all(1).any() and its.memory_bank.bank_ptr.item() == 0


@pytest.mark.parametrize(("high", "low", "queued"), [(2, 0, None), (2, 3, None), (3, 2, 9)])
def test_swavs_loss(high, low, queued):
    leaves = [normal(7, 6, seed=seed).clamp(-1, 1).requires_grad_() for seed in range(high + low)]
    queue = None if queued is None else [normal(queued, 6, seed=seed + 50).clamp(-1, 1) for seed in range(high)]

    def called(library):
        criterion = library.SwaVLoss(0.2, 2, 0.3)
        return outcome(lambda *crops: criterion(list(crops[:high]), list(crops[high:]), queue), leaves)

    same(called(modules), called(theirs), tolerance=1e-11)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("NTXentLoss", {"temperature": 1e-9}), ("NTXentLoss", {"memory_bank_size": 64}), ("NTXentLoss", {"memory_bank_size": (64, -1)})],
)
def test_both_refuse(name, arguments):
    for library in (modules, theirs):
        with pytest.raises(ValueError, match=r"temperature|size|Queue"):
            getattr(library, name)(**arguments)


def of_rank(rank):
    """{loss: (ours, lightly's)} on one of two ranks with different data and as many rows."""
    pairs = [normal(5, 6, seed=10 * rank + seed).requires_grad_() for seed in range(2)]
    crops = [normal(5, 6, seed=10 * rank + seed + 3).clamp(-1, 1).requires_grad_() for seed in range(3)]
    query, keys = (normal(5, 8, seed=10 * rank + seed, dtype=torch.float32) for seed in (7, 8))
    found = {"pairs": [outcome(library.NTXentLoss(0.3, gather_distributed=True), pairs) for library in (modules, theirs)]}
    swav = [library.SwaVLoss(0.2, 2, 0.3, sinkhorn_gather_distributed=True) for library in (modules, theirs)]
    found["swav"] = [outcome(lambda a, b, c, loss=criterion: loss([a, b], [c]), crops) for criterion in swav]
    torch.manual_seed(3)
    banks = pair_of_banks(0.3, gather=True)
    found["bank"] = [outcome(criterion, [query.requires_grad_()], keys) for criterion in banks]
    found["rows"] = [banks[0].memory_bank.rows, banks[1].memory_bank.bank]
    return found


def test_over_two_ranks_with_as_many_rows_value_and_gradient_are_lightlys():
    for found in on_ranks(2, of_rank):
        torch.testing.assert_close(*found.pop("rows"), rtol=0, atol=1e-7)
        for name, both in found.items():
            same(*both, tolerance=2e-6 if name == "bank" else 1e-11)
