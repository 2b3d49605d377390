"""On which inputs do we believe unshuffle_tokens?"""

import functools

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ("x", "mask_token", "pos_embed")
MOST_IMAGES = 6


def out_dtype(dtype):
    return dtype


def backward_arguments(known):
    """What the raw backward op is told beside the ids."""
    pos_embed = known["pos_embed"]
    dtypes = {"mask_token_dtype": known["mask_token"].dtype, "pos_embed_dtype": None if pos_embed is None else pos_embed.dtype}
    return {"keep": known["x"].shape[1], **dtypes}


def _build(generator, B, P, D, *, kept=0.25, positions=True):
    """A share of P tokens kept, in the order of random noise."""

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    ids_restore = torch.rand((B, P), generator=generator).argsort(1)
    return {
        "x": normal(B, round(P * kept), D),
        "ids_restore": ids_restore,
        "mask_token": normal(D),
        "pos_embed": normal(P, D) if positions else None,
    }


def _few(generator, B, P, D, **options):
    """The same of at most MOST_IMAGES images: numbers that a test draws may be any."""
    return _build(generator, min(B, MOST_IMAGES), P, D, **options)


def _case(name, B, P, D, **options):
    return Case(name, functools.partial(_few, B=B, P=P, D=D, **options), sizes={"B": B, "P": P, "D": D})


MAE = functools.partial(_build, P=196, D=512)
CASES = (
    _case("small", 3, 8, 5),
    _case("wide", 2, 20, 33),
    _case("no_positions", 3, 11, 6, positions=False),
    _case("none_kept", 2, 6, 4, kept=0.0),
    _case("all_kept", 2, 6, 4, kept=1.0),
    _case("no_images", 0, 5, 3),
    Case("mae_64", functools.partial(MAE, B=64), production=True),
    Case("mae_256", functools.partial(MAE, B=256), production=True),
    Case("mae_256_bf16", functools.partial(MAE, B=256), production=True, dtype=torch.bfloat16),
)


def mutated(arguments):
    """The mask token left out of its places."""
    return {**arguments, "mask_token": torch.zeros_like(arguments["mask_token"])}


TELLING = ("small", "wide", "no_positions")
