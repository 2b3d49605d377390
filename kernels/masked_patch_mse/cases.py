"""On which inputs do we believe masked_patch_mse?"""

import functools

import torch

from fuseer.kernels.testing import Case

DIFFERENTIABLE = ("pred",)


def _build(generator, *, every=True, normalize=True, reduction="none", images=lambda x: x, **sizes):
    """B images of C channels, R rows of S patches of p x p pixels, M of them masked.

    pred has a row for `every` patch, or one for each masked one; `images` makes the images of standard normal ones.
    Sizes that no images have, or large ones, become small ones that they have.
    """
    B, C, R, S, p, M = (sizes[letter] for letter in "BCRSpM")
    B, R, S, p = B if B <= 64 else B % 8, _within(R, 16), _within(S, 16), _within(p, 16)
    C = max(_within(C, 8), 2 if normalize and p == 1 else 1)
    B, M = max(B, int(reduction == "mean")), _within(M, R * S)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return {
        "pred": normal(B, R * S if every else M, p * p * C),
        "images": images(normal(B, C, R * p, S * p)),
        "ids_masked": torch.rand((B, R * S), generator=generator).argsort(1)[:, :M],
        "patch": p,
        "normalize": normalize,
        "reduction": reduction,
    }


def _within(size, most):
    return size if 1 <= size <= most else 1 + size % most


def _case(name, *numbers, production=False, dtype=torch.float32, **options):
    sizes = dict(zip("BCRSpM", numbers, strict=True))
    return Case(name, functools.partial(_build, **sizes, **options), production, dtype, sizes=sizes)


def _flat(x):
    """Patches without variance in the first image, with a variance of 1e-6 in the others; the mean is 0.7."""
    return 0.7 + 1e-3 * x * (torch.arange(len(x)) > 0).view(-1, 1, 1, 1)


def _far(x):
    """A mean of 20 standard deviations, another in each channel."""
    return x + 20 * torch.arange(1, x.shape[1] + 1).view(1, -1, 1, 1)


CASES = (
    _case("small", 2, 2, 2, 3, 2, 3),
    _case("pixels", 2, 2, 2, 3, 2, 3, normalize=False, reduction="mean"),
    _case("one_image", 1, 3, 4, 2, 2, 5, every=False, reduction="mean"),
    _case("one_masked", 3, 3, 2, 2, 2, 1),
    _case("all_but_one", 2, 3, 3, 2, 2, 5, reduction="mean"),
    _case("all_masked", 2, 1, 2, 2, 3, 4),
    _case("pixels_of_one", 2, 1, 3, 5, 1, 7, every=False, normalize=False),
    _case("flat", 2, 3, 2, 1, 4, 2, images=_flat),
    _case("far", 2, 3, 1, 2, 4, 2, every=False, images=_far),
    _case("fourteen", 2, 3, 2, 2, 14, 3),
    _case("sixteen", 2, 3, 1, 3, 16, 2, reduction="mean"),
    _case("no_images", 0, 3, 2, 2, 2, 1),
    _case("mae_64", 64, 3, 14, 14, 16, 147, reduction="mean", production=True),
    _case("masked_64", 64, 3, 14, 14, 16, 147, every=False, reduction="mean", production=True),
    _case("huge_32", 32, 3, 16, 16, 14, 192, reduction="mean", production=True, dtype=torch.bfloat16),
)


def mutated(arguments):
    """Pixels for normalised targets, and the other way round."""
    return {**arguments, "normalize": not arguments["normalize"]}


# sizes that are equal in the first two stay so when they grow: torch.compile takes them for one
TELLING = ("small", "pixels", "all_but_one", "one_image")
