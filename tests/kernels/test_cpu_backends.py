"""Is every op on the CPU right with any number of threads and on any instruction set, and the same to the bit from call to call?"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from grid import first, lengths, over, resized, threads, trials

from fuseer.kernels import extension

HERE = Path(__file__).parent
CAPABILITIES = {"DEFAULT": "default", "AVX2": "avx2", "AVX512": "avx512"}
# What this CPU and torch build reach, narrowest first.
REACHED = list(CAPABILITIES)[: list(CAPABILITIES).index(torch.backends.cpu.get_cpu_capability()) + 1]


def wide(trial):
    """The trial with rows and columns enough for several threads."""
    rows, last = lengths(trial.case)
    return trial.but(case=resized(trial.case, {**dict.fromkeys(rows, 67), **dict.fromkeys(last, 1100)}))


@over([wide(trial) for trial in trials((torch.float32, torch.bfloat16), first) if trial.device == "cpu"])
def test_any_number_of_threads(trial):
    for count in (1, 2, 3):
        with threads(count):
            runs = [{**trial.raw(), **trial.outputs()} for _ in range(3)]
            verdicts = {**trial.verdicts(), **trial.raw_verdicts()}
        assert all(verdicts.values()), (count, {name: str(verdict) for name, verdict in verdicts.items() if not verdict})
        for run in runs[1:]:
            assert all(torch.equal(x, runs[0][name]) for name, x in run.items()), count


@pytest.fixture(scope="module")
def processes():
    """A process for every instruction set, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {capability: pool.submit(under, capability) for capability in REACHED}


@pytest.mark.skipif(extension.load() is None, reason="no C++ extension here")
@pytest.mark.parametrize("capability", REACHED)
def test_every_instruction_set(processes, capability):
    done = processes[capability].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def under(capability):
    """Every verdict of every op on the CPU, in a process of that instruction set whose fresh memory is full of 0x7f."""
    program = (
        f"import sys, torch, pytest; assert torch.backends.cpu.get_cpu_capability() == {capability!r};sys.exit(pytest.main(sys.argv[1:]))"
    )
    names = ("verdict", "everything", "every_output", "every_call")
    # the widest runs in all other tests too: of it the memory alone is new
    names += ("memory", "sweep", "any", "nothing_else") if capability != REACHED[-1] else ()
    chosen = f"cpu-cpu and ({' or '.join(f'test_{name}' for name in names)})"
    arguments = ["-p", "no:cacheprovider", "--tb=short", "-k", chosen, *(str(HERE / f"test_all_{what}.py") for what in ("ops", "updates"))]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": CAPABILITIES[capability], "MALLOC_PERTURB_": "128", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program, *arguments], env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
