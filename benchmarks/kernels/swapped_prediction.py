"""What does one swapped prediction, forward and backward, cost beside SwAV's loop?

python benchmarks/kernels/swapped_prediction.py [--threads N] [--repeats N]
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import measure

from fuseer.kernels.functional import swapped_prediction
from fuseer.kernels.swapped_prediction.cases import CASES, DIFFERENTIABLE
from fuseer.kernels.swapped_prediction.reference import swapped_prediction as reference
from fuseer.kernels.testing import inputs, verdicts


@torch.no_grad()
def official_codes(scores, epsilon, iterations):
    plan = torch.exp(scores / epsilon).t()
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(1, keepdim=True)
        plan /= plan.shape[0]
        plan /= plan.sum(0, keepdim=True)
        plan /= plan.shape[1]
    plan *= plan.shape[1]
    return plan.t()


def official(scores, queue_scores, assign, epsilon, iterations, temperature):
    """SwAV's loop over assign crops and the other crops."""
    loss = 0
    for a, i in enumerate(assign):
        rows = scores[i].detach() if queue_scores is None else torch.cat((queue_scores[a], scores[i].detach()))
        codes = official_codes(rows, epsilon, iterations)[-scores.shape[1] :]
        subloss = 0
        for v in range(len(scores)):
            if v != i:
                subloss -= torch.mean(torch.sum(codes * torch.log_softmax(scores[v] / temperature, dim=1), dim=1))
        loss += subloss / (len(scores) - 1)
    return loss / len(assign)


def step(function, arguments):
    def program():
        leaf = arguments["scores"].detach().requires_grad_()
        function(**{**arguments, "scores": leaf}).backward()

    return program


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine, bandwidth = measure.header(), measure.copy_bandwidth()
    for case in CASES:
        if not case.production:
            continue
        found = verdicts(swapped_prediction, reference, case, torch.float32, DIFFERENTIABLE)
        if not all(found.values()):
            raise SystemExit(f"swapped_prediction {case.name}: wrong, so not timed: {', '.join(map(str, found.values()))}")
        arguments = inputs(case, torch.float32)
        programs = {"official": step(official, arguments), "fuseer": step(swapped_prediction, arguments)}
        seconds = measure.interleaved(programs, repeats=options.repeats)
        floor = 2 * arguments["scores"].numel() * 4  # every score read once, every gradient written once
        found = measure.rows("swapped_prediction", case.name, seconds, baseline="official", floor_s=floor / bandwidth, machine=machine)
        measure.write("swapped_prediction", found)


if __name__ == "__main__":
    main()
