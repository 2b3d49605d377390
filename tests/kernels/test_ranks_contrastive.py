"""Do nt_xent and info_nce over a group of real gloo ranks, with different and uneven rows, mean what one process on all rows means?"""

import functools
import importlib

import pytest
import torch
import torch.distributed as dist
from grid import INTERPRETED, close, part, refusal

from fuseer.kernels import dispatch
from fuseer.kernels.functional import info_nce, nt_xent
from tests.ranks import on_ranks

WIDTH, QUEUE = 6, 13
# Rows per rank.
SPLITS = {
    2: [(3, 5), (8, 0), (0, 0), (4, 4)],
    3: [(2, 0, 17), (7, 1, 3)],
    4: [(1, 4, 0, 3), (2, 2, 2, 2), (0, 0, 0, 6)],
}
if INTERPRETED:
    SPLITS = {2: SPLITS[2][:1]}
TEMPERATURES = (0.1, 0.01)
KINDS = ("nt_xent", "queue", "gathered")


def runs():
    """(backend, dtype) in which the ops run here: all that is single, and all that is double."""
    found = []
    for impl in part("nt_xent", "op").IMPLS:
        backend = dispatch.backend_of(impl)
        for dtype in (torch.float32, torch.float64):
            z = torch.zeros(2, WIDTH, dtype=dtype)
            reason = refusal("nt_xent", impl, {"z1": z, "z2": z, "temperature": 0.1, "normalize": True})
            if (backend == "triton" or not INTERPRETED) and reason is None:
                found.append((backend, dtype))
    return found


RUNS = runs()


def rows(n, seed):
    """Numbers that float32 holds, in float64."""
    return torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed)).double()


def problem(split):
    n = sum(split)
    return {"one": rows(n, 1), "other": rows(n, 2), "queue": rows(QUEUE, 3)}


def loss_and_gradient(kind, given, temperature, first=0, count=None, **options):
    """A loss of this process's rows [first, first + count), and its gradient to them (of nt_xent: to both views, side by side)."""
    count = len(given["one"]) if count is None else count
    one, other = (given[name][first : first + count].clone().requires_grad_() for name in ("one", "other"))
    if kind == "nt_xent":
        loss = nt_xent(one, other, temperature=temperature, **options)
        return {"loss": loss.detach(), "gradient": torch.cat(torch.autograd.grad(loss, (one, other)), 1)}
    if kind == "queue":
        loss = info_nce(one, given["queue"], positive=other, temperature=temperature, **options)
    else:
        loss = info_nce(one, given["other"], positive_index=torch.arange(first, first + count), temperature=temperature, **options)
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, one)[0]}


def rank_main(rank, world):
    if INTERPRETED:
        # a process of its own does not load pytest's plugins
        importlib.import_module("interpreter").mend()
    everyone, found = dist.group.WORLD, {}
    for split in SPLITS[world]:
        place = {"first": sum(split[:rank]), "count": split[rank]}
        for backend, dtype in RUNS:
            given = {name: x.to(dtype) for name, x in problem(split).items()}
            for kind in KINDS:
                for temperature in TEMPERATURES:
                    call = functools.partial(loss_and_gradient, kind, given, temperature, **place, backend=backend)
                    before = everyone._get_sequence_number_for_group()
                    here = call(group=everyone)
                    here["collectives"] = everyone._get_sequence_number_for_group() - before
                    again = call(group=everyone)
                    here["repeats"] = all(torch.equal(again[name], here[name]) for name in again)
                    here["alone"] = call()["loss"]
                    if len(set(split)) == 1 and kind == "nt_xent":
                        promised = call(group=everyone, same_rows=True)
                        here["promised"] = all(torch.equal(promised[name], here[name]) for name in promised)
                    found[kind, backend, dtype, split, temperature] = here
    found["no gradient"] = without_gradient(rank, world, everyone)
    found["mixed"] = mixed_backends(rank, world, everyone)
    if world == 2:
        found["compiled"] = {run: compiled(rank, everyone, *run) for run in RUNS}
    return found


def without_gradient(rank, world, group):
    """{backend: (loss with a graph, loss without, collectives of the latter)}"""
    split, found = SPLITS[world][0], {}
    mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
    for backend, dtype in RUNS:
        one, other = (problem(split)[name][mine].to(dtype) for name in ("one", "other"))
        recorded = nt_xent(one.requires_grad_(), other, group=group, backend=backend).detach()
        before = group._get_sequence_number_for_group()
        with torch.no_grad():
            plain = nt_xent(one, other, group=group, backend=backend)
        found[backend, dtype] = (recorded, plain, group._get_sequence_number_for_group() - before)
    return found


def mixed_backends(rank, world, group):
    """Rank r on the r-th backend, as where one machine lacks a compiler."""
    split = SPLITS[world][0]
    single = [backend for backend, dtype in RUNS if dtype == torch.float32]
    given = {name: x.float() for name, x in problem(split).items()}
    place = {"first": sum(split[:rank]), "count": split[rank]}
    return {kind: loss_and_gradient(kind, given, 0.1, **place, group=group, backend=single[rank % len(single)]) for kind in KINDS}


def compiled(rank, group, backend, dtype):
    """{name: (from torch.compile, plain)} of both ops over a group, forward and backward, in one whole graph."""
    split = SPLITS[2][0]
    mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
    one, other, queue = (problem(split)[name].to(dtype) for name in ("one", "other", "queue"))

    def program(z1, z2):
        return nt_xent(z1, z2, group=group, backend=backend), info_nce(z1, queue, positive=z2, group=group, backend=backend)

    torch._dynamo.reset()
    found = []
    for call in (torch.compile(program, fullgraph=True, dynamic=True, backend="aot_eager"), program):
        leaf = one[mine].clone().requires_grad_()
        losses = call(leaf, other[mine])
        found.append([*(loss.detach() for loss in losses), torch.autograd.grad(sum(losses), leaf)[0]])
    return list(zip(*found, strict=True))


@pytest.fixture(scope="module", params=SPLITS)
def ranks(request):
    """What every rank found, rank by rank."""
    return on_ranks(request.param, rank_main, request.param)


def every(ranks):
    for kind in KINDS:
        for backend, dtype in RUNS:
            for split in SPLITS[len(ranks)]:
                for temperature in TEMPERATURES:
                    yield kind, backend, dtype, split, temperature, [x[kind, backend, dtype, split, temperature] for x in ranks]


def whole(name, kind, split, temperature):
    def run(dtype):
        given = {key: x.to(dtype) for key, x in problem(split).items()}
        return loss_and_gradient(kind, given, temperature, backend="reference")[name]

    return run


def test_mean_loss_and_averaged_gradient_are_those_of_one_process(ranks):
    for kind, _, dtype, split, temperature, found in every(ranks):
        close(torch.stack([x["loss"] for x in found]).mean(), dtype, whole("loss", kind, split, temperature), 1e-10)
        gradient = torch.cat([x["gradient"] for x in found]) / len(ranks)
        close(gradient, dtype, whole("gradient", kind, split, temperature), 1e-9)


def test_a_rank_without_rows_returns_zero(ranks):
    empty = 0
    for _, _, _, split, _, found in every(ranks):
        for count, x in zip(split, found, strict=True):
            if count == 0:
                empty += 1
                assert x["loss"].item() == 0
                assert len(x["gradient"]) == 0
    assert empty or INTERPRETED


def test_features_and_sums_are_gathered_once_and_the_backward_needs_nobody(ranks):
    """nt_xent: how many rows, the rows, their sums. info_nce: how many rows."""
    for kind, _, _, split, _, found in every(ranks):
        expected = 1 if kind != "nt_xent" else 3 if sum(split) else 2
        assert [x["collectives"] for x in found] == [expected] * len(ranks), (kind, split)


def test_without_a_gradient_the_sums_stay_at_home(ranks):
    for x in ranks:
        for recorded, plain, collectives in x["no gradient"].values():
            assert torch.equal(recorded, plain)
            assert collectives == 2


def test_two_runs_give_the_same_bits_and_so_does_the_promise_of_equal_rows(ranks):
    promised = 0
    for *_, found in every(ranks):
        assert all(x["repeats"] for x in found)
        promised += "promised" in found[0]
        assert all(x.get("promised", True) for x in found)
    assert promised or INTERPRETED or len(ranks) == 3


def test_without_a_group_a_rank_is_alone_though_torch_distributed_runs(ranks):
    for kind, backend, dtype, split, temperature, found in every(ranks):
        given = {name: x.to(dtype) for name, x in problem(split).items()}
        for rank, x in enumerate(found):
            place = {"first": sum(split[:rank]), "count": split[rank]}
            assert torch.equal(x["alone"], loss_and_gradient(kind, given, temperature, **place, backend=backend)["loss"])


def test_ranks_on_different_backends_agree(ranks):
    split = SPLITS[len(ranks)][0]
    for kind in KINDS:
        found = [x["mixed"][kind] for x in ranks]
        close(torch.stack([x["loss"] for x in found]).mean(), torch.float32, whole("loss", kind, split, 0.1), 0)
        close(torch.cat([x["gradient"] for x in found]) / len(ranks), torch.float32, whole("gradient", kind, split, 0.1), 0)


def test_compiles_without_a_graph_break_over_a_group(ranks):
    for found in ranks:
        for run, results in found.get("compiled", {}).items():
            assert all(torch.equal(*pair) for pair in results), run
    assert len(ranks) != 2 or all(found["compiled"] for found in ranks)
