"""Does the queue lose nothing and ask the host nothing, and are the drop-in losses the formulas that they replace?"""

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fuseer.kernels import extension
from fuseer.kernels.modules import NTXentLoss, Queue, SwaVLoss
from tests.ranks import on_ranks


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def numbered(start, count, width=2):
    """Keys that say which they are."""
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(count, width)


class AsksNothing(TorchDispatchMode):
    """Refuses what makes the host wait for the device: reading a value, shapes that depend on values."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal), function
        return function(*arguments, **(keywords or {}))


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(length=st.integers(1, 12), batches=st.lists(st.integers(0, 30), max_size=8))
def test_the_queue_is_a_ring(length, batches):
    queue = Queue(length, 2)
    ring, place, pushed = queue.rows[:, 0].tolist(), 0, 100
    for batch in batches:
        with AsksNothing():
            queue.push(numbered(pushed, batch))
        for key in range(pushed, pushed + batch):
            ring[place], place = float(key), (place + 1) % length
        pushed += batch
        assert queue.rows[:, 0].tolist() == ring
        assert queue.pointer.item() == place


def test_the_queue_starts_with_different_unit_rows():
    rows = Queue(50, 8).rows
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(50))
    assert torch.linalg.matrix_rank(rows) == 8 and not torch.equal(rows, Queue(50, 8).rows)


def test_the_last_rows_of_a_batch_survive_the_end_of_the_ring():
    queue = Queue(5, 2)
    for start in (0, 3, 6):
        queue.push(numbered(start, 3))
    assert queue.rows[:, 0].tolist() == [5, 6, 7, 8, 4]


@pytest.mark.parametrize("pushed", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keys_are_cast_to_the_dtype_of_the_rows_and_carry_no_gradient(pushed):
    for kept in (torch.float32, torch.bfloat16):
        queue = Queue(4, 3).to(kept)
        keys = normal(2, 3).to(pushed).requires_grad_()
        queue.push(keys * 2)
        assert queue.rows.dtype == kept and queue.pointer.dtype == torch.int64
        assert not queue.rows.requires_grad and keys.grad is None
        assert torch.equal(queue.rows[:2], (keys.detach() * 2).to(kept))


def test_the_queue_is_saved_and_goes_on_where_it_was():
    queue, other = Queue(7, 3), Queue(7, 3)
    queue.push(normal(5, 3))
    kept = copy.deepcopy(queue.state_dict())
    assert set(kept) == {"rows", "pointer"} and kept["pointer"].shape == ()
    queue.push(normal(4, 3, seed=1))
    other.load_state_dict(kept)
    other.push(normal(4, 3, seed=1))
    assert torch.equal(queue.rows, other.rows) and torch.equal(queue.pointer, other.pointer)


def test_rows_and_pointer_stay_the_same_tensors():
    """What holds them, a checkpoint or a CUDA graph, sees the new values."""
    queue = Queue(3, 2)
    rows, pointer = queue.rows, queue.pointer
    queue.push(numbered(1, 4))
    assert queue.rows is rows and queue.pointer is pointer and rows[:, 0].tolist() == [4, 2, 3] and pointer.item() == 1


def test_the_queue_compiles_whole_and_once_for_all_batch_sizes():
    torch._dynamo.reset()
    queue, counter = Queue(7, 8), CompileCounter()
    eager = copy.deepcopy(queue)
    compiled = torch.compile(queue.push, fullgraph=True, dynamic=True, backend=counter)
    for seed, batch in enumerate((3, 5, 2, 9, 20, 4)):
        keys = normal(batch, 8, seed=seed).float()
        compiled(keys)
        eager.push(keys)
        assert torch.equal(queue.rows, eager.rows) and torch.equal(queue.pointer, eager.pointer)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Queue(0, 3), ValueError, "length must be >= 1; got 0"),
        (lambda: Queue(3, 0), ValueError, "width must be >= 1; got 0"),
        (lambda: Queue(3.0, 3), TypeError, "length must be an integer; got float"),
        (lambda: Queue(3, 2).push(torch.ones(2, 3)), ValueError, r"keys must be \[B, D\] = \[2, 2\]; got \[2, 3\]"),
        (lambda: Queue(3, 2).push(torch.ones(2)), ValueError, r"keys must be \[B, D\]; got \[2\]"),
        (lambda: Queue(3, 2).push(torch.ones(1, 2, dtype=torch.int32)), TypeError, "keys must be float16"),
        (lambda: Queue(3, 2).push(torch.ones(1, 2, device="meta")), ValueError, "keys must be on the device of rows; got meta and cpu"),
    ],
)
def test_the_queue_refuses(call, error, words):
    with pytest.raises(error, match=f"^Queue: {words}"):
        call()


def contrastive(out0, out1, temperature):
    """SimCLR's loss as a classification: of every row's 2N - 1 others the other view is the right one."""
    rows = F.normalize(torch.cat([out0, out1]), dim=1)
    n, losses = len(out0), []
    for i in range(2 * n):
        others = torch.cat([rows[:i], rows[i + 1 :]])
        right = (i + n) % (2 * n)
        losses.append(F.cross_entropy(others @ rows[i] / temperature, torch.tensor(right - (right > i))))
    return torch.stack(losses).mean()


def against_a_bank(out0, out1, bank, temperature):
    """MoCo's loss as a classification: the key is the first of Q + 1 candidates."""
    query, keys, bank = (F.normalize(x, dim=1) for x in (out0, out1, bank))
    logits = torch.cat([(query * keys).sum(1, keepdim=True), query @ bank.T], dim=1)
    return F.cross_entropy(logits / temperature, torch.zeros(len(query), dtype=torch.int64))


def swapped(high, low, queue, temperature, iterations, epsilon):
    """SwAV's loss from its published Sinkhorn, one pair of crops at a time."""
    crops, loss = [*high, *low], 0.0
    for i, assigned in enumerate(high):
        rows = assigned.detach() if queue is None else torch.cat([assigned.detach(), queue[i]])
        plan = (rows / epsilon).exp()
        for _ in range(iterations):
            plan = plan / plan.sum(0)
            plan = plan / plan.sum(1, keepdim=True)
        for v, crop in enumerate(crops):
            if v != i:
                loss = loss - (plan[: len(assigned)] * (crop / temperature).log_softmax(1)).sum(1).mean() / (len(crops) - 1)
    return loss / len(high)


def same(found, expected, leaves):
    """Equal values, scalars both, and equal gradients at the leaves."""
    assert found.shape == expected.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    gradients = (torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True) for loss in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * theirs.abs().max().item())


@pytest.mark.parametrize("temperature", [0.5, 0.1, -0.3])
@pytest.mark.parametrize("gather", [False, True])
def test_without_a_bank_it_is_the_contrastive_loss(temperature, gather):
    """torch.distributed is not initialised here: to gather is to do nothing."""
    leaves = [normal(7, 5, seed=seed).requires_grad_() for seed in range(2)]
    same(NTXentLoss(temperature, gather_distributed=gather)(*leaves), contrastive(*leaves, temperature), leaves)


def test_the_temperature_of_the_default_is_lightlys():
    leaves = [normal(4, 3, seed=seed) for seed in range(2)]
    torch.testing.assert_close(NTXentLoss()(*leaves), contrastive(*leaves, 0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.5, 0.07, -0.4])
@pytest.mark.parametrize("gather", [False, True])
def test_with_a_bank_it_is_mocos_loss_step_after_step(temperature, gather):
    """The loss is that of the bank before its own keys enter; the third batch wraps around, and its tail stays."""
    criterion = NTXentLoss(temperature, memory_bank_size=(10, 5), gather_distributed=gather).double()
    bank, place = criterion.memory_bank.rows.clone(), 0
    for step, batch in enumerate((4, 3, 5, 4)):
        query, keys = normal(batch, 5, seed=step).requires_grad_(), normal(batch, 5, seed=step + 50)
        expected = against_a_bank(query, keys, bank, temperature)
        same(criterion(query, keys), expected, [query])
        for key in F.normalize(keys, dim=1):
            bank[place], place = key, (place + 1) % 10
        torch.testing.assert_close(criterion.memory_bank.rows, bank, rtol=1e-12, atol=1e-12)


def test_the_backward_pass_may_come_after_the_bank_has_changed():
    criterion = NTXentLoss(0.2, memory_bank_size=(6, 5)).double()
    query, keys, bank = normal(4, 5).requires_grad_(), normal(4, 5, seed=1), criterion.memory_bank.rows.clone()
    loss = criterion(query, keys)
    criterion.memory_bank.push(normal(6, 5, seed=2))
    same(loss, against_a_bank(query, keys, bank, 0.2), [query])


def test_the_bank_stands_still_where_nothing_is_learnt():
    criterion = NTXentLoss(memory_bank_size=(6, 5))
    kept = criterion.memory_bank.rows.clone()
    criterion(normal(4, 5).float(), normal(4, 5, seed=1).float())
    assert torch.equal(criterion.memory_bank.rows, kept) and criterion.memory_bank.pointer.item() == 0


@pytest.mark.parametrize("size", [0, (0,), (0, 128), [0, 128]])
def test_a_bank_of_no_rows_is_none(size):
    criterion = NTXentLoss(memory_bank_size=size)
    assert criterion.memory_bank is None and not criterion.state_dict()


def test_a_half_query_meets_a_single_bank():
    criterion = NTXentLoss(memory_bank_size=[6, 5])
    bank = criterion.memory_bank.rows.double()
    query, keys = normal(4, 5).bfloat16().requires_grad_(), normal(4, 5, seed=1).bfloat16()
    loss = criterion(query, keys)
    loss.backward()
    assert loss.dtype == criterion.memory_bank.rows.dtype == torch.float32 and query.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.double(), against_a_bank(query.double(), keys.double(), bank, 0.5), rtol=1e-6, atol=0)


def crops(count, rows, k=6, seed=0):
    return [normal(rows, k, seed=seed + i).requires_grad_() for i in range(count)]


@pytest.mark.parametrize(("high", "low", "queued"), [(2, 0, None), (2, 3, None), (1, 1, None), (3, 2, 9)])
@pytest.mark.parametrize("gather", [False, True])
def test_swav_over_lists_of_crops_is_its_pairs(high, low, queued, gather):
    highs, lows = crops(high, 7), crops(low, 7, seed=20)
    queue = None if queued is None else [x.detach() for x in crops(high, queued, seed=40)]
    options = {"temperature": 0.2, "sinkhorn_iterations": 2, "sinkhorn_epsilon": 0.5}
    criterion = SwaVLoss(**options, sinkhorn_gather_distributed=gather)
    same(criterion(highs, lows, queue), swapped(highs, lows, queue, *options.values()), [*highs, *lows])


@pytest.mark.skipif(extension.load() is None, reason="the reference may stack")
def test_swav_reads_its_crops_where_they_lie():
    highs, lows, queue = crops(2, 7), crops(3, 7, seed=20), [x.detach() for x in crops(2, 4, seed=40)]

    def copies(step):
        with torch.autograd.profiler.profile() as profile:
            step()
        return {event.name for event in profile.function_events} & {f"aten::{name}" for name in ("stack", "cat", "clone", "copy_")}

    assert not copies(lambda: torch.autograd.grad(SwaVLoss()(highs, lows, queue), [*highs, *lows]))
    assert "aten::stack" in copies(lambda: torch.stack(highs))


def test_swavs_defaults_are_lightlys():
    highs, lows = crops(2, 5), crops(1, 5, seed=20)
    expected = swapped(highs, lows, None, 0.1, 3, 0.05)
    same(SwaVLoss()(highs, lows), expected, [*highs, *lows])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: NTXentLoss(1e-9), ValueError, "temperature must be at least 1e-08 away from 0; got 1e-09"),
        (lambda: NTXentLoss(-1e-9), ValueError, "temperature must be at least 1e-08 away from 0; got -1e-09"),
        (lambda: NTXentLoss(memory_bank_size=64), ValueError, r"memory_bank_size must be 0 or \(rows, width of the embeddings\); got 64"),
        (lambda: NTXentLoss(memory_bank_size=(3, 4, 5)), ValueError, r"memory_bank_size must be 0 or .*; got \(3, 4, 5\)"),
        (lambda: NTXentLoss(memory_bank_size=(-3, 4)), ValueError, "Queue: length must be >= 1; got -3"),
        (lambda: NTXentLoss(memory_bank_size=(4, 3))(*crops(2, 2, 3)), ValueError, "out1 must not require a gradient"),
        (lambda: SwaVLoss()([], []), ValueError, r"scores must hold at least one tensor \[B, K\]; got none"),
        (lambda: SwaVLoss()(crops(2, 3), crops(1, 4)), ValueError, r"scores\[2\] must be \[B, K\] of scores\[0\] = \[3, 6\]; got \[4, 6\]"),
        (lambda: SwaVLoss()(crops(2, 3), [torch.ones(3, 6)]), TypeError, r"scores\[2\] must have the dtype of scores\[0\]"),
    ],
)
def test_the_losses_refuse(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_one_crop_and_no_assigned_crop_are_refused():
    with pytest.raises(ValueError, match="V >= 2 crops"):
        SwaVLoss()(crops(1, 3), [])
    with pytest.raises(ValueError, match="assign must hold distinct crops"):
        SwaVLoss()([], crops(2, 3))


COUNTS, QUEUED, BANK = (5, 3), (2, 4), 12


def of_rank(rank, counts, *shape, seed):
    """This rank's rows of a problem that all ranks know."""
    return normal(sum(counts), *shape, seed=seed).split(counts)[rank].clone()


def losses_of_rank(rank):
    """{name: (loss, gradients)} of this rank with different and uneven rows, and the bank after two steps."""
    found = {}

    def keep(name, loss, *leaves):
        found[name] = (loss.detach(), torch.autograd.grad(loss, leaves))

    out0, out1 = (of_rank(rank, COUNTS, 6, seed=seed).requires_grad_() for seed in (1, 2))
    keep("pairs", NTXentLoss(0.3, gather_distributed=True)(out0, out1), out0, out1)
    keep("pairs alone", NTXentLoss(0.3)(out0, out1), out0, out1)
    for name, gather in (("bank", True), ("bank alone", False)):
        torch.manual_seed(7)
        criterion = NTXentLoss(0.3, (BANK, 6), gather_distributed=gather).double()
        for step in range(2):
            query, keys = (of_rank(rank, COUNTS, 6, seed=10 * step + seed) for seed in (3, 4))
            query.requires_grad_()
            keep(f"{name} {step}", criterion(query, keys), query)
        found[f"{name} rows"] = criterion.memory_bank.rows
    high, low = ([of_rank(rank, COUNTS, 5, seed=seed).requires_grad_() for seed in seeds] for seeds in ((30, 31), (32,)))
    queue = [of_rank(rank, QUEUED, 5, seed=seed) for seed in (40, 41)]
    keep("swav", SwaVLoss(sinkhorn_epsilon=0.4, sinkhorn_gather_distributed=True)(high, low, queue), *high, *low)
    keep("swav alone", SwaVLoss(sinkhorn_epsilon=0.4)(high, low, queue), *high, *low)
    assert dist.is_initialized()
    return found


def test_to_gather_means_all_ranks_and_not_to_gather_this_one():
    """mean_r L_r is the loss of one process on all rows; gradients averaged over ranks are its gradient; alone, each rank is its own."""
    ranks = on_ranks(2, losses_of_rank)

    def together(name, expected, *leaves):
        losses, gradients = zip(*(found[name] for found in ranks), strict=True)
        torch.testing.assert_close(sum(losses) / 2, expected.detach(), rtol=1e-10, atol=0)
        for ours, theirs in zip(zip(*gradients, strict=True), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(torch.cat(ours) / 2, theirs, rtol=0, atol=1e-9 * theirs.abs().max().item())

    def alone(name, expected_of, *every):
        for rank, found in enumerate(ranks):
            leaves = [x.split(COUNTS)[rank].detach().requires_grad_() for x in every]
            expected = expected_of(rank, *leaves)
            torch.testing.assert_close(found[name][0], expected.detach(), rtol=1e-10, atol=0)
            for ours, theirs in zip(found[name][1], torch.autograd.grad(expected, leaves), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * theirs.abs().max().item())

    def every(*shape, seed):
        return normal(sum(COUNTS), *shape, seed=seed).requires_grad_()

    out0, out1 = (every(6, seed=seed) for seed in (1, 2))
    together("pairs", contrastive(out0, out1, 0.3), out0, out1)
    alone("pairs alone", lambda rank, a, b: contrastive(a, b, 0.3), out0, out1)
    torch.manual_seed(7)
    bank = Queue(BANK, 6).double()
    banks = [copy.deepcopy(bank) for _ in ranks]
    for step in range(2):
        query, keys = (every(6, seed=10 * step + seed) for seed in (3, 4))
        shares = F.normalize(keys.detach(), dim=1).split(COUNTS)
        together(f"bank {step}", against_a_bank(query, keys.detach(), bank.rows.clone(), 0.3), query)
        given = [own.rows.clone() for own in banks]
        alone(f"bank alone {step}", lambda rank, q, k=shares, rows=given: against_a_bank(q, k[rank], rows[rank], 0.3), query)
        bank.push(torch.cat(shares))
        for own, share in zip(banks, shares, strict=True):
            own.push(share)
    for found, own in zip(ranks, banks, strict=True):
        torch.testing.assert_close(found["bank rows"], bank.rows, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found["bank alone rows"], own.rows, rtol=1e-12, atol=1e-12)
    check_swav(together, alone, every)


def check_swav(together, alone, every):
    leaves = [every(5, seed=seed) for seed in (30, 31, 32)]
    queue = [normal(sum(QUEUED), 5, seed=seed) for seed in (40, 41)]
    together("swav", swapped(leaves[:2], leaves[2:], queue, 0.1, 3, 0.4), *leaves)

    def of_this_rank(rank, first, second, third):
        return swapped([first, second], [third], [x.split(QUEUED)[rank] for x in queue], 0.1, 3, 0.4)

    alone("swav alone", of_this_rank, *leaves)
