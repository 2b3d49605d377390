"""Is the swapped prediction SwAV's official loss, in value and gradient, and refused clearly?"""

import pytest
import torch
from grid import DTYPES, LAYOUTS, of, over, quick, trials, widest
from torch._dynamo.testing import CompileCounterWithBackend

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


def copies(call):
    """The operators among those that `call` runs, also inside C++, which copy tensors or make one of several."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return {event.name for event in profile.function_events} & {f"aten::{name}" for name in ("stack", "cat", "clone", "copy_")}


def apart(x):
    """The matrices of x [V, N, K] each in memory of its own, no two alike: dense, misaligned, inside a wider one, a row in pieces."""
    layouts = (torch.clone, *LAYOUTS.values())
    return [layouts[number % len(layouts)](one) for number, one in enumerate(x)]


@over(trials(DTYPES, lambda op: quick(op) if op == "swapped_prediction" else ()))
def test_a_list_is_the_tensor_of_its_crops(trial):
    """To the bit, in value and in every crop's gradient, whatever memory the crops and queues lie in; a queue may be either."""
    arguments = trial.arguments()
    whole, queue = arguments["scores"].requires_grad_(), arguments["queue_scores"]
    expected = trial.call(**arguments)
    (gradient,) = torch.autograd.grad(expected, whole)
    for lay in (apart, torch.clone, lambda x: tuple(x.clone())):
        crops = [x.detach().requires_grad_() for x in lay(whole.detach())]
        for stored in (queue, None if queue is None else lay(queue)):
            found = trial.call(**{**arguments, "scores": crops, "queue_scores": stored})
            assert torch.equal(found, expected)
            gradients = torch.autograd.grad(found, crops)
            assert all(x.dtype == trial.dtype for x in gradients) and torch.equal(torch.stack(gradients), gradient)


@EVERY_BACKEND
def test_a_list_of_views_and_of_one_crop_twice_gets_the_sum(trial):
    """Crops that are views of one tensor, in any order, or the same tensor: the gradients meet where they came from."""
    leaf, numbers = cosines(3, 4, 5).to(trial.device, trial.dtype).requires_grad_(), [2, 0, 2, 1]
    loss = trial.call(scores=[leaf[number] for number in numbers])
    again = leaf.detach().requires_grad_()
    expected = trial.call(scores=again[numbers])
    assert torch.equal(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(expected, again)[0])


@EVERY_BACKEND
def test_only_some_crops_of_a_list_may_want_a_gradient(trial):
    crops = list(cosines(3, 4, 5).to(trial.device, trial.dtype))
    crops[1].requires_grad_()
    whole = torch.stack([x.detach() for x in crops]).requires_grad_()
    (expected,) = torch.autograd.grad(trial.call(scores=whole), whole)
    trial.call(scores=crops).backward()
    assert torch.equal(crops[1].grad, expected[1]) and crops[0].grad is None


@EVERY_BACKEND
def test_a_changed_crop_is_refused_whichever_it_is(trial):
    for number in range(3):
        leaves = [x.requires_grad_() for x in cosines(3, 4, 5).to(trial.device, trial.dtype).unbind()]
        crops = [leaf * 1 for leaf in leaves]
        loss = trial.call(scores=crops)
        with torch.no_grad():
            crops[number].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@over([trial for trial in widest("swapped_prediction") if trial.backend == "cpu"])
def test_crops_are_neither_stacked_nor_copied(trial):
    crops = [x.to(trial.device, trial.dtype).clone().requires_grad_() for x in cosines(4, 6, 5)]
    queue = [x.to(trial.device, trial.dtype).clone() for x in cosines(2, 3, 5)]
    assert not copies(lambda: torch.autograd.grad(trial.call(scores=crops, queue_scores=queue), crops))
    assert "aten::stack" in copies(lambda: trial.call(scores=torch.stack(crops)))


@EVERY_BACKEND
def test_a_list_passes_opcheck_and_compiles_whole_and_once(trial):
    raw, backward = (getattr(trial.module, name)[trial.backend] for name in ("RAW", "RAW_BACKWARD"))
    crops = apart(cosines(3, 6, 5).to(trial.device, trial.dtype))
    given = (crops, apart(cosines(2, 4, 5).to(trial.device, trial.dtype)), [2, 0], 0.05, 2, 0.1, "")
    torch.library.opcheck(raw, given)
    loss, *kept = raw(*given)
    torch.library.opcheck(backward, (torch.ones_like(loss), crops, *kept, [2, 0], 0.05, 0.1))

    def step(crops, queue):
        return trial.call(scores=[x * 2 for x in crops], queue_scores=queue)

    torch._dynamo.reset()
    counter, frames = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for rows in (6, 9, 14):
        leaves = [x.to(trial.device, trial.dtype).requires_grad_() for x in cosines(3, rows, 5)]
        queue = list(cosines(2, rows + 1, 5).to(trial.device, trial.dtype))
        found, expected = (call(leaves, queue) for call in (compiled, step))
        assert torch.equal(found, expected)
        assert all(torch.equal(a, b) for a, b in zip(*(torch.autograd.grad(x, leaves) for x in (found, expected)), strict=True))
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"scores": 1.0}, TypeError, r"scores must be a tensor \[V, B, K\], or a list of tensors \[B, K\]; got float"),
        ({"scores": [1.0]}, TypeError, r"scores\[0\] must be a tensor \[B, K\]; got float"),
        ({"scores": []}, ValueError, r"scores must hold at least one tensor \[B, K\]; got none"),
        ({"scores": [torch.ones(3, 4)], "assign": (0,)}, ValueError, r"V >= 2 crops.*got \[1, 3, 4\]"),
        ({"scores": [torch.ones(2, 3, 4)] * 2}, ValueError, r"scores\[0\] must be \[B, K\]; got \[2, 3, 4\]"),
        ({"scores": [torch.ones(3, 4), torch.ones(2, 4)]}, ValueError, r"scores\[1\] must be \[B, K\] of scores\[0\] = .*got \[2, 4\]"),
        ({"scores": [torch.ones(3, 4), torch.ones(3, 4).half()]}, TypeError, r"scores\[1\] must have the dtype of scores\[0\]"),
        ({"scores": [torch.ones(3, 4), torch.ones(3, 4, device="meta")]}, ValueError, r"scores\[1\] must be on the device of scores\[0\]"),
        ({"scores": (torch.ones(3, 0),) * 2}, ValueError, "K >= 1"),
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
        ({"queue_scores": [torch.ones(5, 4)]}, ValueError, r"queue_scores must be \[len\(assign\), Q, K\] = \[2, 5, 4\]; got \[1, 5, 4\]"),
        ({"queue_scores": [torch.ones(5, 4), torch.ones(4, 4)]}, ValueError, r"queue_scores\[1\] must be \[Q, K\] of queue_scores\[0\]"),
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
