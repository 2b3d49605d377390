"""Does nt_xent have its published values, its symmetries and its refusals, on every path and in O(N·D) memory?"""

import math
import subprocess
import sys

import pytest
import torch
from grid import DEVICES, INTERPRETED, of, part, threads, trials
from torch.nn import functional as F

from fuseer.kernels.functional import nt_xent
from fuseer.kernels.nt_xent.cases import _case

BACKENDS = sorted({(trial.backend, trial.device) for trial in trials((torch.float32,)) if trial.op == "nt_xent"})
EVERYWHERE = pytest.mark.parametrize(("backend", "device"), BACKENDS)
# several blocks of rows and a part of one, on the paths with and without a known bound of the logits
WIDE = (
    _case("many", 150, 20),
    _case("many_cold", 150, 20, temperature=0.01),
    _case("many_dot_products", 150, 20, normalize=False, temperature=2.0),
    _case("many_converged", 131, 48, noise=0.01),
)


def embeddings(n, d=8, seed=0, dtype=torch.float32):
    return torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def published(z1, z2, temperature):
    """SimCLR's objective as its authors wrote it down: two blocks of logits a view, own similarity at -1e9; the sum of both views."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    masked, labels = torch.eye(len(z1), dtype=z1.dtype) * 1e9, torch.arange(len(z1))
    loss = 0
    for one, other in ((z1, z2), (z2, z1)):
        logits = torch.cat([one @ other.T / temperature, one @ one.T / temperature - masked], 1)
        loss = loss + F.cross_entropy(logits, labels)
    return loss


@EVERYWHERE
@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 1.519837), (0.5, 1.252459), (1.0, 1.375590)])
def test_worked_values(backend, device, temperature, expected):
    z1 = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], device=device)
    z2 = torch.tensor([[0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]], device=device)
    assert nt_xent(z1, z2, temperature=temperature, backend=backend).item() == pytest.approx(expected, abs=1e-6)


@EVERYWHERE
def test_half_of_the_published_sum(backend, device):
    z = embeddings(7, dtype=torch.float64)
    expected = published(*z, 0.1).item() / 2
    assert nt_xent(*z.float().to(device), temperature=0.1, backend=backend).item() == pytest.approx(expected, rel=2e-6)


@EVERYWHERE
def test_embeddings_that_are_all_alike_are_at_chance(backend, device):
    z = torch.ones(9, 4, device=device)
    assert nt_xent(z, z.clone(), backend=backend).item() == pytest.approx(math.log(2 * 9 - 1), rel=1e-6)


@EVERYWHERE
def test_views_and_rows_may_change_places_and_lengths(backend, device):
    z1, z2 = embeddings(11).to(device)
    loss = nt_xent(z1, z2, backend=backend)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1)).to(device)
    lengths = torch.linspace(0.1, 9, 11, device=device)[:, None]
    for other in (
        nt_xent(z2, z1, backend=backend),
        nt_xent(z1[order], z2[order], backend=backend),
        nt_xent(z1 * lengths, z2, backend=backend),
    ):
        torch.testing.assert_close(other, loss, rtol=2e-6, atol=0)


@EVERYWHERE
def test_a_row_of_zeros_is_treated_as_torch_normalizes_it(backend, device):
    z1, z2 = embeddings(5).to(device)
    z1[2] = 0
    found, expected = [], []
    for run, kept in ((backend, found), ("reference", expected)):
        leaves = [z.clone().requires_grad_() for z in (z1, z2)]
        loss = nt_xent(*leaves, backend=run)
        kept += [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert found[1][2].abs().max() > 1e6


@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.name)
@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.skipif(INTERPRETED, reason="threads are the CPU's")
def test_blocks_and_threads(case, count):
    """Nine threads: each owns rows, instead of using every tile for both its sides."""
    for trial in trials(chosen=of("nt_xent", case)):
        if trial.backend == "cpu":
            with threads(count):
                found = trial.verdicts()
            assert all(found.values()), (str(trial), {name: str(verdict) for name, verdict in found.items()})


@pytest.mark.parametrize("n", [641, 1100])
@pytest.mark.skipif(INTERPRETED, reason="seconds on the CPU")
def test_products_that_the_gradient_finds_again_and_those_it_makes_anew(n):
    """The CPU keeps 4 MB of the forward's products: all those of 1,282 rows, less than half of those of 2,200."""
    for trial in trials((torch.float32, torch.bfloat16), of("nt_xent", _case("kept", n, 8))):
        if trial.backend == "cpu":
            with threads(2):
                found = trial.verdicts()
            assert all(found.values()), (str(trial), {name: str(verdict) for name, verdict in found.items()})


@pytest.mark.skipif(INTERPRETED, reason="threads are the CPU's")
def test_rows_of_any_length_keep_bfloat16_exact():
    """Norms from 1e-8 to 1e8: where the matrix product of the rows as they are would lose or overflow, another is chosen."""
    z = embeddings(40, 16)
    case = _case("lengths", 40, 16)
    lengths = torch.logspace(-8, 8, 40)[:, None]
    for trial in trials((torch.bfloat16,), of("nt_xent", case)):
        given = {"z1": (z[0] * lengths).bfloat16(), "z2": z[1].bfloat16()}
        truth, found = (
            nt_xent(*(x.to(dtype) for x in given.values()), backend=backend)
            for dtype, backend in ((torch.float64, "reference"), (torch.bfloat16, trial.backend))
        )
        assert found.item() == pytest.approx(truth.item(), rel=1e-6)


@pytest.mark.skipif(INTERPRETED or ("cpu", "cpu") not in BACKENDS, reason="needs the C++ extension")
def test_the_matrix_never_exists():
    """2N = 16,384: the matrix would be 1 GiB, and its gradient another."""
    program = (
        "import resource, torch; from fuseer.kernels.functional import nt_xent\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run = lambda n: nt_xent(*(torch.randn(n, 16, requires_grad=True) for _ in 'ab'), backend='cpu').backward()\n"
        "run(64); before = peak(); run(8192); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * 1024


@pytest.mark.parametrize("device", DEVICES)
def test_refusals(device):
    z = torch.zeros(4, 3, device=device)
    for arguments, error, words in (
        (((z, z[:, :2]), {}), ValueError, r"nt_xent: z2 must be \[N, D\] of z1 = \[4, 3\]; got \[4, 2\]"),
        (((z, z.half()), {}), TypeError, "nt_xent: z2 must have the dtype of z1"),
        (((z.int(), z), {}), TypeError, "nt_xent: z1 must be float16, bfloat16, float32 or float64"),
        (((z[0], z[0]), {}), ValueError, r"nt_xent: z1 must be \[N, D\]"),
        (((z, z), {"temperature": 0}), ValueError, "nt_xent: temperature must be finite and not 0; got 0"),
        (((z, z), {"temperature": math.nan}), ValueError, "temperature must be finite"),
        (((z, z), {"temperature": "hot"}), TypeError, "temperature must be a number"),
        (((z, z), {"group": "everyone"}), TypeError, "group must be None"),
    ):
        positional, named = arguments
        with pytest.raises(error, match=words):
            nt_xent(*positional, **named)


def test_reference_statistics_are_what_ranks_exchange():
    reference = part("nt_xent", "reference")
    z = embeddings(5, dtype=torch.float64).flatten(0, 1)
    top, total = reference.statistics(z, [10], 0.3, True).unbind(1)
    unit = F.normalize(z, dim=1)
    p = ((unit @ unit.T - top[:, None]) / 0.3).exp() / total[:, None]
    torch.testing.assert_close(p.fill_diagonal_(0).sum(1), torch.ones(10, dtype=torch.float64))
