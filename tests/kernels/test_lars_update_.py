"""Is a LARS step its published formulas, whole or in pieces, at any size of gradient, and refused clearly?"""

import itertools

import pytest
import torch
from grid import over, threads
from updates import bits, first, of, trials

from fuseer.kernels import testing
from fuseer.kernels.lars_update_ import lars_update_
from fuseer.kernels.lars_update_.cases import OPTIONS
from fuseer.kernels.testing import Case

EVERY_TRIAL = trials(("float32",), of("lars_update_", *first("lars_update_")))
EVERY_BACKEND = over(EVERY_TRIAL)
SWITCHES = list(itertools.product(("sum", "norm_of_sum"), *[(False, True)] * 3))


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def three(*shapes, dtype=torch.float64, device="cpu"):
    """(params, grads, momenta)"""
    return [[normal(*shape, seed=10 * k + i).to(device, dtype) for i, shape in enumerate(shapes)] for k in range(3)]


def bound(trial, **options):
    """The backend with the cases' options, and these."""
    known = {name: value for name, value in OPTIONS.items() if name not in ("adapt", "segments", "skip")}
    return lambda *lists, **more: trial.call(*lists, **{**known, **options, **more})


def published(w, g, m, lr, adapted, denominator, lr_in_momentum, nesterov, clip):
    """One tensor's step, written as apex LARC, MoCo v3 and SimCLR have it: (new w, new m)."""
    mu, wd, coefficient, eps = 0.5, 0.3, 0.4, 1e-3
    below = g.norm() + wd * w.norm() if denominator == "sum" else (g + wd * w).norm()
    ratio = 1.0
    if adapted:
        ratio = coefficient * w.norm() / (below + eps)
        ratio = min(ratio / lr, 1) if clip else ratio
    d = ratio * (g + wd * w)
    if lr_in_momentum:
        m = mu * m + lr * d
        return w - (lr * d + mu * m if nesterov else m), m
    m = mu * m + d
    return w - lr * (d + mu * m if nesterov else m), m


@EVERY_BACKEND
@pytest.mark.parametrize(("denominator", "lr_in_momentum", "nesterov", "clip"), SWITCHES)
def test_is_the_published_formulas(trial, denominator, lr_in_momentum, nesterov, clip):
    """In float64 where the backend takes it; several steps, with another lr each."""
    dtype = torch.float64 if trial.backend in ("cpu", "reference", "cuda") else torch.float32
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    lists, adapt = three((7, 5), (33,), (4, 3, 2, 2), dtype=dtype, device=trial.device), [True, False, True]
    expected = [[x.double().cpu().clone() for x in tensors] for tensors in lists]
    switches = {"denominator": denominator, "lr_in_momentum": lr_in_momentum, "nesterov": nesterov, "clip": clip}
    for lr in (0.3, 1.7, 0.02):
        bound(trial, eps=1e-3, **switches)(*lists, lr=lr, adapt=adapt)
        for i, (w, g, m) in enumerate(zip(*expected, strict=True)):
            expected[0][i], expected[2][i] = published(w, g, m, lr, adapt[i], **switches)
    for k, i in itertools.product((0, 2), range(3)):
        torch.testing.assert_close(lists[k][i].double().cpu(), expected[k][i], rtol=tolerance, atol=tolerance)


@EVERY_BACKEND
def test_where_a_norm_is_zero_the_gradient_is_taken_as_it_is(trial):
    for denominator in ("sum", "norm_of_sum"):
        for zero in ("w", "g"):
            (w,), (g,), (m,) = three((40,), dtype=torch.float32, device=trial.device)
            (w if zero == "w" else g).zero_()
            before, (decay, moment) = w.clone(), (0.0 if denominator == "sum" else 0.3, m.clone())
            bound(trial, denominator=denominator)([w], [g], [m], lr=0.1)
            d = g + decay * before
            if zero == "g" and denominator == "norm_of_sum":
                # here the sum has a norm, so there is a ratio: 0.4 |w| / |0.3 w|
                d = d * 0.4 / 0.3
            torch.testing.assert_close(m, 0.5 * moment + d, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(w, before - 0.1 * m, rtol=1e-5, atol=1e-6)


@EVERY_BACKEND
def test_a_gradient_opposite_to_the_decay_has_no_norm_of_sum(trial):
    w = torch.tensor([2.0, -4.0, 8.0], device=trial.device)
    lists = [w.clone()], [-0.25 * w], [torch.zeros_like(w)]
    bound(trial, weight_decay=0.25, denominator="norm_of_sum")(*lists, lr=0.1)
    assert torch.equal(lists[0][0], w) and not lists[2][0].any()


def extreme(name, scale_w=1.0, scale_g=1.0, cancel=False, **options):
    def build(generator):
        def normal(n):
            return torch.randn(n, dtype=torch.float64, generator=generator)

        params = [scale_w * normal(n) for n in (5, 700, 9000)]
        grads = [-0.3 * w + scale_g * normal(len(w)) if cancel else scale_g * normal(len(w)) for w in params]
        momenta = [torch.zeros_like(w) for w in params]
        return {"params": params, "grads": grads, "momenta": momenta, **OPTIONS, "adapt": [True] * 3, **options}

    return Case(name, build)


EXTREMES = (
    extreme("tiny_gradients", scale_g=1e-30, weight_decay=0.0),
    extreme("huge_gradients", scale_g=1e25),
    extreme("tiny_weights", scale_w=1e-25),
    extreme("tiny_weights_norm_of_sum", scale_w=1e-25, denominator="norm_of_sum"),
    extreme("nearly_cancelling", scale_g=1e-4, cancel=True, denominator="norm_of_sum"),
)


@over([t for t in trials(("float32", "float64"), of("lars_update_", *EXTREMES)) if t.backend in ("cpu", "reference")])
def test_extremes(trial):
    """Squares of 1e-30 vanish in float32, those of 1e25 overflow: the sums are float64."""
    found = trial.verdicts()
    assert all(found.values()), {what: str(verdict) for what, verdict in found.items()}


def in_pieces(lists, padding):
    """(flat lists, segments): tensors 0, 1, 2 spread over two flat tensors, tensor 1 over both, `padding` around and between."""
    whole = [[x.flatten() for x in tensors] for tensors in lists]
    sizes = [x.numel() for x in whole[0]]
    half = sizes[1] // 2
    pad = whole[0][0].new_full((5,), padding)
    flat = [[torch.cat([pad[:3], a, b[:half], pad[:1]]), torch.cat([b[half:], pad, c])] for a, b, c in whole]
    rows = [(0, 3, sizes[0], 0), (0, 3 + sizes[0], half, 1), (1, 0, sizes[1] - half, 1), (1, sizes[1] - half + 5, sizes[2], 2)]
    return flat, torch.tensor(rows)


def taken_out(flat, segments, layer):
    return torch.cat([flat[tensor][start : start + numel] for tensor, start, numel, of in segments.tolist() if of == layer])


@EVERY_BACKEND
@pytest.mark.parametrize("padding", [7.0, torch.nan])
def test_pieces_of_a_layer_are_that_layer_and_padding_is_left_alone(trial, padding):
    for denominator in ("sum", "norm_of_sum"):
        shapes, adapt = ((33, 5), (1025,), (17,)), [True, True, False]
        lists = three(*shapes, dtype=torch.float32, device=trial.device)
        flat, segments = in_pieces(lists, padding)
        before = [[x.clone() for x in tensors] for tensors in flat]
        bound(trial, denominator=denominator)(*lists, lr=0.1, adapt=adapt)
        bound(trial, denominator=denominator)(*flat, lr=0.1, adapt=adapt, segments=segments)
        for k in (0, 2):
            for layer in range(3):
                torch.testing.assert_close(taken_out(flat[k], segments, layer), lists[k][layer].flatten(), rtol=1e-6, atol=1e-6)
            for i, (x, was) in enumerate(zip(flat[k], before[k], strict=True)):
                changed = {start + j for tensor, start, numel, _ in segments.tolist() if tensor == i for j in range(numel)}
                beside = [j for j in range(len(x)) if j not in changed]
                assert len(beside) == (4, 5)[i] and torch.equal(bits(x)[beside], bits(was)[beside])
        assert all(torch.equal(bits(x), bits(was)) for x, was in zip(flat[1], before[1], strict=True))


@EVERY_BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32], ids=str)
def test_under_the_skip_flag_nothing_changes(trial, dtype):
    lists = three((33, 5), (17,), dtype=torch.float32, device=trial.device)
    lists[1][0][2, 3] = torch.nan
    before = [[x.clone() for x in tensors] for tensors in lists]
    bound(trial)(*lists, lr=0.1, skip=torch.ones(1, dtype=dtype, device=trial.device))
    assert all(torch.equal(bits(x), bits(y)) for a, b in zip(lists, before, strict=True) for x, y in zip(a, b, strict=True))
    bound(trial)(*lists, lr=0.1, skip=torch.zeros((), dtype=dtype, device=trial.device))
    assert lists[0][0].isnan().sum() == 1 and not torch.equal(lists[0][1], before[0][1])


@EVERY_BACKEND
def test_a_nan_reaches_its_layer_alone(trial):
    lists = three((300,), (17,), (5, 5), dtype=torch.float32, device=trial.device)
    plain = [[x.clone() for x in tensors] for tensors in lists]
    lists[1][1][3] = torch.nan
    for each in (lists, plain):
        bound(trial, denominator="norm_of_sum")(*each, lr=0.1)
    for k in (0, 2):
        # its norm is no number, so that there is no ratio: the other elements of the layer take a plain step
        assert lists[k][1].isnan().sum() == 1
        assert all(torch.equal(lists[k][i], plain[k][i]) for i in (0, 2))


@over([trial for trial in EVERY_TRIAL if trial.device == "cpu" and trial.backend != "triton"])
def test_many_layers_of_many_elements(trial):
    """More than the caches are trusted with at once: several batches, layers within and across them."""
    sizes = (600_000, 3, 0, 250_000, 120_001, 700_003, 64, 8192, 8193)
    truth = [three(*[(n,) for n in sizes], dtype=dtype) for dtype in (torch.float64, torch.float32)]
    lists = three(*[(n,) for n in sizes], dtype=torch.float32)
    for one in truth:
        lars_update_(*one, lr=0.1, weight_decay=0.3, trust_coefficient=0.4, backend="reference")
    bound(trial, momentum=0.9)(*lists, lr=0.1)
    for k, i in itertools.product((0, 2), range(len(sizes))):
        verdict = testing.error_vs_eager(lists[k][i], truth[1][k][i], truth[0][k][i])
        assert verdict, (k, i, str(verdict))


@over([trial for trial in EVERY_TRIAL if trial.backend == "cpu"])
def test_the_number_of_threads_changes_no_bit(trial):
    found = []
    for count in (1, 2, 3):
        lists = three((9000,), (40_000,), (5,), (300, 300), dtype=torch.float32)
        with threads(count):
            bound(trial)(*lists, lr=0.1)
        found.append([*lists[0], *lists[2]])
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def table(*rows):
    return torch.tensor(rows, dtype=torch.int64)


@over([trial for trial in EVERY_TRIAL if trial.device == "cpu"])
def test_a_graph_refuses_wrong_segments_when_it_runs(trial):
    """While it is traced there are no numbers to look at."""
    lists = three((30,), (9,), dtype=torch.float32, device=trial.device)
    before = [[x.clone() for x in tensors] for tensors in lists]
    step = torch.compile(bound(trial), fullgraph=True, backend="aot_eager")
    for rows in ([(0, 3, 9, 0), (1, 0, 10, 1)], [(0, 3, 9, 0), (0, 11, 4, 1)], [(2, 0, 1, 0)], [(0, -1, 4, 0)], [(0, 0, 4, 2)]):
        with pytest.raises(ValueError, match="^lars_update_: segments must lie inside 2 tensors and 2 layers and not overlap; row "):
            step(*lists, lr=0.1, adapt=[True, True], segments=table(*rows))
    assert all(torch.equal(x, y) for a, b in zip(lists, before, strict=True) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"grads": []}, ValueError, "the lists must be equally long; got 2 params, 0 grads, 2 momenta"),
        ({"momenta": [torch.ones(3), torch.ones(5)]}, ValueError, r"momenta\[1\] must have the shape of params\[1\], \[4\]; got \[5\]"),
        ({"grads": [torch.ones(3), None]}, TypeError, r"grads\[1\] must be a tensor; got NoneType"),
        ({"momenta": [torch.ones(3), torch.ones(1).expand(4)]}, ValueError, r"momenta\[1\] is written, and is expanded"),
        ({"denominator": "max"}, ValueError, "denominator must be one of sum, norm_of_sum; got 'max'"),
        ({"lr": -0.1}, ValueError, "lr must be in 0..*; got -0.1"),
        ({"lr": torch.tensor(0.1)}, TypeError, "lr must be a number; got Tensor"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be in"),
        ({"trust_coefficient": 0.0}, ValueError, "trust_coefficient must be finite and > 0; got 0.0"),
        ({"adapt": [True]}, ValueError, "adapt must say yes or no for each of 2 tensors; got 1"),
        ({"skip": True}, TypeError, "skip must be a tensor of one element; got bool"),
        ({"skip": torch.zeros(2)}, TypeError, r"skip must be a tensor of one element; got \[2\]"),
        ({"skip": torch.zeros((), device="meta")}, ValueError, "skip must be on the device of params; got meta and cpu"),
        ({"segments": table((0, 0, 3, 0))}, ValueError, "segments needs adapt"),
        ({"segments": table((0, 0, 3, 0)).int(), "adapt": [True]}, TypeError, r"segments must be int64 \[S, 4\]"),
        ({"segments": table((0, 0, 4, 0)), "adapt": [True]}, ValueError, r"segments must lie inside 2 tensors .* \[0, 0, 4, 0\]"),
        ({"segments": table((0, 0, 2, 0), (0, 1, 2, 0)), "adapt": [True]}, ValueError, r"not overlap; .* \[0, 1, 2, 0\]"),
        ({"segments": table((0, 0, 2, 1)), "adapt": [True]}, ValueError, r"2 tensors and 1 layers .* \[0, 0, 2, 1\]"),
        ({"group": "world"}, TypeError, "group must be None .this process alone. or a ProcessGroup"),
    ],
)
def test_refuses(changes, error, words):
    arguments = {name: [torch.ones(3), torch.ones(4)] for name in ("params", "grads", "momenta")} | {"lr": 0.1, **changes}
    with pytest.raises(error, match=f"^lars_update_: .*{words}"):
        lars_update_(**arguments)
    assert all(torch.equal(x, torch.ones_like(x)) for x in arguments["params"])
