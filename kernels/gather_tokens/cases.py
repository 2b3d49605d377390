"""On which inputs do we believe gather_tokens?"""

import functools

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ("x",)
MOST_IMAGES = 6


def out_dtype(dtype):
    return dtype


def backward_arguments(known):
    """What the raw backward op is told beside the ids: how many tokens an image had."""
    return {"patches": known["x"].shape[1]}


def _build(generator, B, P, M, D, *, repeats=False):
    """Tokens and the ids of a random subset of them, or with `repeats` any ids."""
    x = torch.randn((B, P, D), dtype=torch.float64, generator=generator)
    if repeats:
        return {"x": x, "ids": torch.randint(P, (B, M), generator=generator)}
    return {"x": x, "ids": torch.rand((B, P), generator=generator).argsort(1)[:, :M].contiguous()}


def _few(generator, B, P, M, D, **options):
    """The same of at most MOST_IMAGES images and at least one token: numbers that a test draws may be any."""
    return _build(generator, min(B, MOST_IMAGES), max(1, P), M, D, **options)


def _case(name, B, P, M, D, **options):
    return Case(name, functools.partial(_few, B=B, P=P, M=M, D=D, **options), sizes={"B": B, "P": P, "M": M, "D": D})


CASES = (
    _case("small", 3, 9, 4, 5),
    _case("wide", 2, 20, 5, 33),
    _case("repeats", 2, 7, 19, 6, repeats=True),
    _case("one_token", 2, 1, 3, 4, repeats=True),
    _case("all_tokens", 2, 12, 12, 7),
    _case("no_ids", 2, 5, 0, 3),
    _case("no_images", 0, 5, 2, 3),
    Case("vit_b_256", functools.partial(_build, B=256, P=196, M=49, D=768), production=True),
    Case("vit_b_256_bf16", functools.partial(_build, B=256, P=196, M=49, D=768), production=True, dtype=torch.bfloat16),
)


def mutated(arguments):
    """The patch beside each one, all round the image."""
    return {**arguments, "ids": (arguments["ids"] + 1) % arguments["x"].shape[1]}


TELLING = ("small", "wide", "repeats")
