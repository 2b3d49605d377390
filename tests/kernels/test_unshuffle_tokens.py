"""Are kept tokens back in MAE's places, with gradients in every dtype's own, and wrong orders refused?"""

import pytest
import torch
from grid import of as cases_of
from grid import over, trials, widest

from fuseer.kernels.patch_mask import patch_mask
from fuseer.kernels.unshuffle_tokens import cases, unshuffle_tokens

EVERY_BACKEND = over(widest("unshuffle_tokens"))


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def order(B, P, seed=0):
    return torch.rand((B, P), generator=torch.Generator().manual_seed(seed)).argsort(1)


def forward_decoder(x, ids_restore, mask_token, pos_embed):
    """The lines of MAE's decoder between its embedding and its blocks, without the class token."""
    mask_tokens = mask_token.view(1, 1, -1).repeat(x.shape[0], ids_restore.shape[1] - x.shape[1], 1)
    x_ = torch.cat([x, mask_tokens], dim=1)
    x_ = torch.gather(x_, dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    return x_ + pos_embed


@EVERY_BACKEND
@pytest.mark.parametrize(("P", "keep"), [(9, 1), (9, 8), (16, 4), (1, 1), (5, 0)])
def test_is_maes_decoder_to_the_bit(trial, P, keep):
    """Sums of two numbers are rounded alike; the gradient of x is copies."""
    leaves = [x.to(trial.device, trial.dtype).requires_grad_() for x in (normal(3, keep, 6), normal(6, seed=1), normal(P, 6, seed=2))]
    ids = order(3, P).to(trial.device)
    out, expected = (f(leaves[0], ids, *leaves[1:]) for f in (trial.call, forward_decoder))
    assert torch.equal(out, expected)
    dout = normal(*out.shape, seed=3).to(out)
    found, wanted = (torch.autograd.grad(y, leaves, dout) for y in (out, expected))
    assert torch.equal(found[0], wanted[0])
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@EVERY_BACKEND
def test_tokens_wider_than_what_is_taken_at_once(trial):
    """2,048 numbers by a thread, 1,024 by a Triton program."""
    D = 1030 if trial.backend == "triton" and trial.device == "cpu" else 4100
    x, token, pos = (y.to(trial.device, trial.dtype) for y in (normal(2, 1, D), normal(D, seed=1), normal(3, D, seed=2)))
    ids = order(2, 3).to(trial.device)
    assert torch.equal(trial.call(x, ids, token, pos), forward_decoder(x, ids, token, pos))


@EVERY_BACKEND
def test_undoes_patch_mask(trial):
    """Tokens of the kept patches come back where they were, the mask token elsewhere."""
    x, noise = normal(4, 30, 8).to(trial.device, trial.dtype), torch.rand(4, 30).to(trial.device)
    ids_keep, ids_restore, mask = patch_mask(noise, 7)
    out = trial.call(x.gather(1, ids_keep[..., None].expand(4, 7, 8)), ids_restore, torch.full((8,), 9.0).to(x))
    assert torch.equal(out, torch.where(mask[..., None] == 0, x, torch.full_like(x, 9.0)))


@EVERY_BACKEND
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_float_parameters_and_half_tokens(trial, half):
    """As under autocast: the sum is made in float32 and rounded once, each gradient has the dtype of what it is of."""
    x = normal(2, 3, 5).to(trial.device, half).requires_grad_()
    token, pos = (x.to(trial.device, torch.float32).requires_grad_() for x in (normal(5, seed=1), normal(8, 5, seed=2)))
    ids = order(2, 8).to(trial.device)
    out = trial.call(x, ids, token, pos)
    assert torch.equal(out, forward_decoder(x.float(), ids, token, pos).to(half))
    dout = normal(2, 8, 5, seed=3).to(out)
    found = torch.autograd.grad(out, (x, token, pos), dout)
    assert [x.dtype for x in found] == [half, torch.float32, torch.float32]
    torch.testing.assert_close(found[2], dout.float().sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1], dout.float()[ids >= 3].sum(0), rtol=1e-6, atol=1e-6)


@EVERY_BACKEND
def test_many_summands_are_not_lost(trial):
    """90,000 ones of which float16 alone would stop counting at 2,048: the sum in float32 parameters is exact."""
    B, P, D = (3, 30, 4) if trial.backend == "triton" and trial.device == "cpu" else (3000, 30, 4)
    x = torch.zeros(B, 0, D, device=trial.device, dtype=torch.float16)
    token, pos = (torch.zeros(*n, D, device=trial.device, requires_grad=True) for n in ((), (P,)))
    trial.call(x, order(B, P).to(trial.device), token, pos).backward(torch.ones(B, P, D, device=trial.device, dtype=torch.float16))
    assert (token.grad == B * P).all() and (pos.grad == B).all()


@EVERY_BACKEND
def test_fixed_positions_cost_no_gradient(trial):
    """A pos_embed that asks for none is not summed for: the raw op returns nothing in its place."""
    x, token = normal(2, 3, 5).to(trial.device, trial.dtype), normal(5).to(trial.device, trial.dtype).requires_grad_()
    pos, ids, asked = normal(8, 5).to(x), order(2, 8).to(trial.device), []
    raw = trial.module.RAW_BACKWARD[trial.backend]
    given = pytest.MonkeyPatch()
    with given.context() as patch:
        patch.setitem(trial.module.RAW_BACKWARD, trial.backend, lambda *args: asked.append(args) or raw(*args))
        trial.call(x, ids, token, pos).sum().backward()
    assert asked[0][-1] is None and raw(*asked[0])[2].numel() == 0
    assert torch.equal(token.grad, torch.full_like(token, 10.0))


@over(trials((torch.float32,), cases_of("unshuffle_tokens", cases.CASES[0])))
def test_keeps_the_ids_alone(trial):
    arguments, kept = trial.arguments(), []
    arguments |= {name: arguments[name].requires_grad_() for name in trial.differentiable}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        trial.call(**arguments)
    assert [x.data_ptr() for x in kept] == [arguments["ids_restore"].data_ptr()]
    out = trial.call(**arguments)
    arguments["ids_restore"].copy_(arguments["ids_restore"].flip(1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@EVERY_BACKEND
@pytest.mark.parametrize(
    ("row", "words"), [([0, 1, 3, 4], r"must be in 0\.\.3; got 0\.\.4"), ([0, 1, 1, 3], "each of 0..3 once in every row")]
)
def test_what_is_no_permutation_is_refused(trial, row, words, monkeypatch):
    """On a GPU under the flag."""
    monkeypatch.setenv("FUSEER_CHECK_INDICES", "1")
    ids = torch.tensor([[3, 1, 0, 2], row], device=trial.device)
    with pytest.raises(ValueError, match=f"^unshuffle_tokens: ids_restore .*{words}"):
        trial.call(normal(2, 2, 3).to(trial.device, trial.dtype), ids, torch.zeros(3).to(trial.device, trial.dtype))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.ones(2, 4)}, ValueError, r"x must be \[B, keep, D\]; got \[2, 4\]"),
        ({"x": torch.ones(2, 6, 3)}, ValueError, "x must hold at most P = 5 tokens an image, one for each of ids_restore; got 6"),
        ({"ids_restore": torch.zeros(2, 5)}, TypeError, r"ids_restore must be an int64 tensor \[B, P\]; got torch.float32"),
        ({"ids_restore": torch.zeros(3, 5).long()}, ValueError, r"ids_restore must be \[B = 2, P\]; got \[3, 5\]"),
        ({"mask_token": None}, TypeError, "mask_token must be a tensor"),
        ({"mask_token": torch.zeros(1, 1, 3)}, ValueError, r"mask_token must be \[D\]; got \[1, 1, 3\]"),
        ({"mask_token": torch.zeros(4)}, ValueError, r"mask_token must be \[D\] = \[3\]; got \[4\]"),
        ({"pos_embed": torch.zeros(6, 3)}, ValueError, r"pos_embed must be \[P, D\] = \[5, 3\]; got \[6, 3\]"),
        ({"pos_embed": torch.zeros(5, 3, device="meta")}, ValueError, "pos_embed must be on the device of x; got meta and cpu"),
    ],
)
def test_refuses(changes, error, words):
    arguments = {"x": torch.ones(2, 2, 3), "ids_restore": order(2, 5), "mask_token": torch.zeros(3), **changes}
    with pytest.raises(error, match=f"^unshuffle_tokens: .*{words}"):
        unshuffle_tokens(**arguments)
