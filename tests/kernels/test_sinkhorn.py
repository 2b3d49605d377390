"""Are Sinkhorn's codes the official ones, finite everywhere, and refused clearly?"""

import pytest
import torch
from grid import DTYPES, of, over, trials, widest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseer.kernels import dispatch, extension
from fuseer.kernels.sinkhorn import op as sinkhorn_op
from fuseer.kernels.sinkhorn import sinkhorn
from fuseer.kernels.testing import Case, error_vs_eager

SCORES = torch.tensor([[0.9, 0.1, -0.2], [0.8, 0.3, 0], [0.7, 0.2, 0.6], [0.1, 0.5, 0.4]], dtype=torch.float64)
EVERY_BACKEND = over(widest("sinkhorn"))


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


def placed(scores, trial):
    return scores.to(trial.device, trial.dtype)


KNOWN = [
    (0.05, 3, "0.999031 0.000969 0        0.718743 0.281133 0.000124 0.004775 0.001868 0.993357 0        0.976422 0.023577"),
    (0.05, 10, "0.997305 0.002687 0.000007 0.478467 0.520120 0.001413 0.000281 0.000306 0.999413 0        0.870803 0.129197"),
    (0.5, 3, "0.569348 0.269970 0.160682 0.420479 0.363294 0.216227 0.253206 0.218771 0.528023 0.092014 0.480948 0.427039"),
]


@EVERY_BACKEND
@pytest.mark.parametrize(("epsilon", "iterations", "codes"), KNOWN)
def test_known_codes(trial, epsilon, iterations, codes):
    expected = torch.tensor([float(x) for x in codes.split()], dtype=torch.float64).view(4, 3)
    found = trial.call(scores=placed(SCORES, trial), epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=1e-6)


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


def extreme(name, change, *shape, **options):
    """A case of cosines that `change` has made awkward."""

    def build(generator):
        scores = 2 * torch.rand(shape, dtype=torch.float64, generator=generator) - 1
        return {"scores": change(scores), "epsilon": 0.05, "iterations": 3, **options}

    return Case(name, build)


def put(where, value):
    """Sets scores[where] to a value, or to what a function makes of it."""

    def change(scores):
        scores[where] = value(scores[where]) if callable(value) else value
        return scores

    return change


EXTREMES = (
    extreme("spread", lambda x: x * 100, 40, 30),
    extreme("one_row_far_below", put(0, -100.0), 40, 30),
    extreme("dead_prototype", put((..., 0), -100.0), 40, 30),
    extreme("dead_prototypes", put((..., slice(1, None)), -100.0), 40, 30),
    extreme("one_prototype_takes_all", put((..., 0), 100.0), 40, 30),
    extreme("constant_rows", lambda x: x[:, :1].expand_as(x).clone(), 17, 12),
    extreme("constant", torch.zeros_like, 17, 12),
    extreme("one_score", lambda x: x * 100, 1, 1),
    extreme("one_row", lambda x: x * 100, 3, 1, 12),
    extreme("one_prototype", lambda x: x * 100, 12, 1),
    extreme("minus_infinity", put((2, slice(0, 30, 7)), -torch.inf), 40, 30),
    extreme("small_epsilon", lambda x: x, 40, 30, epsilon=0.003),
    extreme("many_iterations", lambda x: x, 40, 30, iterations=50),
)


@over(trials(DTYPES, of("sinkhorn", *EXTREMES)))
def test_extremes(trial):
    found = trial.verdicts()["out"]
    assert found, str(found)
    codes = trial.outputs()["out"]
    torch.testing.assert_close(codes.sum(-1), torch.ones_like(codes[..., 0]), rtol=0, atol=1e-5)
    assert (codes >= 0).all()
    assert (codes[trial.arguments()["scores"] == -torch.inf] == 0).all()


@pytest.mark.parametrize("epsilon", [0.02, 0.03, 0.05])
def test_the_reference_is_exact_where_the_official_loop_is_not_finite(epsilon):
    scores = uniform(40, 30, scale=100.0)
    scores[0], scores[:, 0], scores[1, 1] = -100.0, 100.0, -100.0
    assert not official(scores, epsilon, 3).isfinite().all()
    exact = sinkhorn(scores, epsilon=epsilon, backend="reference")
    torch.testing.assert_close(exact, log_domain(scores, epsilon, 3), rtol=1e-9, atol=1e-12)


@EVERY_BACKEND
def test_subtracting_the_maximum_of_every_row_is_something_else(trial):
    """The repair often proposed: finite too, but rows do not cancel after 3 iterations. The verdict must tell the two apart."""
    scores = uniform(64, 48).to(trial.dtype).double()
    truth = log_domain(scores, 0.05, 3)
    eager = sinkhorn(scores.to(trial.dtype), backend="reference")
    found = trial.call(scores=placed(scores, trial)).cpu()
    shifted = official(scores - scores.amax(1, keepdim=True), 0.05, 3).to(trial.dtype)
    assert error_vs_eager(found, eager, truth)
    assert not error_vs_eager(shifted, eager, truth)
    assert (shifted - truth).norm() > 0.01 * truth.norm()


@EVERY_BACKEND
def test_nan_stays_in_its_problem_and_fills_it(trial):
    scores = uniform(3, 9, 21)
    scores[1, 2, 3] = torch.nan
    codes = trial.call(scores=placed(scores, trial))
    assert codes[1].isnan().all()
    assert torch.equal(codes[[0, 2]], trial.call(scores=placed(scores[[0, 2]], trial)))


@EVERY_BACKEND
def test_invariances(trial):
    scores = placed(uniform(24, 18), trial)
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if trial.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}

    def codes(x):
        return trial.call(scores=x)

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
def test_many_iterations_balance_the_prototypes(trial):
    codes = trial.call(scores=uniform(60, 12).to(trial.device, torch.float32), epsilon=0.2, iterations=200)
    torch.testing.assert_close(codes.sum(0), torch.full_like(codes[0], 5.0), rtol=1e-4, atol=0)


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


ELSEWHERE = torch.empty(3, 2, device="meta")


def test_what_a_backend_cannot_do_is_refused_with_the_reason():
    reason = "on meta" if extension.load() else "C\\+\\+ extension"
    words = f"sinkhorn: backend 'cpu' was asked for and cannot run .cpu: .*{reason}.*; available for sinkhorn: .*cpu, reference"
    with pytest.raises(RuntimeError, match=words):
        sinkhorn(ELSEWHERE, backend="cpu")


def test_falling_back_is_told_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_passed_over", set())
    monkeypatch.delenv("FUSEER_BACKEND", raising=False)
    for _ in range(3):
        sinkhorn(ELSEWHERE)
    told = [record.getMessage() for record in caplog.records if record.name == "fuseer.kernels"]
    passed_over = [dispatch.backend_of(impl) for impl in sinkhorn_op.IMPLS[:-1]]
    assert [message.partition("(")[2].partition(":")[0] for message in told] == passed_over
    assert all(message.startswith("sinkhorn: runs on reference (") for message in told)


@pytest.mark.skipif(extension.load() is None, reason="no C++ extension here")
def test_unasked_the_compiled_backend_runs(monkeypatch):
    monkeypatch.delenv("FUSEER_BACKEND", raising=False)
    assert dispatch.choose("sinkhorn", sinkhorn_op.IMPLS, None, SCORES.float(), 0.05, 3, "") == "cpu"
    assert torch.equal(sinkhorn(SCORES.float()), sinkhorn(SCORES.float(), backend="cpu"))
