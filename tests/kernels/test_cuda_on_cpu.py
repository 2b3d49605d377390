"""Do the CUDA kernels, executed on the CPU thread by thread, mean what the references say, and would their mistakes show?"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import on_cpu
import pytest
import torch
from on_cpu import KERNELS, ORDERS, PLANTED, SANITIZERS, build, loaded, set_order
from updates import UPDATES, bits, raw_arguments, telling, trials

from fuseer.kernels import cuda_library, dispatch, functional

HERE = Path(__file__).parent
LARS = next(path for path in KERNELS if path.stem == "lars_update_cuda")
TEXT = LARS.read_text(encoding="utf-8")
BARRIERS = list(re.finditer(r"__syncthreads\(\);", TEXT))
# planted.cu's, in its order; of some, the sanitizers' words
MISTAKES = re.search(r"enum Mistake \{ (.*) \};", PLANTED.read_text(encoding="utf-8")).group(1).split(", ")
CAUGHT = {
    "outside_memory": "heap-buffer-overflow",
    "outside_shared": "index 32 out of bounds",
    "outside_dynamic": "heap-buffer-overflow",
    "misaligned": "misaligned address",
}
PROGRAM = """
import ctypes, sys
memory = ctypes.CDLL(None)
memory.malloc.restype = ctypes.c_void_p
x = ctypes.c_void_p(memory.malloc(4096))
code = ctypes.CDLL(sys.argv[1]).planted_mistake(ctypes.c_int64(int(sys.argv[2])), x, ctypes.c_int64(1024))
sys.exit(code)
"""
# values of each type of a skip flag
SKIPS = {
    **{dtype: (0.0, -0.0, 1.0, -2.5, torch.nan, torch.inf) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)},
    **{torch.bool: (False, True), torch.uint8: (0, 128), torch.int32: (0, -1, 1 << 24), torch.int64: (0, 1 << 40)},
    torch.complex64: (0, 1j),
}
pytestmark = pytest.mark.skipif(on_cpu.COMPILER is None, reason="no C++ compiler here: the CUDA kernels cannot be compiled for the CPU")


@pytest.fixture(scope="module")
def builds(tmp_path_factory):
    """The libraries by name, compiled two at a time."""
    folder = tmp_path_factory.mktemp("on_cpu")
    wanted = {"sanitized": (KERNELS, SANITIZERS), "kernels": (KERNELS, ()), "planted": ([PLANTED], ()), "mistakes": ([PLANTED], SANITIZERS)}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(build, folder / name, sources, *flags) for name, (sources, flags) in wanted.items()}


@pytest.fixture
def kernels(builds):
    library = loaded(builds["kernels"].result())
    yield library
    set_order(library, 0)


@pytest.fixture(scope="module")
def planted(builds):
    return loaded(builds["planted"].result())


def in_a_process(library, *options, **environment):
    """A pytest process in which backend="cuda" runs this library on CPU tensors."""
    plugins = ["-p", "on_cpu", "-p", "no:cacheprovider", "-o", "addopts="]
    settings = {"CUDA_ON_CPU_LIBRARY": str(library), "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": "1", **environment}
    environment.pop("FUSEER_BACKEND", None)
    command = [sys.executable, "-m", "pytest", *plugins, "--tb=short", *options]
    return subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)


def sanitized():
    """Settings under which a process that was not compiled for it loads a sanitized library."""
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    runtimes = [f"-print-file-name={name}" for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    found = [subprocess.run([on_cpu.COMPILER, name], capture_output=True, text=True, check=True).stdout.strip() for name in runtimes]
    return {"LD_PRELOAD": ":".join(found), **options}


def test_the_tests_of_every_update(builds):
    """Each op, case and mix of dtypes; the mutation seen; nothing else written; the same bits at every call; opcheck."""
    names = (
        "test_verdict",
        "test_verdict_sees_the_mutation",
        "test_nothing_else_is_written",
        "test_every_call_gives_the_same_bits",
        "test_opcheck",
    )
    done = in_a_process(builds["kernels"].result(), "-k", "cuda", *(f"{HERE / 'test_all_updates.py'}::{name}" for name in names))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 500, done.stdout


def test_no_access_out_of_bounds_or_misaligned(builds):
    """The verdicts again, and one list alone off the alignment: ASan guards every tensor's memory, UBSan watches 128-bit accesses."""
    names = ("test_verdict", "test_memory_layout_does_not_matter")
    words = "cuda and mixed and not mixed_halves and (test_verdict or guarded)"
    chosen = ("-s", "-k", words, *(f"{HERE / 'test_all_updates.py'}::{name}" for name in names))
    done = in_a_process(builds["sanitized"].result(), *chosen, **sanitized())
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 35, done.stdout


def cuda_trials(patch, library, mixes, chosen):
    """The trials of backend="cuda", which from here on runs this library on CPU tensors."""
    on_cpu.take_over(patch.setattr, library)
    return [trial for trial in trials(mixes, chosen) if trial.backend == "cuda"]


def equal(found, expected):
    return all(torch.equal(bits(x), bits(y)) for name in expected for x, y in zip(found[name], expected[name], strict=True))


def test_order_of_threads_does_not_matter(kernels, monkeypatch):
    given = cuda_trials(monkeypatch, kernels, ("float32", "mixed"), telling)
    assert {trial.op for trial in given} == set(UPDATES)
    for trial in given:
        found = []
        for order in ORDERS.values():
            set_order(kernels, order)
            found.append(trial.updated())
        assert all(equal(one, found[0]) for one in found), trial


def test_launches(kernels, monkeypatch):
    """One for ema_update_, two for lars_update_, however many tensors there are."""
    expected = {"ema_update_": ["fuseer_ema_update"], "lars_update_": ["fuseer_lars_squares", "fuseer_lars_update"]}
    for trial in cuda_trials(monkeypatch, kernels, ("mixed",), telling):
        launches = on_cpu.take_over(monkeypatch.setattr, kernels)
        trial.updated()
        assert launches == expected[trial.op], trial


@pytest.mark.parametrize("dtype", SKIPS, ids=str)
def test_skip_of_any_type(kernels, monkeypatch, dtype):
    on_cpu.take_over(monkeypatch.setattr, kernels)
    for value in SKIPS[dtype]:
        lists = [[torch.ones(5)] for _ in range(3)]
        functional.lars_update_(*lists, lr=1.0, skip=torch.tensor(value, dtype=dtype), backend="cuda")
        assert torch.equal(lists[0][0], torch.ones(5)) == bool(value), value


def test_layers_on_several_ranks(kernels, monkeypatch):
    """With one all-reduce of the layers' sums between the launches, two ranks move their pieces as one process moves them all."""
    (trial,) = (x for x in cuda_trials(monkeypatch, kernels, ("float64",), telling) if x.case.name == "segments")
    launches = on_cpu.take_over(monkeypatch.setattr, kernels)
    whole = trial.arguments()
    trial.raw_op(*raw_arguments(trial.op, whole))
    told = []
    for reduced in (lambda sums: told.append(sums) or sums, lambda sums: told[0] + told[1]):
        monkeypatch.setattr(dispatch, "all_reduce", lambda sums, reduction, name, reduced=reduced: reduced(sums))
        launches.clear()
        ranks = [trial.arguments() for _ in range(2)]
        for rank, arguments in enumerate(ranks):
            arguments |= {"segments": arguments["segments"][rank::2], "group_name": "ranks"}
            trial.raw_op(*raw_arguments(trial.op, arguments))
    assert launches == 2 * ["fuseer_lars_squares", "fuseer_lars_merge", "fuseer_lars_update"]
    assert told[0].shape == (6, 3) and not told[0][4].any() and told[0][3].all() and told[1][3].all()
    for arguments in ranks:
        for tensor, start, numel, _ in arguments["segments"].tolist():
            for name in ("params", "momenta"):
                found, expected = (x[name][tensor][start : start + numel] for x in (arguments, whole))
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("which", range(len(BARRIERS)))
def test_a_missing_barrier_shows(tmp_path, monkeypatch, which):
    """Whichever of lars_update_'s barriers is left out, in some order of threads a verdict turns red."""
    begin, end = BARRIERS[which].span()
    library = loaded(build(tmp_path, [LARS], edit=lambda text: text[:begin] + text[end:]))
    red = []
    for order in ORDERS.values():
        set_order(library, order)
        trials_of_lars = [x for x in cuda_trials(monkeypatch, library, ("float32",), telling) if x.op == "lars_update_"]
        red += [not all(trial.verdicts().values()) for trial in trials_of_lars]
    assert any(red)


def called(library, entry, *arguments):
    return cuda_library.call(library, entry, *arguments)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("threads", [32, 128, 1024])
def test_what_cuda_has_runs(planted, order, threads):
    """Dynamic and static shared memory, barriers, butterflies."""
    set_order(planted, ORDERS[order])
    x = torch.randn(3, 1000)
    y = torch.empty_like(x)
    assert called(planted, "planted_softmax", x, y, *x.shape, threads) == 0
    torch.testing.assert_close(y, x.softmax(-1), rtol=1e-5, atol=1e-7)


def test_indices_and_shuffles(planted):
    out = torch.full((12 * 96, 5), -1, dtype=torch.int32)
    assert called(planted, "planted_indices", out) == 0
    thread = torch.arange(96, dtype=torch.int32).repeat(12)
    block, lane = torch.arange(12, dtype=torch.int32).repeat_interleave(96), thread % 8
    columns = (block * 1000 + thread, thread - lane + 3, thread - 2 * (lane >= 2), thread + 2 * (lane < 6), thread - lane + (lane ^ 5))
    assert torch.equal(out, torch.stack(columns, 1))


def test_float16_and_bfloat16(planted):
    """Every bit pattern widens as in torch; numbers round as in torch, and once: through float32 this one would be rounded twice."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short()
    half, brain = torch.empty(2, len(every))
    called(planted, "planted_widened", every, every, len(every), half, brain)
    for found, dtype in ((half, torch.float16), (brain, torch.bfloat16)):
        torch.testing.assert_close(found, every.view(dtype).float(), rtol=0, atol=0, equal_nan=True)
    near = [torch.randn(1000) * 10.0**power for power in (-43, -38, -7, -4, 0, 4, 5, 38)]
    ties = [(every.view(dtype).float() + every.roll(1).view(dtype).float())[::9] / 2 for dtype in (torch.float16, torch.bfloat16)]
    x = torch.cat([*near, *ties, torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])]).double()
    half, brain = torch.empty(len(x), dtype=torch.float16), torch.empty(len(x), dtype=torch.bfloat16)
    called(planted, "planted_rounded", x, len(x), half, brain)
    for found in (half, brain):
        torch.testing.assert_close(found, x.float().to(found.dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit()[-2:], torch.tensor([False, True]))
    twice = torch.tensor([1 + 2**-11 + 2**-40, 1 + 2**-8 + 2**-40], dtype=torch.float64)
    called(planted, "planted_rounded", twice, 2, half, brain)
    assert half[0] == 1 + 2**-10 and brain[1] == 1 + 2**-7


@pytest.mark.parametrize("mistake", CAUGHT)
def test_sanitizers_catch(builds, mistake):
    """A planted mistake ends the process, with the line of the .cu file."""
    library = builds["mistakes"].result()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library), str(MISTAKES.index(mistake))],
        env={**os.environ, **sanitized()}, capture_output=True, text=True,
    )  # fmt: skip
    text = PLANTED.read_text(encoding="utf-8")
    line = text[: text.index(f"case {mistake}:")].count("\n") + 2
    assert done.returncode != 0 and CAUGHT[mistake] in done.stderr and f"planted.cu:{line}" in done.stderr, done.stderr


def test_a_clean_program_passes_the_sanitizers(builds):
    command = [sys.executable, "-c", PROGRAM, str(builds["mistakes"].result()), str(len(MISTAKES))]
    done = subprocess.run(command, env={**os.environ, **sanitized()}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mistake", ["divergent_barrier", "divergent_shuffle"])
def test_threads_that_wait_for_ever_are_an_error(planted, mistake):
    assert called(planted, "planted_mistake", MISTAKES.index(mistake), torch.zeros(8), 8) == 719
    assert b"of 32 threads of block 0, 31 wait for ever" in planted.cuda_on_cpu_said()
    assert called(planted, "planted_mistake", len(MISTAKES), torch.zeros(8), 8) == 0


@pytest.mark.parametrize("mistake", ["uninitialised", "absent_lane"])
def test_what_nobody_wrote_is_nan(planted, mistake):
    x = torch.zeros(8)
    assert called(planted, "planted_mistake", MISTAKES.index(mistake), x, 8) == 0
    assert x[0].isnan()
