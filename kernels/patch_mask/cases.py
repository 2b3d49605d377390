"""On which inputs do we believe patch_mask?"""

import functools

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ()


def out_dtype(dtype):
    return torch.int64


def _build(generator, B, P, *, removed=0.75, levels=None):
    """Noise of which a share is removed; of so many `levels`, most of it equal; a P of 0 is made 1, which keeps one patch."""
    P = max(1, P)
    noise = torch.rand((B, P), dtype=torch.float64, generator=generator)
    return {"noise": noise if levels is None else (noise * levels).floor() - levels // 2, "keep": max(1, int(P * (1 - removed)))}


def _case(name, B, P, production=False, **options):
    return Case(name, functools.partial(_build, B=B, P=P, **options), production=production, sizes={"B": B, "P": P})


def _extremes(generator, B, P):
    """Zeros of both signs, which are equal, infinities, and numbers at the ends of float16."""
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 6e4, -6e4, 6e-8, -6e-8], dtype=torch.float64)
    return {"noise": values[torch.randint(len(values), (B, max(1, P)), generator=generator)], "keep": (max(1, P) + 1) // 2}


CASES = (
    _case("small", 3, 9),
    _case("wide", 5, 133),
    _case("one_patch", 4, 1),
    _case("one_kept", 2, 49, removed=0.999),
    _case("all_kept", 2, 12, removed=0.0),
    _case("no_images", 0, 5),
    _case("ties", 6, 83, levels=4),
    _case("all_equal", 2, 70, levels=1),
    Case("extremes", functools.partial(_extremes, B=3, P=47), sizes={"B": 3, "P": 47}),
    _case("mae_256", 256, 196, production=True),
    _case("mae_4096", 4096, 196, production=True),
    _case("many_patches", 8, 4096, production=True),
)


def mutated(arguments):
    """The largest noise kept in place of the smallest."""
    return {**arguments, "noise": -arguments["noise"]}


TELLING = ("small", "wide", "ties", "one_kept", "extremes")
