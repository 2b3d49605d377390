"""On which inputs do we believe soft_xent?"""

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ("logits",)


def _case(n, k, *, temperature=0.1, weights=False, center=False, target_temperature=None, scale=1.0):
    def build(generator):
        def normal(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        target = normal(n, k) if target_temperature else torch.rand((n, k), dtype=torch.float64, generator=generator) / k
        return {
            "logits": normal(n, k).clamp(-3, 3) * scale,
            "target": target,
            "temperature": temperature,
            "weights": torch.rand(n, dtype=torch.float64, generator=generator) if weights else None,
            "target_center": normal(k) if center else None,
            "target_temperature": target_temperature,
        }

    return build


CASES = (
    Case("small", _case(6, 5)),
    Case("one_class", _case(3, 1)),
    Case("no_rows", _case(0, 4)),
    Case("weighted", _case(17, 33, weights=True)),
    Case("centred", _case(9, 21, center=True, target_temperature=0.04)),
    Case("sharpened", _case(9, 21, weights=True, target_temperature=0.07)),
    Case("logits_of_300", _case(12, 40, scale=100.0)),
    Case("swav_64", _case(64, 3000), production=True),
    Case("dino_640", _case(640, 65536, center=True, target_temperature=0.04), production=True, dtype=torch.bfloat16),
)


def mutated(arguments):
    """The temperature left out."""
    return {**arguments, "temperature": 1.0}


TELLING = ("small", "weighted", "centred", "sharpened", "logits_of_300")
