"""On which inputs do we believe patch_embed_visible?"""

import functools

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ("weight", "bias", "pos_embed")
REFUSES_GRADIENT = ("images",)
FOLLOWS_AUTOCAST = True


def out_dtype(dtype):
    return dtype


def _build(generator, *, bias=True, positions=True, repeats=False, uint8=False, channels_last=False, **sizes):
    """B images of C channels, R rows of S patches of p x p pixels, M of which are visible: different ones, or with `repeats` any."""
    B, C, R, S, p, D, M = (sizes[letter] for letter in "BCRSpDM")

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    images = torch.randint(256, (B, C, R * p, S * p), generator=generator, dtype=torch.uint8) if uint8 else normal(B, C, R * p, S * p)
    noise = torch.rand((B, R * S), generator=generator)
    return {
        "images": images.contiguous(memory_format=torch.channels_last) if channels_last else images,
        "weight": normal(D, C, p, p) / (p * C**0.5),
        "bias": normal(D) if bias else None,
        "ids_keep": torch.randint(R * S, (B, M), generator=generator) if repeats else noise.argsort(1)[:, :M].contiguous(),
        "pos_embed": normal(R * S, D) if positions else None,
        "mean": torch.linspace(0.4, 0.5, C, dtype=torch.float64) if uint8 else None,
        "std": torch.linspace(0.2, 0.3, C, dtype=torch.float64) if uint8 else None,
    }


def _few(generator, **given):
    """The same of a few small images: numbers that a test draws may be any."""
    given |= {letter: min(given[letter], most) for letter, most in (("B", 6), ("M", 40))}
    given |= {letter: min(max(1, given[letter]), most) for letter, most in (("C", 4), ("R", 5), ("S", 5), ("p", 16))}
    return _build(generator, **given | {"D": max(1, given["D"])})


def _case(name, *numbers, **options):
    sizes = dict(zip("BCRSpDM", numbers, strict=True))
    return Case(name, functools.partial(_few, **sizes, **options), sizes=sizes)


def _production(name, dtype=torch.float32, *, p=16, S=14, D=768, **options):
    """A quarter of the patches of 64 images of 224 x 224 pixels."""
    build = functools.partial(_build, B=64, C=3, R=S, S=S, p=p, D=D, M=S * S // 4, **options)
    return Case(name, build, production=True, dtype=dtype)


# of the first two, which are compiled at other sizes, no two axes are equally long: that would be taken for a rule
CASES = (
    _case("no_positions", 4, 3, 3, 4, 2, 5, 7, positions=False),
    _case("repeats", 4, 3, 3, 5, 2, 8, 7, repeats=True),
    _case("small", 2, 2, 2, 3, 2, 5, 3),
    _case("channels_last", 2, 3, 3, 2, 4, 7, 4, channels_last=True),
    _case("bytes", 2, 3, 2, 2, 4, 6, 3, uint8=True),
    _case("bytes_channels_last", 1, 3, 2, 3, 4, 6, 3, uint8=True, channels_last=True),
    _case("weight_alone", 2, 3, 2, 2, 3, 5, 2, positions=False, bias=False),
    _case("no_bias", 2, 2, 2, 2, 2, 3, 4, bias=False),
    _case("fourteen", 1, 1, 2, 2, 14, 6, 2),
    _case("sixteen", 1, 1, 1, 2, 16, 4, 1),
    _case("pixels", 2, 1, 3, 2, 1, 5, 4),
    _case("none_visible", 2, 3, 2, 2, 2, 3, 0),
    _case("no_images", 0, 3, 2, 2, 2, 3, 2),
    _production("vit_b_64"),
    _production("vit_b_64_bf16", torch.bfloat16),
    _production("bytes_64_bf16", torch.bfloat16, uint8=True),
    _production("vit_h_64_bf16", torch.bfloat16, p=14, S=16, D=1280),
)


def mutated(arguments):
    """The patch beside each one, all round the image; its position stays."""
    images, p = arguments["images"], arguments["weight"].shape[-1]
    return {**arguments, "images": images.roll(p, 3)}


TELLING = ("no_positions", "repeats", "small", "channels_last", "bytes", "weight_alone")
