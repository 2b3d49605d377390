"""Do ops that share a group of real gloo ranks, with different and uneven data, mean what one process on all the rows means?"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from fuseer.kernels import extension
from fuseer.kernels.functional import sinkhorn, swapped_prediction

CROPS, PROTOTYPES, ITERATIONS = 4, 9, 3
# Rows of the batch and of the queue (None: no queue) per rank.
SPLITS = {
    2: [((3, 5), None), ((3, 5), (4, 7)), ((8, 0), (0, 6)), ((0, 0), None), ((4, 4), (5, 5))],
    4: [((1, 4, 0, 3), None), ((1, 4, 0, 3), (5, 0, 2, 1)), ((2, 2, 2, 2), (3, 3, 3, 3)), ((0, 0, 0, 6), (0, 2, 0, 0))],
}


def rows(*shape, seed):
    return 2 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1


def problem(batches, queues):
    """The whole problem, every rank's share of it side by side: scores [V, sum B, K], queue_scores [2, sum Q, K] or None."""
    scores = rows(CROPS, sum(batches), PROTOTYPES, seed=sum(batches))
    return scores, None if queues is None else rows(2, sum(queues), PROTOTYPES, seed=99)


def share(tensor, counts, rank):
    return None if tensor is None else tensor.split(list(counts), dim=1)[rank]


def loss_and_gradient(scores, queue, **options):
    leaf = scores.detach().requires_grad_()
    loss = swapped_prediction(leaf, queue_scores=queue, iterations=ITERATIONS, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def counted(function):
    """What the function returns, and how many collectives gloo ran for it."""
    before = dist.group.WORLD._get_sequence_number_for_group()
    out = function()
    return out, dist.group.WORLD._get_sequence_number_for_group() - before


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    everyone, found = dist.group.WORLD, {}
    for number, (batches, queues) in enumerate(SPLITS[world]):
        scores, queue = problem(batches, queues)
        mine, my_queue = share(scores, batches, rank), share(queue, queues, rank)
        (loss, gradient), reductions = counted(lambda mine=mine, my_queue=my_queue: loss_and_gradient(mine, my_queue, group=everyone))
        codes, own = counted(lambda mine=mine: sinkhorn(mine, iterations=ITERATIONS, group=everyone, backend="reference"))
        found[f"{number}"] = {"loss": loss, "gradient": gradient, "codes": codes, "reductions": torch.tensor([reductions, own])}
        found[f"{number}"]["alone"] = loss_and_gradient(mine, my_queue)[0]
        backend = "cpu" if extension.load() and rank == 0 else "reference"
        mixed, own = counted(lambda mine=mine, backend=backend: sinkhorn(mine.float(), group=everyone, backend=backend))
        found[f"{number}"].update(mixed=mixed, mixed_reductions=torch.tensor(own))
    if world == 2:
        found["compiled"] = compiled_checks(rank, everyone)
        found["subgroup"] = subgroup_checks(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def compiled_checks(rank, everyone):
    scores, queue = problem(*SPLITS[2][1])
    mine, my_queue = share(scores, SPLITS[2][1][0], rank), share(queue, SPLITS[2][1][1], rank)
    compiled = torch.compile(loss_and_codes(everyone, my_queue), fullgraph=True, backend="aot_eager")
    leaf = mine.requires_grad_()
    loss, codes = compiled(leaf)
    return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, leaf)[0], "codes": codes}


def loss_and_codes(group, queue):
    def program(scores):
        return swapped_prediction(scores, queue_scores=queue, group=group), sinkhorn(scores, group=group, backend="reference")

    return program


def subgroup_checks(rank):
    lonely = dist.new_group([1])
    scores = problem(*SPLITS[2][0])[0]
    if rank == 1:
        return {"codes": sinkhorn(scores, group=lonely, backend="reference")}
    with pytest.raises(TypeError, match="a ProcessGroup this rank belongs to"):
        sinkhorn(scores, group=lonely)
    return {"codes": sinkhorn(scores, backend="reference")}


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What every rank found, rank by rank."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.start_processes(rank_main, (request.param, str(folder)), nprocs=request.param, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def every_split(ranks):
    for number, (batches, queues) in enumerate(SPLITS[len(ranks)]):
        yield (batches, queues), problem(batches, queues), [found[f"{number}"] for found in ranks]


def test_codes_are_those_of_all_rows(ranks):
    for _, (scores, _), found in every_split(ranks):
        whole = sinkhorn(scores, iterations=ITERATIONS, backend="reference")
        torch.testing.assert_close(torch.cat([x["codes"] for x in found], 1), whole, rtol=1e-10, atol=1e-12)


def test_mean_loss_and_averaged_gradient_are_those_of_one_process(ranks):
    for _, (scores, queue), found in every_split(ranks):
        loss, gradient = loss_and_gradient(scores, queue)
        mean = torch.stack([x["loss"] for x in found]).mean()
        assert abs(mean - loss) <= 1e-10 * abs(loss)
        averaged = torch.cat([x["gradient"] for x in found], 1) / len(ranks)
        if averaged.numel():
            assert (averaged - gradient).abs().max() <= 1e-9 * gradient.abs().max()


def test_a_rank_without_rows_returns_zero(ranks):
    empty = 0
    for (batches, _), _, found in every_split(ranks):
        for rows_here, x in zip(batches, found, strict=True):
            if rows_here == 0:
                empty += 1
                assert x["loss"].item() == 0
                assert x["gradient"].shape == (CROPS, 0, PROTOTYPES)
    assert empty


def test_one_max_and_one_sum_per_iteration_and_none_in_the_backward_pass(ranks):
    for _, _, found in every_split(ranks):
        for x in found:
            assert x["reductions"].tolist() == [ITERATIONS + 1, ITERATIONS + 1]
            assert x["mixed_reductions"].item() == ITERATIONS + 1


def test_without_a_group_a_rank_is_alone_though_torch_distributed_runs(ranks):
    for (batches, queues), (scores, queue), found in every_split(ranks):
        for rank, x in enumerate(found):
            local, _ = loss_and_gradient(share(scores, batches, rank), share(queue, queues, rank))
            torch.testing.assert_close(x["alone"], local, rtol=1e-13, atol=0)


def test_ranks_on_different_backends_agree(ranks):
    for _, (scores, _), found in every_split(ranks):
        whole = sinkhorn(scores.float(), backend="reference")
        torch.testing.assert_close(torch.cat([x["mixed"] for x in found], 1), whole, rtol=1e-4, atol=1e-6)


def test_compiles_without_a_graph_break_over_a_group(ranks):
    if len(ranks) == 2:
        for found in ranks:
            for name, x in found["compiled"].items():
                torch.testing.assert_close(x, found["1"][name], rtol=1e-13, atol=1e-15)


def test_subgroups_and_strangers_to_them(ranks):
    if len(ranks) == 2:
        whole = sinkhorn(problem(*SPLITS[2][0])[0], backend="reference")
        for found in ranks:
            torch.testing.assert_close(found["subgroup"]["codes"], whole, rtol=1e-13, atol=1e-15)
