"""Are Sinkhorn's codes the official ones, finite everywhere, and refused clearly?"""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseer.kernels import dispatch, extension
from fuseer.kernels.sinkhorn import op as sinkhorn_op
from fuseer.kernels.sinkhorn import sinkhorn

SCORES = torch.tensor([[0.9, 0.1, -0.2], [0.8, 0.3, 0], [0.7, 0.2, 0.6], [0.1, 0.5, 0.4]], dtype=torch.float64)
BACKENDS = ["reference", *(["cpu"] if extension.load() else [])]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


def official(scores, epsilon, iterations):
    """The loop that SwAV published: exp, then rows and columns of the transposed plan divided by their sums in turn."""
    plan = (scores / epsilon).exp().t()
    prototypes, samples = plan.shape
    plan = plan / plan.sum()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True) / prototypes
        plan = plan / plan.sum(0, keepdim=True) / samples
    return (plan * samples).t()


def log_domain(scores, epsilon, iterations):
    """The same plan by its logarithm alone, finite for any score."""
    log_plan = scores / epsilon
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
    return log_plan.exp()


def uniform(*shape, seed=0, scale=1.0):
    return scale * (2 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1)


KNOWN = [
    (0.05, 3, "0.999031 0.000969 0        0.718743 0.281133 0.000124 0.004775 0.001868 0.993357 0        0.976422 0.023577"),
    (0.05, 10, "0.997305 0.002687 0.000007 0.478467 0.520120 0.001413 0.000281 0.000306 0.999413 0        0.870803 0.129197"),
    (0.5, 3, "0.569348 0.269970 0.160682 0.420479 0.363294 0.216227 0.253206 0.218771 0.528023 0.092014 0.480948 0.427039"),
]


@EVERY_BACKEND
@pytest.mark.parametrize(("epsilon", "iterations", "codes"), KNOWN)
def test_known_codes(backend, epsilon, iterations, codes):
    expected = torch.tensor([float(x) for x in codes.split()], dtype=torch.float64).view(4, 3)
    scores = SCORES if backend == "reference" else SCORES.float()
    found = sinkhorn(scores, epsilon=epsilon, iterations=iterations, backend=backend)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_known_column_sums():
    sums = torch.tensor([1.722549, 1.260392, 1.017060], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(SCORES).sum(0), sums, rtol=0, atol=1e-6)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(
    n=st.integers(1, 30),
    k=st.integers(1, 30),
    epsilon=st.sampled_from([0.03, 0.05, 0.5, 5.0]),
    iterations=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_equals_the_official_loop(n, k, epsilon, iterations, seed):
    scores = uniform(n, k, seed=seed)
    expected = official(scores, epsilon, iterations)
    torch.testing.assert_close(sinkhorn(scores, epsilon=epsilon, iterations=iterations), expected, rtol=1e-11, atol=1e-13)


@EVERY_BACKEND
@pytest.mark.parametrize("epsilon", [0.02, 0.03, 0.05])
def test_finite_where_the_official_loop_is_not(backend, epsilon):
    scores = uniform(40, 30, scale=100.0)
    scores[0], scores[:, 0], scores[1, 1] = -100.0, 100.0, -100.0
    assert not official(scores, epsilon, 3).isfinite().all()
    codes = sinkhorn(scores.float(), epsilon=epsilon, backend=backend)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(-1), torch.ones(40), rtol=0, atol=1e-5)
    exact = sinkhorn(scores, epsilon=epsilon, backend="reference")
    torch.testing.assert_close(exact, log_domain(scores, epsilon, 3), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(codes.double(), sinkhorn(scores.float().double(), epsilon=epsilon), rtol=2e-3, atol=1e-4)


@EVERY_BACKEND
def test_score_of_minus_infinity_is_a_code_of_zero(backend):
    scores = uniform(9, 21).float()
    scores[2, 3] = -torch.inf
    codes = sinkhorn(scores, backend=backend)
    assert codes.isfinite().all()
    assert codes[2, 3] == 0
    assert sinkhorn(scores.fill_(torch.nan), backend=backend).isnan().all()


@EVERY_BACKEND
def test_invariances(backend):
    scores = uniform(24, 18)
    scores = scores if backend == "reference" else scores.float()
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if backend == "reference" else {"rtol": 1e-4, "atol": 1e-6}

    def codes(x):
        return sinkhorn(x, backend=backend)

    plain = codes(scores)
    torch.testing.assert_close(plain.sum(-1), torch.ones_like(plain[:, 0]), **tolerance)
    torch.testing.assert_close(codes(scores + 3.0), plain, **tolerance)
    torch.testing.assert_close(codes(scores + scores[:1]), plain, **tolerance)
    rows, columns = torch.randperm(24, generator=torch.Generator().manual_seed(1)), torch.arange(17, -1, -1)
    torch.testing.assert_close(codes(scores[rows][:, columns]), plain[rows][:, columns], **tolerance)
    stacked = torch.stack([scores, -scores]).view(2, 1, 24, 18)
    torch.testing.assert_close(codes(stacked), torch.stack([plain, codes(-scores)]).view(2, 1, 24, 18), **tolerance)
    torch.testing.assert_close(codes(scores[:, :1]), torch.ones_like(scores[:, :1]), **tolerance)


@EVERY_BACKEND
def test_many_iterations_balance_the_prototypes(backend):
    codes = sinkhorn(uniform(60, 12).float(), epsilon=0.2, iterations=200, backend=backend)
    torch.testing.assert_close(codes.sum(0), torch.full((12,), 5.0), rtol=1e-4, atol=0)


@EVERY_BACKEND
def test_repeats_bitwise(backend):
    scores = uniform(3, 100, 70).float()
    first = sinkhorn(scores, backend=backend)
    assert all(torch.equal(first, sinkhorn(scores, backend=backend)) for _ in range(5))


@pytest.mark.skipif(extension.load() is None, reason="no C++ extension here")
def test_thread_count_does_not_change_the_compiled_codes():
    scores, before = uniform(2, 150, 1100).float(), torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(sinkhorn(scores, backend="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.skipif(extension.load() is None, reason="no C++ extension here")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_is_right(capability):
    program = (
        "import torch; from fuseer.kernels import extension; from fuseer.kernels.functional import sinkhorn;"
        "s = torch.rand(50, 37, generator=torch.Generator().manual_seed(0));"
        "pairs = [(sinkhorn(x, backend='cpu'), sinkhorn(x, backend='reference')) for x in (s, s.bfloat16(), s.half())];"
        "print(extension.load().build_info()['cpu_capability'], *[(a - b).abs().max().item() for a, b in pairs])"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    ran, *errors = done.stdout.split()
    if ran.lower() != capability:
        pytest.skip(f"this CPU or torch build stops at {ran}")
    assert max(map(float, errors)) < 2e-6, errors


def test_no_gradient_and_no_complaint():
    scores = uniform(5, 4).requires_grad_()
    assert not sinkhorn(scores).requires_grad


@pytest.mark.parametrize(
    ("scores", "options", "error", "words"),
    [
        ([[1.0]], {}, TypeError, "scores must be a tensor"),
        (torch.ones(3, 2, dtype=torch.int64), {}, TypeError, "got torch.int64; convert it with .float()"),
        (torch.ones(3, 2, dtype=torch.complex64), {}, TypeError, "complex64"),
        (torch.ones(3), {}, ValueError, r"scores must be \[..., N, K\]; got \[3\]"),
        (torch.ones(3, 0), {}, ValueError, r"K >= 1 prototypes on its last axis; got \[3, 0\]"),
        (torch.ones(3, 2), {"iterations": 0}, ValueError, "iterations must be >= 1; got 0"),
        (torch.ones(3, 2), {"iterations": 2.0}, TypeError, "iterations must be an integer; got float"),
        (torch.ones(3, 2), {"epsilon": 0.0}, ValueError, "epsilon must be finite and > 0; got 0.0"),
        (torch.ones(3, 2), {"epsilon": -1}, ValueError, "epsilon must be finite and > 0; got -1"),
        (torch.ones(3, 2), {"epsilon": float("nan")}, ValueError, "got nan"),
        (torch.ones(3, 2), {"epsilon": float("inf")}, ValueError, "got inf"),
        (torch.ones(3, 2), {"epsilon": "small"}, TypeError, "epsilon must be a number; got str"),
        (torch.ones(3, 2), {"group": "world"}, TypeError, "group must be None"),
    ],
)
def test_refuses(scores, options, error, words):
    with pytest.raises(error, match=f"^sinkhorn: .*{words}"):
        sinkhorn(scores, **options)


def test_float64_on_the_compiled_backend_is_refused_with_the_reason():
    reason = "float64 belongs to reference" if extension.load() else "C\\+\\+ extension"
    words = f"sinkhorn: backend 'cpu' was asked for and cannot run .*{reason}.*available for sinkhorn: cpu, reference"
    with pytest.raises(RuntimeError, match=words):
        sinkhorn(SCORES, backend="cpu")


def test_falling_back_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_passed_over", set())
    monkeypatch.delenv("FUSEER_BACKEND", raising=False)
    for _ in range(3):
        sinkhorn(SCORES)
    told = [record.getMessage() for record in caplog.records if record.name == "fuseer.kernels"]
    assert len(told) == 1
    assert told[0].startswith("sinkhorn: runs on reference (cpu: ")


@pytest.mark.skipif(extension.load() is None, reason="no C++ extension here")
def test_unasked_the_compiled_backend_runs(monkeypatch):
    monkeypatch.delenv("FUSEER_BACKEND", raising=False)
    assert dispatch.choose("sinkhorn", sinkhorn_op.IMPLS, None, SCORES.float(), 0.05, 3, "") == "cpu"
    assert torch.equal(sinkhorn(SCORES.float()), sinkhorn(SCORES.float(), backend="cpu"))
