"""On which inputs do we believe swapped_prediction?"""

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ("scores",)
# of what a backend keeps for its gradient, what is wider than the arithmetic
KEPT_IN_FLOAT64 = {"cpu": ("potentials",)}


def _case(v, b, k, *, q=None, assign=(0, 1), iterations=3, scale=1.0):
    def build(generator):
        def cosines(*shape):
            return (torch.rand(shape, dtype=torch.float64, generator=generator) * 2 - 1) * scale

        return {
            "scores": cosines(v, b, k),
            "queue_scores": None if q is None else cosines(len(assign), q, k),
            "assign": assign,
            "epsilon": 0.05,
            "iterations": iterations,
            "temperature": 0.1,
        }

    return build


CASES = (
    Case("two_crops", _case(2, 6, 5)),
    Case("multi_crop", _case(5, 7, 11)),
    Case("queue", _case(4, 5, 9, q=13)),
    Case("empty_queue", _case(3, 5, 6, q=0)),
    Case("assign_one", _case(3, 9, 8, assign=(2,), q=4)),
    Case("assign_all", _case(3, 8, 6, assign=(2, 0, 1), iterations=1)),
    Case("no_rows", _case(3, 0, 4)),
    Case("one_prototype", _case(2, 4, 1)),
    # at three times these the C++ gradient errs by up to three times what eager does (docs/ops.md)
    Case("scores_of_100", _case(3, 12, 10, scale=100.0), largest_scale=1.0),
    Case("swav_64", _case(8, 64, 3000), production=True),
    Case("swav_64_queue", _case(8, 64, 3000, q=480), production=True),
    Case("swav_256", _case(8, 256, 3000), production=True),
    Case("demo_128", _case(6, 128, 100), production=True),
)


def mutated(arguments):
    """One iteration fewer; one more where there is only one."""
    return {**arguments, "iterations": arguments["iterations"] - 1 or 2}


TELLING = ("two_crops", "multi_crop", "queue", "assign_one", "assign_all")
