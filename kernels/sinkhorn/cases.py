"""On which inputs do we believe sinkhorn?"""

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ()


def _cosines(*shape, epsilon=0.05, iterations=3, scale=1.0):
    def build(generator):
        scores = torch.rand(shape, dtype=torch.float64, generator=generator) * 2 - 1
        return {"scores": scores * scale, "epsilon": epsilon, "iterations": iterations}

    return build


CASES = (
    Case("small", _cosines(8, 5)),
    Case("one_prototype", _cosines(6, 1)),
    Case("one_row", _cosines(1, 7)),
    Case("no_rows", _cosines(0, 4)),
    Case("no_problems", _cosines(0, 3, 4)),
    Case("odd_sizes", _cosines(37, 33, epsilon=0.03, iterations=10)),
    Case("several_problems", _cosines(2, 3, 19, 21)),
    Case("one_iteration", _cosines(20, 17, iterations=1)),
    Case("long_columns", _cosines(1100, 9)),
    Case("scores_of_100", _cosines(40, 50, scale=100.0)),
    Case("swav_64", _cosines(64, 3000), production=True),
    Case("swav_512", _cosines(512, 3000), production=True),
    Case("swav_4096", _cosines(4096, 3000), production=True),
    Case("seer_512", _cosines(512, 16384, iterations=10), production=True),
    Case("demo_128", _cosines(128, 100), production=True),
)


def mutated(arguments):
    """One iteration fewer; one more where there is only one."""
    return {**arguments, "iterations": arguments["iterations"] - 1 or 2}


TELLING = ("small", "odd_sizes", "several_problems", "one_iteration", "long_columns")
