"""Does BatchNorm equal torch's alone, the union batch over a group, and fp64 truth in every precision?"""

import copy
import functools
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from fuseer.engine.models.heads import ProjectionHead
from fuseer.engine.models.norm import BatchNorm, SplitBatchNorm, calibrate, recomputation, replace_batch_norm
from fuseer.engine.models.regnet import build_regnet

C = 6
SHAPES = {"images": (4, 3), "rows": ()}
OFFSETS = {"zero_mean": 0.0, "mean_100_std": 100.0}
ROWS = {2: (5, 2), 4: (4, 0, 7, 1)}
RESULTS = ("out", "dx", "dweight", "dbias", "running_mean", "running_var")
TINY = {"depths": [1, 1], "widths": [8, 16], "group_widths": 8, "stem_width": 8, "stem_stride": 1, "activation": nn.SiLU}


def union(shape, offset):
    """x, upstream gradient, weight, bias of the union batch in fp64, the same in every process."""
    generator = torch.Generator().manual_seed(7)
    size = (sum(ROWS[2]) * 8, C, *SHAPES[shape])
    x = torch.randn(size, generator=generator, dtype=torch.float64) + OFFSETS[offset]
    # rounded once, so that every precision is asked about the same numbers
    x = x.bfloat16().double() if offset == "zero_mean" else x.float().double()
    dout = torch.randn(size, generator=generator, dtype=torch.float64).bfloat16().double()
    affine = (torch.randn(2, C, generator=generator, dtype=torch.float64) + 2).bfloat16().double()
    return x, dout, *affine


def own_rows(world, rank, total):
    """Slice of the union that is this rank's: uneven, and empty for one rank of four."""
    counts = [rows * total // sum(ROWS[world]) for rows in ROWS[world]]
    counts[0] += total - sum(counts)
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def backward_through(norm, x, dout):
    x = x.clone().requires_grad_()
    out = norm(x)
    out.backward(dout)
    values = (out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var)
    return dict(zip(RESULTS, values, strict=True))


def torch_norm(shape, dtype, weight, bias):
    norm = (nn.BatchNorm2d if shape == "images" else nn.BatchNorm1d)(C).to(dtype)
    norm.weight.data.copy_(weight)
    norm.bias.data.copy_(bias)
    return norm


def group_norm(group, dtype, weight, bias):
    norm = BatchNorm(C, group=group).to(dtype)
    norm.weight.data.copy_(weight)
    norm.bias.data.copy_(bias)
    return norm


def networks(group):
    torch.manual_seed(3)
    trunk = build_regnet("anynet", group=group, **TINY)
    head = ProjectionHead([16, 12, 4], bias=False, activation=nn.SiLU, group=group)
    return nn.Sequential(trunk, head).double()


def images_of_union():
    return torch.randn(14, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def network_result(net, images, total):
    net(images).square().mul(torch.arange(4.0)).sum().div(total).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def rank_main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world, timeout=timedelta(seconds=90))
    group, results = dist.group.WORLD, {}
    for shape in SHAPES:
        for offset in OFFSETS:
            x, dout, weight, bias = union(shape, offset)
            rows = own_rows(world, rank, len(x))
            for dtype in (torch.float64, torch.float32, torch.bfloat16):
                norm = group_norm(group, torch.promote_types(dtype, torch.float32), weight, bias)
                result = backward_through(norm, x[rows].to(dtype), dout[rows].to(dtype))
                results[shape, offset, str(dtype)] = {"tracked": norm.num_batches_tracked, **result}
    net = networks(group)
    images = images_of_union()
    rows = own_rows(world, rank, len(images))
    results["network"] = network_result(net, images[rows], len(images))
    rows = (own_rows(world, rank, 6), slice(6, 14) if rank == 0 else slice(14, 14))
    calibrated = calibrate(copy.deepcopy(net), [images[r] for r in rows])
    results["calibrated"] = {key: value for key, value in calibrated.state_dict().items() if "running" in key}
    results["recomputed"] = [twice_through(group, own_rows(world, rank, len(images)), depth) for depth in (0, 1, 2)]
    results["pairs"] = in_pairs(rank, world, dist.new_group)
    results["gradcheck"] = gradcheck_alone(rank, world)
    if rank == 0:
        # no other rank joins: a collective in evaluation mode would run into the timeout
        results["eval"] = net.eval()(images[:2]).detach()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def twice_through(group, rows, depth):
    """What one graph with two forwards, of images and of their quarters, leaves after two backwards, and its collectives; in fp32.

    At `depth` 1 a forward is recomputed; at 2 the network in it once more, before a sine whose input both passes of the outer call need.
    """
    net, images = networks(group).float(), images_of_union().float()[rows].requires_grad_()
    again = functools.partial(checkpoint, use_reentrant=False, context_fn=recomputation)

    def whole(x):
        return (again(net, x) if depth == 2 else net(x)).sin()

    call = functools.partial(again, whole) if depth else whole
    counted = [mock.patch.object(dist, name, wraps=getattr(dist, name)) for name in ("all_gather", "all_reduce")]
    with counted[0] as gathers, counted[1] as sums:
        outs = [call(images), call(images[:, :, :4, :4])]
        loss = sum(out.square().mul(torch.arange(4.0)).sum() for out in outs)
        loss.backward(retain_graph=True)
        loss.backward()
    found = [*(out.detach() for out in outs), images.grad, *(p.grad for p in net.parameters()), *net.buffers()]
    return {"tensors": found, "collectives": (gathers.call_count, sums.call_count)}


def in_pairs(rank, world, new_group):
    """A norm over this rank and its neighbour only."""
    groups = [new_group([first, first + 1]) for first in range(0, world, 2)]
    norm = BatchNorm(C, group=groups[rank // 2]).double()
    return norm(torch.full((2, C), float(rank), dtype=torch.float64)).detach()


def gradcheck_alone(rank, world):
    groups = [dist.new_group([member]) for member in range(world)]
    norm = BatchNorm(2, group=groups[rank]).double()
    x = torch.randn(4, 2, 3, 1, dtype=torch.float64, requires_grad=True)

    def call(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    return torch.autograd.gradcheck(call, (x, torch.tensor([0.5, 2.0]).double().requires_grad_(), torch.randn(2).double().requires_grad_()))


@pytest.fixture(scope="module", params=[2, 4], ids=["2_ranks", "4_ranks"])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"norm_{request.param}")
    mp.spawn(rank_main, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def joined(ranks, key):
    """The union's result from the ranks' own: rows concatenated, parameter gradients summed, statistics equal on all."""
    parts = [result[key] for result in ranks]
    for name in ("running_mean", "running_var", "tracked"):
        assert all(torch.equal(parts[0][name], part[name]) for part in parts), f"{name} differs between ranks"
    together = {name: torch.cat([part[name] for part in parts]) for name in ("out", "dx")}
    together |= {name: sum(part[name] for part in parts) for name in ("dweight", "dbias")}
    return together | {name: parts[0][name] for name in ("running_mean", "running_var")}


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shape", SHAPES)
class TestUnion:
    def test_fp64_is_the_union_batch(self, ranks, shape, offset):
        x, dout, weight, bias = union(shape, offset)
        truth = backward_through(torch_norm(shape, torch.float64, weight, bias), x, dout)
        ours = joined(ranks, (shape, offset, "torch.float64"))
        for name in RESULTS:
            assert (ours[name] - truth[name]).abs().max() <= 1e-12 * truth[name].abs().max(), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_lower_precision_errs_no_more_than_torch(self, ranks, shape, offset, dtype):
        x, dout, weight, bias = union(shape, offset)
        x = x.to(dtype)
        truth = backward_through(torch_norm(shape, torch.float64, weight, bias), x.double(), dout)
        eager = backward_through(torch_norm(shape, torch.float32, weight, bias), x, dout.to(dtype))
        ours = joined(ranks, (shape, offset, str(dtype)))
        for name in RESULTS:
            assert ours[name].dtype == eager[name].dtype, name
            rounding = torch.finfo(eager[name].dtype).eps * 4 * truth[name].abs().max()
            for measure in (lambda t: t.abs().max(), lambda t: t.square().mean().sqrt()):
                error, bound = measure(ours[name] - truth[name]), 2 * measure(eager[name] - truth[name]) + rounding
                assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_mean_costs_no_accuracy(ranks, shape):
    """The mean is kept in two parts: rounded to fp32 once, at 100 std, it alone would put dweight off by some 3e-6."""
    x, dout, weight, bias = union(shape, "mean_100_std")
    truth = backward_through(torch_norm(shape, torch.float64, weight, bias), x, dout)["dweight"]
    error = joined(ranks, (shape, "mean_100_std", "torch.float32"))["dweight"] - truth
    assert error.abs().max() <= 4 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_network_over_a_group_has_the_gradient_of_the_union(ranks):
    images = images_of_union()
    truth = network_result(networks(None), images, len(images))
    ours = sum(result["network"] for result in ranks)
    assert (ours - truth).abs().max() <= 1e-9 * truth.abs().max()


def test_calibrate_over_a_group_counts_its_rows(ranks):
    net, images = networks(None), images_of_union()
    truth = calibrate(net, [images[:6], images[6:]]).state_dict()
    for result in ranks:
        for key, value in result["calibrated"].items():
            assert (value - truth[key]).abs().max() <= 1e-12 * truth[key].abs().max(), key


def test_recomputation_moves_no_statistic_no_bit_and_joins_no_collective(ranks):
    """With unequal rows and none; two sizes of crop, which backward meets in the reverse order; calls inside calls."""
    for result in ranks:
        kept, *again = result["recomputed"]
        for other in again:
            assert len(kept["tensors"]) == len(other["tensors"]) and all(map(torch.equal, kept["tensors"], other["tensors"]))
            assert kept["collectives"] == other["collectives"] == (2 * 10, 2 * 2 * 10), "10 norms met twice, backward twice over"


def test_group_is_only_the_group(ranks):
    for rank, result in enumerate(ranks):
        # two ranks hold 2 rows each of r and r + 1: normalised they are -1 and +1
        expected = torch.full((2, C), 1.0 if rank % 2 else -1.0, dtype=torch.float64)
        torch.testing.assert_close(result["pairs"], expected, rtol=0, atol=1e-4)


def test_gradcheck_of_the_group_function(ranks):
    assert all(result["gradcheck"] for result in ranks)


def test_evaluation_needs_no_other_rank(ranks):
    assert ranks[0]["eval"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_alone_is_bitwise_torch(dtype, layout):
    x, dout, weight, bias = union("images", "zero_mean")
    x, dout = x.to(dtype, memory_format=layout), dout.to(dtype, memory_format=layout)
    stored = torch.promote_types(dtype, torch.float32)
    ours, theirs = group_norm(None, stored, weight, bias), torch_norm("images", stored, weight, bias)
    mine, truth = backward_through(ours, x, dout), backward_through(theirs, x, dout)
    for name in RESULTS:
        assert torch.equal(mine[name], truth[name]), name
    assert mine["out"].dtype == dtype and mine["out"].is_contiguous(memory_format=layout)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 1
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_bf16_cast_keeps_statistics_and_arithmetic_in_fp32():
    x, dout, weight, bias = union("images", "zero_mean")
    ours = group_norm(None, torch.float32, weight, bias).bfloat16()
    assert ours.weight.dtype == torch.bfloat16
    assert ours.running_mean.dtype == ours.running_var.dtype == torch.float32
    mine = backward_through(ours, x.bfloat16(), dout.bfloat16())
    truth = backward_through(torch_norm("images", torch.float32, weight, bias), x.bfloat16(), dout.bfloat16())
    assert torch.equal(mine["out"], truth["out"]) and torch.equal(mine["running_var"], truth["running_var"])
    assert torch.equal(mine["dweight"], truth["dweight"].bfloat16())
    ours.running_mean.fill_(1 + 2**-20)
    assert ours.bfloat16().running_mean[0] == 1 + 2**-20


def test_under_autocast_the_output_has_the_dtype_of_the_input():
    norm = BatchNorm(C)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(torch.randn(3, C, 4, 4, dtype=dtype)).dtype == dtype


def test_without_affine_and_with_no_rows():
    norm = BatchNorm(C, affine=False)
    x = torch.randn(5, C)
    torch.testing.assert_close(norm(x), nn.functional.batch_norm(x, None, None, training=True))
    empty = torch.zeros(0, C, 3, 3, requires_grad=True)
    norm.eval()(empty).sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(4, C + 1), ValueError, r"\[4, 7\]"),
        (torch.zeros(C), ValueError, r"got \[6\]"),
        (torch.zeros(1, C), ValueError, "at least 2 values"),
        (torch.zeros(0, C, 3, 3), ValueError, "at least 2 values"),
        (torch.zeros(4, C, dtype=torch.float64), TypeError, "float64"),
        (torch.zeros(4, C, dtype=torch.long), TypeError, "int64"),
    ],
)
def test_refuses_in_words(x, error, words):
    with pytest.raises(error, match=words):
        BatchNorm(C)(x)


def test_replace_keeps_weights_keys_activation_and_result():
    # here and not above: every spawned rank would pay for the import
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("regnety_002", num_classes=0)
    theirs.s1.b1.conv1.bn = theirs.s1.b1.conv1.bn.bfloat16()
    theirs.s1.b1.conv1.bn.weight.data = theirs.s1.b1.conv1.bn.weight.data.float()
    theirs.s1.b1.conv1.bn.bias.data = theirs.s1.b1.conv1.bn.bias.data.float()
    ours = replace_batch_norm(copy.deepcopy(theirs))
    assert sum(isinstance(module, BatchNorm) for module in ours.modules()) == 44
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in ours.modules())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert ours.s1.b1.conv1.bn.running_mean.dtype == torch.float32
    theirs.float()
    x = torch.randn(3, 3, 32, 32)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_replace_converts_plain_and_sync_norms_in_place():
    net = nn.Sequential(nn.BatchNorm1d(4, eps=1e-3, momentum=0.3), nn.SyncBatchNorm(4, affine=False).eval())
    weight = net[0].weight
    assert replace_batch_norm(net) is net
    assert type(net[0]) is type(net[1]) is BatchNorm
    assert net[0].weight is weight and net[0].eps == 1e-3 and net[0].momentum == 0.3
    assert net[1].weight is None and not net[1].training
    assert type(replace_batch_norm(nn.BatchNorm2d(3))) is BatchNorm


def test_replace_refuses_what_it_would_change():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="inner.norm is a Scaled"):
        replace_batch_norm(nn.ModuleDict({"inner": nn.ModuleDict({"norm": Scaled(3)})}))
    with pytest.raises(ValueError, match="track_running_stats=False"):
        replace_batch_norm(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))


@pytest.mark.parametrize("channels_last", [False, True])
def test_slices_are_normalised_as_processes_alone_would(channels_last):
    x, dout, weight, bias = union("images", "zero_mean")
    x, dout = x[:54], dout[:54]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    split = SplitBatchNorm(C, splits=3, momentum=0.3).double()
    split.weight.data.copy_(weight)
    split.bias.data.copy_(bias)
    found = backward_through(split, x, dout)
    alone = []
    for part, upstream in zip(x.chunk(3), dout.chunk(3), strict=True):
        norm = torch_norm("images", torch.float64, weight, bias)
        norm.momentum = 0.3
        alone.append(backward_through(norm, part, upstream))
    for name in ("out", "dx"):
        torch.testing.assert_close(found[name], torch.cat([result[name] for result in alone]), rtol=1e-12, atol=1e-12)
    for name in ("dweight", "dbias"):
        torch.testing.assert_close(found[name], sum(result[name] for result in alone), rtol=1e-12, atol=1e-12)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(found[name], sum(result[name] for result in alone) / 3, rtol=1e-12, atol=1e-14)
    assert split.num_batches_tracked == 1
    whole = torch_norm("images", torch.float64, weight, bias)
    assert (found["out"] - whole(x)).abs().max() > 1e-3, "slices differ from the whole batch"
    whole.load_state_dict(split.state_dict())
    torch.testing.assert_close(split.eval()(x[:7]), whole.eval()(x[:7]), rtol=1e-12, atol=1e-12)


def test_slices_replace_every_kind_of_norm():
    import timm

    torch.manual_seed(0)
    for net in (build_regnet("anynet", **TINY), timm.create_model("regnety_002", num_classes=0)):
        keys = list(net.state_dict())
        x = torch.randn(8, 3, 32, 32)
        truth = torch.cat([copy.deepcopy(net)(part) for part in x.chunk(4)])
        assert replace_batch_norm(net, splits=4) is net and list(net.state_dict()) == keys
        norms = [module for module in net.modules() if isinstance(module, BatchNorm)]
        assert norms and all(isinstance(norm, SplitBatchNorm) and norm.splits == 4 for norm in norms)
        torch.testing.assert_close(net(x), truth, rtol=1e-3, atol=1e-4)
        twin = copy.deepcopy(net)
        assert all(norm.splits == 4 for norm in twin.modules() if isinstance(norm, BatchNorm))
        replace_batch_norm(net)
        assert not any(isinstance(module, SplitBatchNorm) for module in net.modules())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SplitBatchNorm(C, splits=4)(torch.zeros(10, C)), r"4 equal slices .* got \[10, 6\]"),
        (lambda: SplitBatchNorm(C, splits=4)(torch.zeros(4, C)), r"at least 2 values per channel; got \[4, 6\]"),
        (lambda: SplitBatchNorm(C, splits=0), "splits=0"),
    ],
)
def test_slices_refuse_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_calibrate_averages_over_rows_and_restores():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, C), BatchNorm(C, momentum=0.3), nn.Dropout(0.5)).double()
    net[1].eval()
    net[1].running_mean.fill_(float("nan"))
    weight = net[0].weight.clone()
    batches = [torch.randn(n, 5, dtype=torch.float64) for n in (8, 8, 3)]
    assert calibrate(net, batches) is net
    hidden = [net[0](batch) for batch in batches]
    torch.testing.assert_close(net[1].running_mean, torch.cat(hidden).mean(0), rtol=1e-12, atol=1e-14)
    variance = sum(len(h) * h.var(0) for h in hidden) / 19
    torch.testing.assert_close(net[1].running_var, variance, rtol=1e-12, atol=0)
    assert net.training and net[2].training and not net[1].training and net[1].momentum == 0.3
    assert torch.equal(weight, net[0].weight) and net[0].weight.grad is None
    kept = net[1].running_var.clone()
    with pytest.raises(ValueError, match="no image"):
        calibrate(net, [])
    assert torch.equal(kept, net[1].running_var)
