"""Is a LARS step over real gloo ranks, with layers spread over them in pieces, the step of one process, with one all-reduce?"""

import pytest
import torch
import torch.distributed as dist
from grid import INTERPRETED, close
from test_ranks import recorded
from updates import first, of, trials

from fuseer.kernels.ema_update_ import ema_update_
from fuseer.kernels.lars_update_ import lars_update_
from fuseer.kernels.lars_update_.cases import OPTIONS
from tests.ranks import on_ranks

WORLDS = (2,) if INTERPRETED else (2, 3)
# Layers by their sizes; each rank has a share of the numbers laid end to end, the last one of two ranks or more none at all.
LAYERS, ADAPT = (700, 5, 64, 9001, 1, 33), [True, True, False, True, True, False]
PADDING = 3
KNOWN = {name: value for name, value in OPTIONS.items() if name not in ("adapt", "segments", "skip", "lr")}
RUNS = [(t.backend, getattr(torch, t.mix)) for t in trials(("float32", "float64"), of("lars_update_", *first("lars_update_")))]
DENOMINATORS = ("sum", "norm_of_sum")


def whole(dtype):
    """(params, grads, momenta), each a flat tensor of all layers; weights that grow, so that a piece has another ratio than its layer."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(sum(LAYERS), generator=generator, dtype=torch.float64) for _ in range(3)]
    made[0] *= torch.linspace(0.01, 3, sum(LAYERS), dtype=torch.float64)
    return [x.float().to(dtype) for x in made]


def share(rank, world):
    """(begin, end) of the rank's numbers among all; with three ranks the last has none."""
    owners = min(world, 2)
    cuts = [0, 4321, sum(LAYERS)] if owners == 2 else [0, sum(LAYERS)]
    return (cuts[rank], cuts[rank + 1]) if rank < owners else (sum(LAYERS), sum(LAYERS))


def segments(begin, end):
    """Rows (tensor, start, numel, layer) of the layers' pieces between begin and end, `PADDING` behind each."""
    rows, at, offset = [], 0, 0
    for layer, size in enumerate(LAYERS):
        numel = min(end, at + size) - max(begin, at)
        if numel > 0:
            rows.append((0, offset, numel, layer))
            offset += numel + PADDING
        at += size
    return torch.tensor(rows, dtype=torch.int64).view(-1, 4)


def padded(x, begin, end, table):
    """The rank's numbers with NaN behind each piece."""
    flat, at = x.new_full((end - begin + PADDING * len(table),), torch.nan), begin
    for _, start, numel, _ in table.tolist():
        flat[start : start + numel], at = x[at : at + numel], at + numel
    return flat


def unpadded(flat, table):
    return torch.cat([flat[:0], *(flat[start : start + numel] for _, start, numel, _ in table.tolist())])


def step(rank, world, backend, dtype, group, **options):
    """What the rank holds after one step: {"params": its numbers, "momenta": its numbers}."""
    begin, end = share(rank, world)
    table = segments(begin, end)
    lists = [[padded(x, begin, end, table)] for x in whole(dtype)]
    lars_update_(*lists, lr=0.1, adapt=ADAPT, segments=table, group=group, backend=backend, **{**KNOWN, **options})
    return {"params": unpadded(lists[0][0], table), "momenta": unpadded(lists[2][0], table)}


def rank_main(rank, world):
    everyone, found = dist.group.WORLD, {}
    for backend, dtype in RUNS:
        for denominator in DENOMINATORS:
            with recorded(everyone) as calls:
                here = step(rank, world, backend, dtype, everyone, denominator=denominator)
            found[backend, dtype, denominator] = {**here, "calls": calls}
        # a skipped step too joins the all-reduce, for the others may not skip
        skip = torch.ones(())
        with recorded(everyone) as calls:
            here = step(rank, world, backend, dtype, everyone, skip=skip if rank == 0 else None)
        found[backend, dtype, "skipped"] = {**here, "calls": calls}
        found[backend, dtype, "alone"] = step(rank, world, backend, dtype, None)
    single = [backend for backend, dtype in RUNS if dtype == torch.float32]
    found["mixed"] = step(rank, world, single[rank % len(single)], torch.float32, everyone)
    with recorded(everyone) as calls:
        ema_update_([torch.ones(3)], [torch.zeros(3)], 0.5)
    found["ema"] = calls
    with pytest.raises(ValueError) as refusal:
        lars_update_([], [], [], lr=0.1, group=everyone)
    found["nothing"] = str(refusal.value)
    found["compiled"] = [compiled(rank, world, *run) for run in RUNS]
    return found


def compiled(rank, world, backend, dtype):
    """Whether a whole graph around the op does what the op does; one layer, a piece of it on every rank."""
    torch._dynamo.reset()
    begin, end = share(rank, world)

    def call(*lists):
        lars_update_(*lists, lr=0.1, group=dist.group.WORLD, backend=backend, **KNOWN)

    found = []
    for program in (torch.compile(call, fullgraph=True, backend="aot_eager"), call):
        lists = [[x[begin:end].clone()] for x in whole(dtype)]
        program(*lists)
        found.append(torch.cat([*lists[0], *lists[2]]))
    return torch.equal(*found)


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request):
    """What every rank found, rank by rank."""
    return on_ranks(request.param, rank_main, request.param)


def by_one_process(name, **options):
    """The reference on whole layers."""

    def run(dtype):
        lists = [list(x.split(LAYERS)) for x in whole(dtype)]
        lars_update_(*lists, lr=0.1, adapt=ADAPT, backend="reference", **{**KNOWN, **options})
        return torch.cat(lists[0 if name == "params" else 2])

    return run


def test_the_step_is_that_of_whole_layers(ranks):
    for backend, dtype in RUNS:
        for denominator in DENOMINATORS:
            for name in ("params", "momenta"):
                found = torch.cat([x[backend, dtype, denominator][name] for x in ranks])
                close(found, dtype, by_one_process(name, denominator=denominator), 1e-13)


def test_a_rank_that_takes_its_piece_for_a_layer_is_found_out(ranks):
    """What the same ranks do without a group is another step."""
    for backend, dtype in RUNS:
        found = torch.cat([x[backend, dtype, "alone"]["params"] for x in ranks])
        whole_step = by_one_process("params")(torch.float64)
        assert (found - whole_step).norm() > 1e-3 * whole_step.norm()


def test_one_all_reduce_of_three_float64_a_layer_and_nothing_else(ranks):
    for backend, dtype in RUNS:
        for what in (*DENOMINATORS, "skipped"):
            for x in ranks:
                assert x[backend, dtype, what]["calls"] == [("sum", 3 * len(LAYERS), torch.float64), 1], (backend, dtype, what)
    assert all(x["ema"] == [0] for x in ranks)


def test_a_rank_that_skips_keeps_its_numbers_and_joins_the_others(ranks):
    world = len(ranks)
    for backend, dtype in RUNS:
        begin, end = share(0, world)
        assert torch.equal(ranks[0][backend, dtype, "skipped"]["params"], whole(dtype)[0][begin:end])
        for rank in range(1, world):
            begin, end = share(rank, world)
            assert torch.equal(ranks[rank][backend, dtype, "skipped"]["params"], ranks[rank][backend, dtype, "sum"]["params"])


def test_ranks_on_different_backends_agree(ranks):
    for name in ("params", "momenta"):
        close(torch.cat([x["mixed"][name] for x in ranks]), torch.float32, by_one_process(name), 0)


def test_compiles_without_a_graph_break_over_a_group(ranks):
    assert all(all(x["compiled"]) and x["compiled"] for x in ranks)


def test_a_rank_without_a_tensor_is_told_to_bring_an_empty_one(ranks):
    """It would stay away from the all-reduce, and the others would wait for it."""
    assert all("a tensor on every rank, an empty one at least; got none" in found["nothing"] for found in ranks)
