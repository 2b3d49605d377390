"""Do the compiled Triton kernels stay within their budgets, and would the measurement notice if they did not?"""

import json
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import launches, machine_code, static_gpu, traffic


@dataclass(frozen=True)
class Budget:
    """The most registers of any variant; the least share of bytes loaded, and stored, 128 bits at once where the rows allow it.

    products: whether it multiplies matrices, which is for tensor cores.
    """

    registers: int
    loads: float
    stores: float = 0.0
    products: bool = False
    # more than none only where a card has been found faster with them than without, docs/gpu.md
    spills: int = 0


POTENTIALS = {
    "_first_partials": Budget(80, loads=1.0),
    "_merge_first": Budget(72, loads=1.0),
    # 512 threads of 128 registers are all that a multiprocessor has
    "_resident_partials": Budget(128, loads=1.0, stores=1.0),
    "_merge_sums": Budget(48, loads=0.8),
}
CONTRAST = {
    "_inverse_norms": Budget(64, loads=1.0),
    "_total": Budget(40, loads=0.95),
    # sums, and operands of float32 in three parts, take all registers there are; in the code, as many loads are of statistics, which
    # are one or two numbers a column, as are of rows, which are 128 bits wide and many times that
    "_sweep": Budget(255, loads=0.45, stores=0.95, products=True, spills=33),
    "_strip_sums": Budget(80, loads=0.95),
}
BUDGETS = {
    "info_nce": {**CONTRAST, "_finish": Budget(64, loads=0.35)},
    "nt_xent": {
        **CONTRAST,
        "_sweep": Budget(184, loads=0.6, products=True),
        "_triangle": Budget(255, loads=0.2, products=True),
        "_outcomes": Budget(96, loads=0.75),
        "_row_gradient": Budget(255, loads=0.17, stores=1.0, products=True, spills=33),
        "_merge_gradient": Budget(64, loads=0.6, stores=1.0),
        "_strip_weights": Budget(176, loads=0.55, stores=1.0),
    },
    # all loads and stores of full blocks; in the code stand as many for the ends of tensors, one number each, and those of the table
    "ema_update_": {"_update": Budget(48, loads=0.2, stores=0.5)},
    "lars_update_": {"_partial_sums": Budget(72, loads=0.2), "_update": Budget(48, loads=0.13, stores=0.5)},
    # what is narrow are the ids, one number a row; the gradient's code has them twice, once for what repeats
    "gather_tokens": {"_gather": Budget(48, loads=0.66, stores=1.0), "_sum_places": Budget(80, loads=0.8, stores=1.0)},
    # pixels come from three planes one by one, in the order of the predictions, which come and go wide; ids and statistics are single
    # 32 registers at production shapes; patches of few numbers put a thousand rows into a program
    "masked_patch_mse": {"_losses": Budget(128, loads=0.35), "_gradient": Budget(128, loads=0.2, stores=1.0)},
    # pixels of three planes go next to each other, one by one
    "gather_patches": {"_gather": Budget(40, loads=0.0), "_scatter": Budget(48, loads=0.0)},
    # bytes are read four and eight at once, ids and what normalises one by one
    "patch_embed_visible": {
        "_embed": Budget(255, loads=0.6, stores=1.0, products=True),
        "_weight_sums": Budget(255, loads=0.4, stores=0.95, products=True),
        "_merge": Budget(40, loads=1.0, stores=1.0),
        "_position_sums": Budget(64, loads=0.2, stores=1.0),
    },
    # numbers are compared where they are, one a lane, and what is stored goes where its rank says
    "patch_mask": {"_ranks": Budget(72, loads=0.0)},
    "sinkhorn": {
        **POTENTIALS,
        "_row_statistics": Budget(72, loads=1.0),
        "_merge_statistics": Budget(40, loads=0.0),
        "_streamed_partials": Budget(80, loads=0.75, stores=1.0),
        "_streamed_codes": Budget(64, loads=0.75, stores=1.0),
        "_resident_codes": Budget(128, loads=1.0, stores=1.0),
    },
    "soft_xent": {
        "_sweep": Budget(104, loads=1.0),
        "_gradient": Budget(72, loads=0.85, stores=1.0),
    },
    "unshuffle_tokens": {
        "_unshuffle": Budget(72, loads=0.75, stores=1.0),
        "_scatter": Budget(112, loads=0.66, stores=1.0),
        "_sum_parts": Budget(48, loads=1.0),
    },
    "swapped_prediction": {
        **POTENTIALS,
        "_sweep": Budget(136, loads=0.66),
        "_merge_splits": Budget(64, loads=0.0),
        "_total": Budget(40, loads=0.95),
        # two numbers of every crop and target stand beside 32 scores a thread
        "_gradient": Budget(80, loads=0.36, stores=1.0),
    },
}

# forward, backward, and what is left to torch: filling a scalar, two views in one tensor, the products of strips, each gradient times
# dloss (the raw ops make it in the forward) and, where rows are half, made half again; a sinkhorn step is two launches, the codes one
LAUNCHES = {
    "info_nce": {
        **dict.fromkeys(("moco_256", "moco_256_bf16", "moco_v3_1024", "cold_256", "half_256"), (4, 0, 1)),
        "strips_256": (5, 0, 4),
    },
    "nt_xent": {
        **dict.fromkeys(("simclr_1024", "simclr_8192", "simclr_8192_bf16", "simclr_32768"), (6, 0, 3)),
        **dict.fromkeys(("cold_8192", "half_8192", "wide_8192"), (6, 0, 3)),
        "strips_8192": (12, 0, 19),
    },
    "ema_update_": dict.fromkeys(("resnet50", "resnet50_shadow", "vit_b"), (1, 0, 0)),
    "lars_update_": dict.fromkeys(("resnet50", "vit_b"), (2, 0, 0)),
    "sinkhorn": {
        **dict.fromkeys(("swav_64", "swav_512", "swav_4096", "demo_128"), (7, 0, 0)),
        **dict.fromkeys(("seer_512", "seer_1024"), (21, 0, 0)),
        **dict.fromkeys(("dino_64", "ibot_4096"), (7, 0, 0)),
        "wide_64": (13, 0, 0),
    },
    "gather_tokens": dict.fromkeys(("vit_b_256", "vit_b_256_bf16"), (1, 1, 0)),
    "gather_patches": dict.fromkeys(("mae_64", "mae_64_bf16", "channels_last_64", "huge_64"), (1, 1, 0)),
    # torch casts the mean and the deviation of bytes
    "patch_embed_visible": {**dict.fromkeys(("vit_b_64", "vit_b_64_bf16", "vit_h_64_bf16"), (1, 3, 0)), "bytes_64_bf16": (1, 3, 2)},
    # torch takes the mean of the losses
    "masked_patch_mse": dict.fromkeys(("mae_64", "masked_64", "huge_32"), (1, 1, 1)),
    "patch_mask": dict.fromkeys(("mae_256", "mae_4096", "many_patches"), (1, 0, 0)),
    "soft_xent": dict.fromkeys(("swav_64", "dino_640"), (1, 1, 0)),
    # the sums of a run of images at some positions are merged, those of masked places and those of all
    "unshuffle_tokens": dict.fromkeys(("mae_64", "mae_256", "mae_256_bf16"), (1, 3, 0)),
    "swapped_prediction": {
        **dict.fromkeys(("swav_64", "swav_64_queue", "swav_256", "demo_128"), (8, 1, 1)),
        "seer_64": (9, 1, 1),
        "listed_64": (8, 1, 1),
    },
}
HALVED = {"info_nce": 1, "nt_xent": 2}
# rows of 131,072 stay in registers only where clusters exist; elsewhere a launch finds their normalisers, another one merges spans
WITHOUT_CLUSTERS = {("sinkhorn", "dino_64", 80): (13, 0, 0), ("sinkhorn", "ibot_4096", 80): (10, 0, 0)}


@pytest.fixture(scope="module")
def calls():
    """Every production call as the host code makes it now."""
    return static_gpu.calls(static_gpu.ops(), static_gpu.ARCHES)


@pytest.fixture(scope="module")
def written():
    """results/static_gpu.json; after a change of a kernel or of its host code: python benchmarks/static_gpu.py."""
    return json.loads(static_gpu.RESULT.read_text(encoding="utf-8"))


def over(row, budget):
    """What is wrong with a compiled kernel; empty where it keeps its budget."""
    found = [f"{name} {row[name]}" for name in ("spills", "stack") if row["spills"] > budget.spills or row[name] and not budget.spills]
    if row["registers"] > budget.registers:
        found.append(f"registers {row['registers']} > {budget.registers}")
    if not row["occupancy"]:
        found.append(f"does not fit on a multiprocessor: {row['shared']} bytes shared")
    if budget.products and not row["tensor_core"]:
        found.append("no tensor-core instructions")
    for name, least in (("loads", budget.loads), ("stores", budget.stores)):
        share = machine_code.wide(row[name])
        if row["aligned"] and share is not None and share < least:
            found.append(f"128-bit {name} {share:.2f} < {least}")
    return found


def named(row):
    return f"{row['op']} {row['kernel']} sm_{row['arch']} {row['cases']} {row['constants']}"


def test_written_result_is_of_these_kernels(calls, written):
    assert written["sources"] == {op: static_gpu.source(op) for op in static_gpu.ops()}
    assert written["calls"] == static_gpu.call_rows(calls)
    if written["triton"] == triton.__version__:
        rows, _ = static_gpu.kernel_rows(calls)
        facts = rows[next(iter(rows))].keys()
        assert [{name: row[name] for name in facts} for row in written["kernels"]] == list(rows.values())


def test_page_shows_the_written_result(written):
    text = static_gpu.PAGE.read_text(encoding="utf-8")
    assert static_gpu.page(text, written) == text


def test_every_kernel_keeps_its_budget(written):
    broken = []
    for row in written["kernels"]:
        budget = BUDGETS.get(row["op"], {}).get(row["kernel"])
        broken += [f"{named(row)}: {what}" for what in (["has no budget"] if budget is None else over(row, budget))]
    assert not broken, "\n".join(broken)


def test_every_budget_has_a_kernel(written):
    kernels = {(row["op"], row["kernel"]) for row in written["kernels"]}
    assert {(op, kernel) for op, budgets in BUDGETS.items() for kernel in budgets} == kernels


def test_the_hungriest_variants_compile_as_written(calls, written):
    """Of every kernel, on every architecture, the variant with most registers, compiled here."""
    rows, of_key = static_gpu.kernel_rows(calls)
    hungriest = {}
    for row in sorted(written["kernels"], key=lambda row: row["registers"]):
        hungriest[row["op"], row["kernel"], row["arch"]] = row
    assert {row["key"] for row in hungriest.values()} <= of_key.keys(), "the result is of other kernels: python benchmarks/static_gpu.py"
    facts = json.loads(json.dumps(launches.compiled({row["key"]: of_key[row["key"]] for row in hungriest.values()})))
    for row in hungriest.values():
        found = facts[row["key"]]
        assert not over(row | found, BUDGETS[row["op"]][row["kernel"]]), named(row)
        if written["triton"] == triton.__version__:
            assert {name: row[name] for name in found} == found, named(row)


def test_calls_launch_what_is_planned(written):
    for row in written["calls"]:
        forward, backward, torch_ops = WITHOUT_CLUSTERS.get((row["op"], row["case"], row["arch"])) or LAUNCHES[row["op"]][row["case"]]
        torch_ops += HALVED.get(row["op"], 0) if row["dtype"] != "float32" else 0
        assert (*row["launches"], row["torch_ops"]) == (forward, backward, torch_ops), row


def test_bytes_and_launches_beat_eager(written):
    """Ours cannot move less than the floor, and would have no reason to be if it moved as much as eager."""
    for row in written["calls"]:
        assert row["floor_bytes"] <= row["moved_bytes"] < row["eager_bytes"], row
        assert sum(row["launches"]) + row["torch_ops"] < row["eager_ops"], row


@triton.jit
def row_sum(x_ptr, y_ptr, N, stride, K, BLOCK: tl.constexpr):
    k = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        x = tl.load(x_ptr + n * stride + k, mask=k < K, other=0.0).to(tl.float32)
        total += tl.exp2(x) / tl.sum(x, 0)
    tl.store(y_ptr + tl.program_id(0) * stride + k, total, mask=k < K)


@triton.jit
def product(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x, y = tl.load(x_ptr + i * BLOCK + j), tl.load(y_ptr + i * BLOCK + j)
    tl.store(z_ptr + i * BLOCK + j, tl.dot(x, y))


def facts(arch, kernel, *args, **options):
    with launches.recorded(arch) as found:
        kernel[(4,)](*args, **options)
    (made,) = found
    (compiled,) = launches.compiled({made.key: made}).values()
    return json.loads(json.dumps({**compiled, "aligned": True}))


def rows(K, dtype=torch.bfloat16):
    x = torch.empty(8, K, dtype=dtype, device="meta")
    return x, torch.empty(8, K, device="meta"), 8, x.stride(0), K


@pytest.mark.parametrize("arch", static_gpu.ARCHES)
def test_an_enormous_block_breaks_the_budget(arch):
    good = facts(arch, row_sum, *rows(1024), BLOCK=1024, num_warps=4)
    bad = facts(arch, row_sum, *rows(16384), BLOCK=16384, num_warps=4)
    budget = Budget(good["registers"], loads=1.0, stores=1.0)
    assert not over(good, budget)
    assert {what.split()[0] for what in over(bad, budget)} >= {"spills", "stack", "registers"}


def test_narrow_loads_break_the_budget():
    row = facts(90, row_sum, *rows(4099), BLOCK=8192, num_warps=8)
    assert row["loads"].keys() == {"16"} and row["stores"].keys() == {"32"}
    assert {what.split()[1] for what in over(row, Budget(255, loads=0.5, stores=0.5))} == {"loads", "stores"}
    assert not over({**row, "aligned": False}, Budget(255, loads=0.5, stores=0.5))


@pytest.mark.parametrize("arch", static_gpu.ARCHES)
def test_tensor_cores_are_seen(arch):
    x = torch.empty(64, 64, dtype=torch.float16, device="meta")
    assert facts(arch, product, x, x, torch.empty(64, 64, device="meta"), BLOCK=64)["tensor_core"] > 0
    without = facts(arch, row_sum, *rows(1024), BLOCK=1024)
    assert without["tensor_core"] == 0
    assert over(without, Budget(255, loads=0.0, products=True)) == ["no tensor-core instructions"]


def test_launches_are_specialised_as_on_a_gpu():
    """Divisibility by 16 of integers and addresses, 1 as a constant, options apart from arguments; the grid's product."""
    x, y, *_ = rows(4096)
    with launches.recorded(90) as found:
        row_sum[lambda given: (given["N"], 3)](x, y, 8, 4096, 4096, BLOCK=4096, num_warps=8)
        row_sum[(2,)](x[:, 1:], y, 8, 1, 4100, BLOCK=8192)
    first, second = found
    assert (first.programs, second.programs) == (24, 2)
    assert (first.options, second.options) == ({"num_warps": 8}, {})
    assert {place for place, given in first.attributes.items() if given} == {(0,), (1,), (3,), (4,)}
    assert {place for place, given in second.attributes.items() if given} == {(1,)}
    assert second.constants == {(3,): 1, (5,): 8192} and first.constants == {(5,): 4096}
    assert sum(first.given.values()) == 8 * 4096 * (2 + 4)


def test_occupancy_is_the_tightest_limit():
    def share(arch, registers, threads, shared=0):
        return machine_code.occupancy(machine_code.ARCHES[arch], {"registers": registers, "threads": threads, "shared": shared})

    assert share(90, 32, 256) == 1.0
    assert share(90, 128, 256) == 0.25
    # warps come in fours, one for each quarter of a multiprocessor: 23 would fit
    assert share(90, 88, 32) == 20 / 64
    assert share(90, 255, 1024) == 0.0
    assert share(90, 32, 32) == 0.5
    assert share(90, 32, 256, 100 << 10) == 2 * 8 / 64 and share(80, 32, 256, 100 << 10) == 8 / 64
    assert share(80, 32, 256, 164 << 10) == 0.0


def test_eager_counts_work_and_not_views():
    x = torch.empty(3, 5, device="meta")
    with traffic.Eager() as counted:
        x.t()[1:].add(1)
        x.mul_(x.sum(0))
        torch.zeros_like(x).expand(2, 3, 5).contiguous()
    added, summed, multiplied, zeros, repeated = 2 * 12, 15 + 5, 15 + 5 + 15, 15, 15 + 30
    assert (counted.ops, counted.bytes) == (5, 4 * (added + summed + multiplied + zeros + repeated))
