"""On which inputs do we believe info_nce?"""

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ("query",)


def _case(name, shape, *, temperature=0.2, normalize=True, indexed=False, scale=1.0, noise=1.0, **marks):
    """`shape`: n queries, q keys, width d; the positive is the query with `noise` times another draw, or a key by its index."""

    n, q, d = shape

    def build(generator):
        def normal(*sizes):
            return torch.randn(sizes, dtype=torch.float64, generator=generator).clamp(-3, 3) * scale

        query, keys = normal(n, d), normal(q, d)
        index = torch.randint(q, (n,), generator=generator) if indexed else None
        return {
            "query": keys[index] + noise * query if indexed else query,
            "keys": keys,
            "positive": None if indexed else query + noise * normal(n, d),
            "positive_index": index,
            "temperature": temperature,
            "normalize": normalize,
        }

    return Case(name, build, narrowest=2, **marks)


CASES = (
    _case("small", (6, 11, 5)),
    _case("indexed", (7, 13, 5), indexed=True),
    _case("no_rows", (0, 3, 4)),
    _case("no_keys", (3, 0, 4)),
    _case("hot", (17, 37, 21), temperature=1.0, indexed=True),
    _case("cold", (9, 30, 21), temperature=0.02),
    _case("dot_products", (9, 14, 6), normalize=False, temperature=0.5, scale=0.5),
    _case("far_from_unit", (12, 29, 19), scale=30.0),
    _case("converged", (8, 23, 19), noise=0.05, indexed=True),
    _case("moco_256", (256, 65536, 128), production=True),
    _case("moco_256_bf16", (256, 65536, 128), production=True, dtype=torch.bfloat16),
    _case("moco_v3_1024", (1024, 1024, 256), temperature=1.0, indexed=True, production=True),
)


def mutated(arguments):
    """Another temperature."""
    return {**arguments, "temperature": 0.7 * arguments["temperature"]}


TELLING = ("small", "indexed", "hot", "cold", "far_from_unit")
