"""On which inputs do we believe nt_xent?"""

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ("z1", "z2")


def _case(name, n, d, *, temperature=0.1, normalize=True, scale=1.0, noise=1.0, **marks):
    """Two views of n embeddings: the second is the first with `noise` times as much of another draw."""

    def build(generator):
        z1, other = (torch.randn((n, d), dtype=torch.float64, generator=generator).clamp(-3, 3) * scale for _ in range(2))
        return {"z1": z1, "z2": z1 + noise * other, "temperature": temperature, "normalize": normalize}

    return Case(name, build, narrowest=2, **marks)


CASES = (
    _case("small", 6, 5),
    _case("one_pair", 1, 4),
    _case("no_rows", 0, 4),
    _case("hot", 17, 33, temperature=1.0),
    _case("cold", 9, 21, temperature=0.02),
    _case("negative_temperature", 7, 12, temperature=-0.5),
    _case("dot_products", 9, 6, normalize=False, temperature=0.5, scale=0.5),
    _case("far_from_unit", 12, 40, scale=30.0),
    _case("converged", 8, 19, noise=0.05),
    _case("simclr_1024", 512, 128, production=True),
    _case("simclr_8192", 4096, 128, production=True),
    _case("simclr_8192_bf16", 4096, 128, production=True, dtype=torch.bfloat16),
    _case("simclr_32768", 16384, 128, production=True),
)


def mutated(arguments):
    """Another temperature."""
    return {**arguments, "temperature": 0.7 * arguments["temperature"]}


TELLING = ("small", "hot", "cold", "far_from_unit", "dot_products")
