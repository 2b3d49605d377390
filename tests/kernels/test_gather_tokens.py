"""Does a gather of tokens give torch.gather's rows and gradient, keep nothing but ids, and refuse wrong ones?"""

import pytest
import torch
from grid import LAYOUTS, over, trials, widest
from grid import of as cases_of

from fuseer.kernels import dispatch
from fuseer.kernels.gather_tokens import cases, gather_tokens

EVERY_BACKEND = over(widest("gather_tokens"))
HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def any_ids(*shape, below, seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def gathered(x, ids):
    """MAE's way: an index of int64 as large as what is gathered."""
    return torch.gather(x, 1, ids.unsqueeze(-1).repeat(1, 1, x.shape[2]))


@EVERY_BACKEND
@HALVES
def test_is_torch_gather_to_the_bit_forward_and_backward(trial, dtype):
    """The gradient too, as long as no token is taken twice: then it is copies and zeros."""
    x, ids = normal(3, 20, 12).to(trial.device, dtype).requires_grad_(), torch.rand(3, 20).argsort(1)[:, :7].to(trial.device)
    out, expected = trial.call(x, ids), gathered(x, ids)
    dout = normal(3, 7, 12, seed=1).to(out)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(y, x, dout)[0] for y in (out, expected)))


@EVERY_BACKEND
def test_a_token_taken_often_gets_the_sum(trial):
    """300 ones, of which bfloat16 alone would stop counting at 256."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.zeros(1, 3, 5, device=trial.device, dtype=dtype, requires_grad=True)
        trial.call(x, torch.ones(1, 300, dtype=torch.int64, device=trial.device)).sum().backward()
        assert torch.equal(x.grad.cpu(), torch.tensor([0.0, 300.0, 0.0]).to(dtype)[None, :, None].expand(1, 3, 5))


def laid_out(x, device):
    """x on the device with its strides."""
    if 0 in x.stride():
        return x[:1].to(device).expand(x.shape)
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


@EVERY_BACKEND
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_ids_of_any_strides(trial, layout):
    dense = any_ids(4, 6, below=9)
    ids = {
        "transposed": dense.t().contiguous().t(),
        "sliced": torch.full((4, 13), -1).index_copy(1, torch.arange(1, 13, 2), dense)[:, 1::2],
        "expanded": dense[:1].expand(4, 6),
    }[layout]
    x = normal(4, 9, 5).to(trial.device).requires_grad_()
    out, expected = trial.call(x, laid_out(ids, trial.device)), gathered(x, ids.to(trial.device))
    assert torch.equal(out, expected)
    dout = normal(4, 6, 5, seed=1).to(out)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, dout)[0] for y in (out, expected)), rtol=1e-6, atol=1e-6)


@over(trials((torch.float32, torch.bfloat16), cases_of("gather_tokens", cases.CASES[2])))
def test_a_cotangent_that_lies_anyhow(trial):
    leaves = trial.arguments()
    x = leaves["x"].requires_grad_()
    out = trial.call(**leaves)
    dout = normal(*out.shape).to(out)
    plain = torch.autograd.grad(out, x, dout, retain_graph=True)[0]
    for name, layout in LAYOUTS.items():
        assert torch.equal(torch.autograd.grad(out, x, layout(dout), retain_graph=True)[0], plain), name


@EVERY_BACKEND
def test_infinities_and_nan_stay_in_their_rows(trial):
    x = normal(1, 4, 3).to(trial.device)
    x[0, 1, 2], x[0, 3, 0] = torch.nan, torch.inf
    out = trial.call(x, torch.tensor([[3, 0, 1]], device=trial.device))
    assert torch.equal(out.isnan().nonzero().cpu(), torch.tensor([[0, 2, 2]]))
    assert torch.equal(out.isinf().nonzero().cpu(), torch.tensor([[0, 0, 0]]))


@EVERY_BACKEND
def test_keeps_the_ids_alone(trial):
    x, ids, kept = normal(2, 30, 40).to(trial.device).requires_grad_(), any_ids(2, 5, below=30).to(trial.device), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        trial.call(x, ids)
    assert [x.data_ptr() for x in kept] == [ids.data_ptr()]
    out = trial.call(x, ids)
    ids.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@EVERY_BACKEND
@pytest.mark.parametrize("wrong", [-1, 9, 2**33])
def test_an_id_outside_is_refused(trial, wrong, monkeypatch):
    """On a GPU under the flag; without it such a row is NaN."""
    ids = any_ids(2, 4, below=9)
    ids[1, 2] = wrong
    x, ids = normal(2, 9, 3).to(trial.device), ids.to(trial.device)
    monkeypatch.setenv("FUSEER_CHECK_INDICES", "1")
    with pytest.raises(ValueError, match=r"^gather_tokens: ids must be in 0\.\.8; got -?\d+\.\.\d+$"):
        trial.call(x, ids)
    if trial.device == "cuda" and trial.backend == "triton":
        monkeypatch.delenv("FUSEER_CHECK_INDICES")
        assert not dispatch.indices_are_checked(x.device)
        assert torch.equal(trial.call(x, ids).isnan().all(2), (ids < 0) | (ids > 8))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"x": torch.ones(2, 4)}, ValueError, r"x must be \[B, P, D\]; got \[2, 4\]"),
        ({"x": torch.ones(2, 4, 3).int()}, TypeError, "x must be float16"),
        ({"ids": [0]}, TypeError, r"ids must be an int64 tensor \[B, M\]; got list"),
        ({"ids": torch.zeros(2, 3)}, TypeError, r"ids must be an int64 tensor \[B, M\]; got torch.float32"),
        ({"ids": torch.zeros(2, 3).int()}, TypeError, "ids must be an int64 tensor .*; got torch.int32"),
        ({"ids": torch.zeros(3, 3).long()}, ValueError, r"ids must be \[B = 2, M\]; got \[3, 3\]"),
        ({"ids": torch.zeros(2).long()}, ValueError, r"ids must be \[B = 2, M\]; got \[2\]"),
        ({"ids": torch.zeros(2, 3, device="meta").long()}, ValueError, "ids must be on the device of x; got meta and cpu"),
    ],
)
def test_refuses(changes, error, words):
    with pytest.raises(error, match=f"^gather_tokens: .*{words}"):
        gather_tokens(**{"x": torch.ones(2, 4, 3), "ids": torch.zeros(2, 3).long(), **changes})
