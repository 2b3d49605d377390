"""Do ops that share a group of real gloo ranks, with different and uneven data, mean what one process on all the rows means?"""

import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from grid import INTERPRETED, close, part, refusal, threads

from fuseer.kernels import dispatch
from fuseer.kernels.functional import sinkhorn, swapped_prediction
from tests.ranks import on_ranks

CROPS, HEADS, PROTOTYPES, ITERATIONS = 4, 3, 9, 3
# Rows of the batch and of the queue (None: no queue) per rank.
SPLITS = {
    2: [((3, 5), None), ((3, 5), (4, 7)), ((8, 0), (0, 6)), ((0, 0), None), ((4, 4), (5, 5))],
    3: [((2, 0, 40), None), ((7, 1, 3), (3, 1, 0))],
    4: [((1, 4, 0, 3), None), ((1, 4, 0, 3), (5, 0, 2, 1)), ((2, 2, 2, 2), (3, 3, 3, 3)), ((0, 0, 0, 6), (0, 2, 0, 0))],
}
if INTERPRETED:
    SPLITS = {2: SPLITS[2][1:3]}


def runs(op):
    """(backend, dtype) in which this op runs here: all that is single, and all that is double."""
    example = torch.zeros(2, 3, 4)
    options = {"sinkhorn": (0.05, 3, ""), "swapped_prediction": (None, [0, 1], 0.05, 3, 0.1, "")}[op]
    parameters = part(op, "reference").__dict__[op].__code__.co_varnames
    found = []
    for impl in part(op, "op").IMPLS:
        backend = dispatch.backend_of(impl)
        for dtype in (torch.float32, torch.float64):
            arguments = dict(zip(parameters, (example.to(dtype), *options), strict=False))
            if (backend == "triton" or not INTERPRETED) and refusal(op, impl, arguments) is None:
                found.append((backend, dtype))
    return found


SINKHORN, SWAPPED = runs("sinkhorn"), runs("swapped_prediction")


def rows(*shape, seed):
    """Numbers that float32 holds, in float64."""
    return (2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1).double()


def problem(batches, queues):
    """The whole problem, every rank's share of it side by side: scores [V, sum B, K], queue_scores [2, sum Q, K] or None."""
    scores = rows(CROPS, sum(batches), PROTOTYPES, seed=sum(batches))
    return scores, None if queues is None else rows(2, sum(queues), PROTOTYPES, seed=99)


def share(tensor, counts, rank, dtype):
    return None if tensor is None else tensor.split(list(counts), dim=1)[rank].to(dtype)


def loss_and_gradient(scores, queue, **options):
    leaf = scores.detach().requires_grad_()
    loss = swapped_prediction(leaf, queue_scores=queue, iterations=ITERATIONS, **options)
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, leaf)[0]}


@contextlib.contextmanager
def recorded(group):
    """Appends (reduction, numel, dtype) of each functional all-reduce, of Python and C++; then the number of all collectives gloo ran."""
    calls, before = [], group._get_sequence_number_for_group()

    def all_reduce(tensor, reduction, name):
        calls.append((reduction, tensor.numel(), tensor.dtype))
        return torch.ops._c10d_functional.all_reduce_(tensor.clone(), reduction, name)

    with torch.library._scoped_library("_c10d_functional", "IMPL") as library:
        library.impl("all_reduce", all_reduce, "CPU")
        yield calls
    calls.append(group._get_sequence_number_for_group() - before)


def rank_main(rank, world):
    everyone, found = dist.group.WORLD, {}
    for split, (batches, queues) in enumerate(SPLITS[world]):
        for backend, dtype in SWAPPED:
            mine, my_queue = (share(x, n, rank, dtype) for x, n in zip(problem(batches, queues), (batches, queues), strict=True))
            call = functools.partial(loss_and_gradient, mine, my_queue, backend=backend)
            with recorded(everyone) as calls:
                here = call(group=everyone)
            again = call(group=everyone)
            here |= {"calls": calls, "repeats": all(torch.equal(again[name], here[name]) for name in again), "alone": call()["loss"]}
            found["swapped_prediction", backend, dtype, split] = here
        for backend, dtype in SINKHORN:
            mine = share(problem(batches, queues)[0], batches, rank, dtype).view(2, CROPS // 2, batches[rank], PROTOTYPES)
            with recorded(everyone) as calls:
                codes = sinkhorn(mine, iterations=ITERATIONS, group=everyone, backend=backend)
            again = sinkhorn(mine, iterations=ITERATIONS, group=everyone, backend=backend)
            found["sinkhorn", backend, dtype, split] = {"codes": codes, "calls": calls, "repeats": torch.equal(codes, again)}
    found["mixed"] = mixed_backends(rank, world, everyone)
    found["subgroup"] = subgroup(rank, world)
    if world == 2:
        found["compiled"] = {run: compiled(rank, everyone, *run) for run in SWAPPED if run in SINKHORN}
        with threads(2):
            found["two threads"] = [sinkhorn(rows(1, 70, 900, seed=rank).float(), group=everyone) for _ in range(2)]
    return found


def mixed_backends(rank, world, everyone):
    """Rank r on the r-th backend, as where one machine lacks a compiler: {op: its result in float32}."""
    batches, queues = SPLITS[world][1]
    scores, queue = problem(batches, queues)
    mine, my_queue = share(scores, batches, rank, torch.float32), share(queue, queues, rank, torch.float32)
    of_rank = {}
    for op, every in (("sinkhorn", SINKHORN), ("swapped_prediction", SWAPPED)):
        single = [backend for backend, dtype in every if dtype == torch.float32]
        of_rank[op] = single[rank % len(single)]
    return {
        "codes": sinkhorn(mine, iterations=ITERATIONS, group=everyone, backend=of_rank["sinkhorn"]),
        **loss_and_gradient(mine, my_queue, group=everyone, backend=of_rank["swapped_prediction"]),
    }


def subgroup(rank, world):
    """Rank 0 stays out; the others split the rows of the first problem evenly among them."""
    group = dist.new_group(list(range(1, world)))
    if rank == 0:
        with pytest.raises(TypeError, match="a ProcessGroup this rank belongs to"):
            sinkhorn(torch.zeros(3, 2), group=group)
        return {}
    scores = rows(CROPS, 6, PROTOTYPES, seed=5)
    found = {}
    for backend, dtype in SWAPPED:
        mine = share(scores, [6 // (world - 1)] * (world - 1), rank - 1, dtype)
        found[backend, dtype] = loss_and_gradient(mine, None, group=group, backend=backend)
    return found


def compiled(rank, group, backend, dtype):
    """{name: (from torch.compile, plain)} of both ops over a group, forward and backward, in one whole graph."""
    batches, queues = SPLITS[2][1]
    mine, my_queue = (share(x, n, rank, dtype) for x, n in zip(problem(batches, queues), (batches, queues), strict=True))

    def program(scores):
        loss = swapped_prediction(scores, queue_scores=my_queue, group=group, backend=backend)
        return loss, sinkhorn(scores, group=group, backend=backend)

    torch._dynamo.reset()
    found = []
    for call in (torch.compile(program, fullgraph=True, dynamic=True, backend="aot_eager"), program):
        leaf = mine.clone().requires_grad_()
        loss, codes = call(leaf)
        found.append({"loss": loss.detach(), "codes": codes, "gradient": torch.autograd.grad(loss, leaf)[0]})
    return {name: (found[0][name], found[1][name]) for name in found[0]}


@pytest.fixture(scope="module", params=SPLITS)
def ranks(request):
    """What every rank found, rank by rank."""
    return on_ranks(request.param, rank_main, request.param)


def every_split(ranks, op):
    """(backend, dtype, (batches, queues), what each rank found)."""
    for backend, dtype in SINKHORN if op == "sinkhorn" else SWAPPED:
        for split, sizes in enumerate(SPLITS[len(ranks)]):
            yield backend, dtype, sizes, [found[op, backend, dtype, split] for found in ranks]


def test_codes_are_those_of_all_rows(ranks):
    for _, dtype, (batches, queues), found in every_split(ranks, "sinkhorn"):
        scores = problem(batches, queues)[0]
        codes = torch.cat([x["codes"].flatten(0, 1) for x in found], 1)
        close(codes, dtype, lambda dt, s=scores: sinkhorn(s.to(dt), iterations=ITERATIONS, backend="reference"), 1e-10)


def whole_swapped(name, batches, queues):
    scores, queue = problem(batches, queues)
    return lambda dtype: loss_and_gradient(scores.to(dtype), None if queue is None else queue.to(dtype), backend="reference")[name]


def test_mean_loss_and_averaged_gradient_are_those_of_one_process(ranks):
    for _, dtype, sizes, found in every_split(ranks, "swapped_prediction"):
        close(torch.stack([x["loss"] for x in found]).mean(), dtype, whole_swapped("loss", *sizes), 1e-10)
        close(torch.cat([x["gradient"] for x in found], 1) / len(ranks), dtype, whole_swapped("gradient", *sizes), 1e-9)


def test_a_rank_without_rows_returns_zero(ranks):
    empty = 0
    for _, _, (batches, _), found in every_split(ranks, "swapped_prediction"):
        for rows_here, x in zip(batches, found, strict=True):
            if rows_here == 0:
                empty += 1
                assert x["loss"].item() == 0
                assert x["gradient"].shape == (CROPS, 0, PROTOTYPES)
    assert empty


def test_one_max_and_one_sum_per_iteration_of_nothing_but_columns(ranks):
    """The buffers: all heads and crops side by side; swapped_prediction's first sum carries the number of rows and of ranks as well."""
    for op, columns, passengers in (("sinkhorn", CROPS * PROTOTYPES, 0), ("swapped_prediction", 2 * PROTOTYPES, 2)):
        for backend, dtype, _, found in every_split(ranks, op):
            sums = [("sum", columns + passengers, dtype), *[("sum", columns, dtype)] * (ITERATIONS - 1)]
            for x in found:
                assert x["calls"] == [("max", columns, dtype), *sums, ITERATIONS + 1], (op, backend)


def test_two_runs_give_the_same_bits(ranks):
    for op in ("sinkhorn", "swapped_prediction"):
        for backend, dtype, sizes, found in every_split(ranks, op):
            assert all(x["repeats"] for x in found), (op, backend, dtype, sizes)
    for found in ranks:
        if len(ranks) == 2:
            assert torch.equal(*found["two threads"])


def test_without_a_group_a_rank_is_alone_though_torch_distributed_runs(ranks):
    for backend, dtype, (batches, queues), found in every_split(ranks, "swapped_prediction"):
        scores, queue = problem(batches, queues)
        for rank, x in enumerate(found):
            mine, my_queue = share(scores, batches, rank, dtype), share(queue, queues, rank, dtype)
            assert torch.equal(x["alone"], loss_and_gradient(mine, my_queue, backend=backend)["loss"])


def test_ranks_on_different_backends_agree(ranks):
    sizes = SPLITS[len(ranks)][1]
    found = [x["mixed"] for x in ranks]
    scores = problem(*sizes)[0]
    codes = torch.cat([x["codes"] for x in found], 1)
    close(codes, torch.float32, lambda dt: sinkhorn(scores.to(dt), iterations=ITERATIONS, backend="reference"), 0)
    close(torch.stack([x["loss"] for x in found]).mean(), torch.float32, whole_swapped("loss", *sizes), 0)
    close(torch.cat([x["gradient"] for x in found], 1) / len(ranks), torch.float32, whole_swapped("gradient", *sizes), 0)


def test_a_group_of_some_ranks_and_strangers_to_it(ranks):
    scores = rows(CROPS, 6, PROTOTYPES, seed=5)
    members = [x["subgroup"] for x in ranks[1:]]
    assert ranks[0]["subgroup"] == {}
    for backend, dtype in SWAPPED:
        found = [x[backend, dtype] for x in members]
        for name, whole, bound in (("loss", torch.stack, 1e-10), ("gradient", functools.partial(torch.cat, dim=1), 1e-9)):
            mean = whole([x[name] for x in found])
            mean = mean.mean() if name == "loss" else mean / len(members)
            close(mean, dtype, lambda dt, name=name: loss_and_gradient(scores.to(dt), None, backend="reference")[name], bound)


def test_compiles_without_a_graph_break_over_a_group(ranks):
    for found in ranks:
        for run, results in found.get("compiled", {}).items():
            for name, (whole_graph, plain) in results.items():
                assert torch.equal(whole_graph, plain), (run, name)
    assert len(ranks) != 2 or all(found["compiled"] for found in ranks)
