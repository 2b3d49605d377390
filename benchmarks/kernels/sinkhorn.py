"""Does the compiled Sinkhorn beat the loop that SwAV published, and our own reference?

python benchmarks/kernels/sinkhorn.py [--threads N] [--repeats N] [--compile]
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure

from fuseer.kernels import extension
from fuseer.kernels.functional import sinkhorn
from fuseer.kernels.sinkhorn.cases import CASES
from fuseer.kernels.sinkhorn.reference import sinkhorn as reference
from fuseer.kernels.testing import inputs, verdicts


def official(scores, epsilon, iterations):
    """SwAV's loop, in place as published."""
    plan = torch.exp(scores / epsilon).t()
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(1, keepdim=True)
        plan /= plan.shape[0]
        plan /= plan.sum(0, keepdim=True)
        plan /= plan.shape[1]
    plan *= plan.shape[1]
    return plan.t()


def programs(arguments, with_compile):
    found = {"official": lambda: official(**arguments)}
    if with_compile:
        compiled = torch.compile(official)
        found["compile"] = lambda: compiled(**arguments)
    found["reference"] = lambda: sinkhorn(**arguments, backend="reference")
    if extension.load():
        found["cpu"] = lambda: sinkhorn(**arguments, backend="cpu")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="add torch.compile of the official loop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine, bandwidth = measure.header(), measure.copy_bandwidth()
    for case in CASES:
        if not case.production:
            continue
        if extension.load():
            found = verdicts(lambda **arguments: sinkhorn(**arguments, backend="cpu"), reference, case, torch.float32)
            if not all(found.values()):
                raise SystemExit(f"sinkhorn {case.name}: wrong, so not timed: {found['out']}")
        arguments = inputs(case, torch.float32)
        seconds = measure.interleaved(programs(arguments, options.compile), repeats=options.repeats)
        floor = 2 * arguments["scores"].numel() * 4  # scores read once, codes written once
        rows = measure.rows("sinkhorn", case.name, seconds, baseline="official", floor_s=floor / bandwidth, machine=machine)
        measure.write("sinkhorn", rows)


if __name__ == "__main__":
    main()
