"""On which inputs do we believe gather_patches?"""

import functools

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ("images",)


def out_dtype(dtype):
    return dtype


def _build(generator, *, repeats=False, channels_last=False, **sizes):
    """B images of C channels, R rows of S patches of p x p pixels, M of which are asked for: different ones, or with `repeats` any."""
    B, C, R, S, p, M = (sizes[letter] for letter in "BCRSpM")
    images = torch.randn((B, C, R * p, S * p), dtype=torch.float64, generator=generator)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    if repeats:
        return {"images": images, "ids": torch.randint(R * S, (B, M), generator=generator), "patch": p}
    return {"images": images, "ids": torch.rand((B, R * S), generator=generator).argsort(1)[:, :M].contiguous(), "patch": p}


def _few(generator, **given):
    """The same of a few small images: numbers that a test draws may be any."""
    given |= {letter: min(given[letter], most) for letter, most in (("B", 6), ("M", 40))}
    given |= {letter: min(max(1, given[letter]), most) for letter, most in (("C", 4), ("R", 5), ("S", 5), ("p", 16))}
    return _build(generator, **given)


def _case(name, *numbers, **options):
    sizes = dict(zip("BCRSpM", numbers, strict=True))
    return Case(name, functools.partial(_few, **sizes, **options), sizes=sizes)


def _production(name, dtype=torch.float32, *, p=16, S=14, **options):
    """A quarter of the patches of 64 images of 224 x 224 pixels."""
    return Case(name, functools.partial(_build, B=64, C=3, R=S, S=S, p=p, M=S * S // 4, **options), production=True, dtype=dtype)


# of the first two, which are compiled at other sizes, no two axes are equally long: that would be taken for a rule
CASES = (
    _case("small", 2, 3, 2, 3, 4, 5),
    _case("repeats", 4, 2, 2, 3, 3, 7, repeats=True),
    _case("all", 1, 2, 2, 2, 4, 4),
    _case("channels_last", 2, 3, 3, 2, 4, 3, channels_last=True),
    _case("gray_pixels", 3, 1, 2, 5, 1, 6),
    _case("fourteen", 2, 3, 2, 1, 14, 1),
    _case("no_ids", 2, 3, 2, 2, 2, 0),
    _case("no_images", 0, 3, 2, 2, 2, 3),
    _production("mae_64"),
    _production("mae_64_bf16", torch.bfloat16),
    _production("channels_last_64", channels_last=True),
    _production("huge_64", p=14, S=16),
)


def mutated(arguments):
    """The patch beside each one, all round the image."""
    _, _, H, W = arguments["images"].shape
    return {**arguments, "ids": (arguments["ids"] + 1) % (H * W // arguments["patch"] ** 2)}


TELLING = ("small", "repeats", "all", "channels_last")
