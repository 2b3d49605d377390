"""Is the swapped prediction SwAV's official loss, in value and gradient, and refused clearly?"""

import pytest
import torch
from grid import DTYPES, of, over, trials, widest

from fuseer.kernels.swapped_prediction import swapped_prediction
from fuseer.kernels.testing import Case

EVERY_BACKEND = over(widest("swapped_prediction"))

FIRST = torch.tensor([[0.9, 0.1, -0.2], [0.8, 0.3, 0], [0.7, 0.2, 0.6], [0.1, 0.5, 0.4]], dtype=torch.float64)
SECOND = torch.tensor([[0.7, 0, -0.1], [0.6, 0.4, 0.1], [0.5, 0.3, 0.5], [0.2, 0.4, 0.6]], dtype=torch.float64)


def cosines(*shape, seed=0):
    return 2 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1


def official_codes(scores, epsilon, iterations):
    plan = (scores / epsilon).exp().t()
    plan = plan / plan.sum()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True) / plan.shape[0]
        plan = plan / plan.sum(0, keepdim=True) / plan.shape[1]
    return (plan * plan.shape[1]).t()


def official_loss(output, batch, crops, assign, *, queue=None, epsilon=0.05, iterations=3, temperature=0.1):
    """SwAV's training step on `output` [crops * batch, K]: the queue goes before the batch, and the last `batch` codes are kept."""
    loss = 0
    for a, crop in enumerate(assign):
        with torch.no_grad():
            rows = output[batch * crop : batch * (crop + 1)].detach()
            if queue is not None:
                rows = torch.cat((queue[a], rows))
            codes = official_codes(rows, epsilon, iterations)[-batch:]
        subloss = 0
        for other in [v for v in range(crops) if v != crop]:
            scaled = output[batch * other : batch * (other + 1)] / temperature
            subloss = subloss - torch.mean(torch.sum(codes * torch.nn.functional.log_softmax(scaled, dim=1), dim=1))
        loss = loss + subloss / (crops - 1)
    return loss / len(assign)


def test_known_losses():
    scores = torch.stack([FIRST, SECOND])
    for assign, value in (((0,), 0.890475), ((1,), 1.804036), ((0, 1), 1.347256)):
        assert abs(swapped_prediction(scores, assign=assign).item() - value) < 1e-6


def test_chance_is_the_logarithm_of_k():
    for k, value in ((3000, 8.0064), (16000, 9.6803)):
        assert abs(swapped_prediction(torch.full((4, 2, k), 0.3)).item() - value) < 1e-4


@pytest.mark.parametrize("queue_rows", [None, 0, 1, 12])
@pytest.mark.parametrize(("crops", "assign"), [(2, (0, 1)), (8, (0, 1)), (4, (2,)), (3, (2, 0, 1))])
@pytest.mark.parametrize("options", [{}, {"epsilon": 0.03, "iterations": 1, "temperature": 0.5}, {"epsilon": 0.5, "iterations": 10}])
@over([trial for trial in widest("swapped_prediction") if trial.dtype == torch.float64])
def test_equals_the_official_loss(trial, queue_rows, crops, assign, options):
    batch, prototypes = 6, 7
    queue = None if queue_rows is None else cosines(len(assign), queue_rows, prototypes, seed=5)
    output = cosines(crops * batch, prototypes).requires_grad_()
    expected = official_loss(output, batch, crops, assign, queue=queue, **options)
    (gradient,) = torch.autograd.grad(expected, output)
    scores = output.view(crops, batch, prototypes).to(trial.device)
    found = trial.call(scores=scores, assign=assign, queue_scores=None if queue is None else queue.to(trial.device), **options).cpu()
    (ours,) = torch.autograd.grad(found, output)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-12 * gradient.abs().max().item())


def test_sample_major_scores_need_no_copy():
    scores = cosines(5, 3, 4).transpose(0, 1)
    torch.testing.assert_close(swapped_prediction(scores), swapped_prediction(scores.contiguous()), rtol=1e-14, atol=0)


def test_the_gradient_is_scaled_by_the_incoming_one():
    scores = cosines(3, 4, 5).requires_grad_()
    (once,) = torch.autograd.grad(swapped_prediction(scores), scores)
    (thrice,) = torch.autograd.grad(3 * swapped_prediction(scores), scores)
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-12, atol=1e-15)


def test_no_rows_is_a_loss_of_zero_with_an_empty_gradient():
    scores = torch.empty(3, 0, 4, requires_grad=True)
    for queue in (None, torch.rand(2, 5, 4)):
        loss = swapped_prediction(scores, queue_scores=queue)
        (gradient,) = torch.autograd.grad(loss, scores)
        assert loss.item() == 0
        assert gradient.shape == (3, 0, 4)


def extreme(name, change, *, shape=(3, 12, 10), queue=None, **options):
    """A case of cosines that `change` has made awkward, queue included."""

    def build(generator):
        made = [2 * torch.rand(size, dtype=torch.float64, generator=generator) - 1 for size in (shape, (2, queue or 0, shape[2]))]
        scores, queue_scores = (change(x) for x in made)
        return {
            "scores": scores,
            "queue_scores": None if queue is None else queue_scores,
            **{"assign": (0, 1), "epsilon": 0.05, "iterations": 3, "temperature": 0.1},
            **options,
        }

    return Case(name, build)


def column(value):
    """Sets the first prototype's scores to a value."""
    return lambda x: torch.cat([torch.full_like(x[..., :1], value), x[..., 1:]], -1)


EXTREMES = (
    extreme("spread", lambda x: x * 100, shape=(4, 40, 30)),
    extreme("spread_queue", lambda x: x * 100, queue=7),
    extreme("dead_prototype", column(-100.0)),
    extreme("one_prototype_takes_all", column(100.0), queue=5),
    extreme("constant", torch.zeros_like),
    extreme("one_row", lambda x: x * 100, shape=(2, 1, 12)),
    extreme("one_row_and_a_queue", lambda x: x, shape=(2, 1, 12), queue=30),
    extreme("one_prototype", lambda x: x * 100, shape=(2, 12, 1), queue=3),
    extreme("two_by_one_by_one", lambda x: x, shape=(2, 1, 1)),
    extreme("many_iterations", lambda x: x, iterations=30),
    extreme("one_temperature_for_all", lambda x: x, epsilon=1.0, temperature=1.0),
)


@over(trials(DTYPES, of("swapped_prediction", *EXTREMES)))
def test_extremes(trial):
    found = trial.verdicts()
    assert all(found.values()), {name: str(verdict) for name, verdict in found.items()}
    if trial.arguments()["scores"].shape[-1] == 1:
        assert all((x == 0).all() for x in trial.outputs().values())


@EVERY_BACKEND
def test_nan_in_any_crop_is_a_loss_of_nan(trial):
    for where in ((0, 1, 2), (2, 1, 2)):
        scores = cosines(3, 4, 5)
        scores[where] = torch.nan
        assert trial.call(scores=scores.to(trial.device, trial.dtype)).isnan()
    queue = cosines(2, 3, 5)
    queue[1, 0, 0] = torch.nan
    assert trial.call(scores=cosines(3, 4, 5).to(trial.device, trial.dtype), queue_scores=queue.to(trial.device, trial.dtype)).isnan()


@EVERY_BACKEND
def test_nan_in_the_gradient_is_where_the_reference_has_it(trial):
    scores = cosines(4, 5, 6)
    scores[3, 1, 2] = torch.nan
    found = []
    for backend in (trial, trial.but(backend="reference")):
        leaf = scores.to(trial.device, trial.dtype).requires_grad_()
        found.append(torch.autograd.grad(backend.call(scores=leaf), leaf)[0].isnan())
    assert found[0].any()
    assert torch.equal(*found)


@EVERY_BACKEND
def test_keeps_the_potentials_two_numbers_a_row_and_no_codes(trial):
    arguments = trial.arguments()
    arguments["scores"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        trial.call(**arguments)
    crops, rows, prototypes = arguments["scores"].shape
    a = len(arguments["assign"])
    own = [x.numel() for x in kept if x.data_ptr() != arguments["scores"].data_ptr()]
    assert sum(own) <= a * prototypes + 2 * (crops + a) * rows + 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"scores": [1.0]}, TypeError, "scores must be a tensor"),
        ({"scores": torch.ones(2, 3, 4, dtype=torch.uint8)}, TypeError, "scores must be float16"),
        ({"scores": torch.ones(6, 4)}, ValueError, r"scores must be \[V, B, K\]; got \[6, 4\]"),
        ({"scores": torch.ones(1, 3, 4), "assign": (0,)}, ValueError, r"V >= 2 crops.*got \[1, 3, 4\]"),
        ({"scores": torch.ones(2, 3, 0)}, ValueError, "K >= 1"),
        ({"assign": ()}, ValueError, r"assign must hold distinct crops out of 0..1, at least one; got \(\)"),
        ({"assign": (0, 0)}, ValueError, r"distinct crops.*got \(0, 0\)"),
        ({"assign": (0, 2)}, ValueError, r"distinct crops.*got \(0, 2\)"),
        ({"assign": (-1,)}, ValueError, r"distinct crops.*got \(-1,\)"),
        ({"assign": 0}, TypeError, "assign must be a tuple of crop numbers; got 0"),
        ({"assign": (0.0,)}, TypeError, "assign must be a tuple of crop numbers"),
        ({"queue_scores": torch.ones(1, 5, 4)}, ValueError, r"queue_scores must be \[len\(assign\), Q, K\] = \[2, 5, 4\]; got \[1, 5, 4\]"),
        ({"queue_scores": torch.ones(2, 5, 3)}, ValueError, r"= \[2, 5, 4\]; got \[2, 5, 3\]"),
        ({"queue_scores": torch.ones(5, 4)}, ValueError, r"queue_scores must be \[A, Q, K\]; got \[5, 4\]"),
        ({"queue_scores": torch.ones(2, 5, 4).half()}, TypeError, "queue_scores must have the dtype of scores"),
        ({"queue_scores": torch.ones(2, 5, 4, device="meta")}, ValueError, "queue_scores must be on the device of scores"),
        ({"epsilon": 0}, ValueError, "epsilon must be finite and > 0; got 0"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0; got 0.0"),
        ({"iterations": 0}, ValueError, "iterations must be >= 1; got 0"),
        ({"group": 3}, TypeError, "group must be None"),
    ],
)
def test_refuses(changes, error, words):
    arguments = {"scores": torch.ones(2, 3, 4), **changes}
    with pytest.raises(error, match=f"^swapped_prediction: .*{words}"):
        swapped_prediction(**arguments)
