"""Does info_nce have its published values, its two kinds of positives and its refusals, on every path and in O(N·D) memory?"""

import math
import subprocess
import sys

import pytest
import torch
from grid import DEVICES, INTERPRETED, of, threads, trials
from torch.nn import functional as F

from fuseer.kernels.functional import info_nce
from fuseer.kernels.info_nce.cases import _case

BACKENDS = sorted({(trial.backend, trial.device) for trial in trials((torch.float32,)) if trial.op == "info_nce"})
EVERYWHERE = pytest.mark.parametrize(("backend", "device"), BACKENDS)
# several runs of keys and a part of one, and more queries than a tile holds, with and without a known bound of the logits
WIDE = (
    _case("many_keys", (20, 1111, 18)),
    _case("many_queries", (300, 530, 18), indexed=True),
    _case("few_keys", (300, 33, 19), indexed=True),
    _case("many_keys_cold", (20, 1111, 18), temperature=0.01),
    _case("many_dot_products", (290, 777, 18), normalize=False, temperature=2.0, indexed=True),
    _case("many_converged", (40, 900, 48), noise=0.01, indexed=True),
)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def published(query, keys, positive, temperature):
    """MoCo's loss as its authors wrote it down: the positive's logit before those of the queue, label 0."""
    query, keys, positive = (F.normalize(x, dim=1) for x in (query, keys, positive))
    logits = torch.cat([torch.einsum("nd,nd->n", query, positive)[:, None], torch.einsum("nd,qd->nq", query, keys)], 1)
    return F.cross_entropy(logits / temperature, torch.zeros(len(query), dtype=torch.int64))


@EVERYWHERE
def test_the_published_losses(backend, device):
    query, keys, positive = (normal(n, 8, seed=n, dtype=torch.float64) for n in (6, 17, 6))
    expected = published(query, keys, positive, 0.2).item()
    on = [x.float().to(device) for x in (query, keys, positive)]
    assert info_nce(on[0], on[1], positive=on[2], backend=backend).item() == pytest.approx(expected, rel=2e-6)
    index = torch.tensor([3, 0, 16, 16, 7, 2])
    unit = [F.normalize(x, dim=1) for x in (query, keys)]
    expected = F.cross_entropy(unit[0] @ unit[1].T / 0.7, index).item()
    found = info_nce(on[0], on[1], positive_index=index.to(device), temperature=0.7, backend=backend)
    assert found.item() == pytest.approx(expected, rel=2e-6)


@EVERYWHERE
def test_a_positive_by_index_is_one_by_itself_among_the_other_keys(backend, device):
    query, keys = normal(1, 8).to(device), normal(12, 8, seed=1).to(device)
    by_index = info_nce(query, keys, positive_index=torch.tensor([5], device=device), backend=backend)
    others = torch.cat([keys[:5], keys[6:]])
    torch.testing.assert_close(info_nce(query, others, positive=keys[5:6], backend=backend), by_index, rtol=1e-6, atol=0)


@EVERYWHERE
def test_keys_that_are_all_alike_are_at_chance(backend, device):
    one = torch.ones(3, 4, device=device)
    assert info_nce(one, torch.ones(20, 4, device=device), positive=one, backend=backend).item() == pytest.approx(math.log(21), rel=1e-6)


@EVERYWHERE
def test_keys_may_be_overwritten_before_the_backward(backend, device):
    """As a queue does: with what the loss saw the gradient stays right."""
    query, keys = normal(4, 6).to(device).requires_grad_(), normal(9, 6, seed=1).to(device)
    (expected,) = torch.autograd.grad(info_nce(query, keys, positive=keys[:4].clone(), backend=backend), query)
    loss = info_nce(query, keys, positive=keys[:4].clone(), backend=backend)
    keys.fill_(7.0)
    assert torch.equal(torch.autograd.grad(loss, query)[0], expected)


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.skipif(INTERPRETED, reason="threads are the CPU's")
def test_blocks_and_threads(case, count):
    for trial in trials(chosen=of("info_nce", case)):
        if trial.backend == "cpu":
            with threads(count):
                found = trial.verdicts()
            assert all(found.values()), (str(trial), {name: str(verdict) for name, verdict in found.items()})


@pytest.mark.skipif(INTERPRETED or ("cpu", "cpu") not in BACKENDS, reason="needs the C++ extension")
def test_the_matrix_never_exists():
    """64 queries against 2^20 keys of 16: the matrix would be 256 MiB, a copy of the keys 64."""
    program = (
        "import resource, torch; from fuseer.kernels.functional import info_nce\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "query, keys = torch.randn(64, 16, requires_grad=True), torch.randn(2**20, 16)\n"
        "run = lambda k: info_nce(query, k, positive=k[:64], backend='cpu').backward()\n"
        "run(keys[:64]); before = peak(); run(keys); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30 * 1024


@pytest.mark.parametrize("device", DEVICES)
def test_refusals(device):
    q, k = torch.zeros(4, 3, device=device), torch.zeros(6, 3, device=device)
    index = torch.arange(4, device=device)
    for arguments, error, words in (
        ({}, ValueError, "exactly one of positive .* and positive_index .* must be given; got neither"),
        ({"positive": q, "positive_index": index}, ValueError, "must be given; got both"),
        ({"positive": k}, ValueError, r"positive must be \[N, D\] of query = \[4, 3\]; got \[6, 3\]"),
        ({"positive": q.double()}, TypeError, "positive must have the dtype of query"),
        ({"positive_index": index.int()}, TypeError, r"positive_index must be an int64 tensor \[N\]; got torch.int32"),
        ({"positive_index": [0, 1, 2, 3]}, TypeError, r"positive_index must be an int64 tensor \[N\]; got list"),
        ({"positive_index": index[:2]}, ValueError, r"positive_index must be \[N\] of query = \[4\]; got \[2\]"),
        ({"positive_index": index, "keys": k[:0]}, ValueError, "positive_index points into keys, which has no rows"),
        ({"positive": q, "keys": k[:, :2]}, ValueError, r"keys must be \[Q, D\] with query's D = \[6, 3\]; got \[6, 2\]"),
        ({"positive": q, "temperature": 0.0}, ValueError, "temperature must be finite and not 0"),
    ):
        with pytest.raises(error, match=f"info_nce: .*{words}" if not words.startswith("exactly") else words):
            info_nce(**{"query": q, "keys": k, **arguments})


@EVERYWHERE
def test_an_index_outside_the_keys_is_refused(backend, device, monkeypatch):
    monkeypatch.setenv("FUSEER_CHECK_INDICES", "1")
    q, k = torch.ones(2, 3, device=device), torch.ones(6, 3, device=device)
    for wrong in (-1, 6):
        with pytest.raises(ValueError, match=f"info_nce: positive_index must be in 0..5; got .*{wrong}"):
            info_nce(q, k, positive_index=torch.tensor([2, wrong], device=device), backend=backend)
