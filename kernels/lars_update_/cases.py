"""On which inputs do we believe lars_update_?"""

import torch

from fuseer.kernels.testing import Case, resnet50, vit_b

DIFFERENTIABLE = ()
WRITTEN = ("params", "momenta")
LISTS = ("params", "grads", "momenta")
AWKWARD = ((), (0,), (1,), (15,), (16,), (17,), (3, 0, 2), (31, 33), (1025,), (8195,), (5, 8, 3, 3), (7, 5, 1, 1))
# a step as large as the weights, and a decay as large as the gradients: what is forgotten shows
OPTIONS = {
    **{"lr": 1.5, "momentum": 0.5, "weight_decay": 0.3, "trust_coefficient": 0.4, "eps": 0.0, "denominator": "sum", "adapt": None},
    **{"lr_in_momentum": False, "nesterov": False, "clip": False, "skip": None, "segments": None},
}


def _case(shapes, *, channels_last=False, no_weights=(), no_grads=(), **options):
    """Tensors of standard normal numbers; those numbered in no_weights and no_grads are zeros."""

    def build(generator):
        def normal(shape):
            x = torch.randn(shape, dtype=torch.float64, generator=generator)
            return x.to(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else x

        made = {name: [normal(shape) for shape in shapes] for name in LISTS}
        for name, zeros in (("params", no_weights), ("grads", no_grads)):
            for i in zeros:
                made[name][i].zero_()
        chosen = {**OPTIONS, **options}
        if chosen["adapt"] is None:
            chosen["adapt"] = [True] * len(shapes)
        return {**made, **chosen}

    return build


def _flat(sizes, segments, layers, **options):
    """Flat tensors in which everything outside `segments`, rows (tensor, start, numel, layer), is NaN."""

    def build(generator):
        made = _case([(n,) for n in sizes], **options)(generator)
        for name in LISTS:
            for i, x in enumerate(made[name]):
                inside = torch.zeros(len(x), dtype=torch.bool)
                for tensor, start, numel, _ in segments:
                    inside[start : start + numel] |= tensor == i
                made[name][i] = x.masked_fill(~inside, torch.nan)
        table = torch.tensor(segments, dtype=torch.int64).view(-1, 4)
        return {**made, "segments": table, "adapt": [layer % 3 != 2 for layer in range(layers)]}

    return build


# layers 1 and 3 lie in several pieces, 4 nowhere, starts are odd, and tensor 1 holds nothing
PIECES = ((2, 700, 300, 1), (0, 0, 15, 0), (0, 15, 17, 1), (0, 33, 1000, 2), (2, 3, 1, 3), (2, 4, 640, 3), (0, 1040, 9, 3), (3, 0, 9001, 5))
SOME = [True, False] * 6
CASES = (
    Case("small", _case([(3, 4), (5,)])),
    Case("awkward", _case(AWKWARD, adapt=SOME)),
    Case("norm_of_sum", _case(AWKWARD, denominator="norm_of_sum", adapt=SOME)),
    Case("lr_in_momentum", _case([(7, 9), (4,), (65, 3)], lr_in_momentum=True, eps=1e-3)),
    Case("nesterov", _case([(7, 9), (4,), (65, 3)], nesterov=True, denominator="norm_of_sum", eps=1e-3)),
    Case("nesterov_lr_in_momentum", _case([(7, 9), (4,), (65, 3)], nesterov=True, lr_in_momentum=True)),
    Case("clipped", _case([(7, 9), (4,), (65, 3)], clip=True, trust_coefficient=8.0)),
    Case("clipped_below", _case([(7, 9), (4,), (65, 3)], clip=True)),
    Case("no_decay", _case([(7, 9), (4,)], weight_decay=0.0, momentum=0.0)),
    Case("zeros", _case([(8,), (9,), (2, 5), (3,)], no_weights=(0, 2), no_grads=(1, 2))),
    Case("zeros_norm_of_sum", _case([(8,), (9,), (2, 5), (3,)], no_weights=(0, 2), no_grads=(1, 2), denominator="norm_of_sum")),
    Case("no_lr", _case([(8,), (9, 3)], lr=0.0, clip=True)),
    Case("channels_last", _case([(5, 8, 3, 3), (64, 3, 7, 7), (4,)], channels_last=True)),
    Case("many_tiny", _case([(n % 5,) for n in range(200)], adapt=[n % 7 > 0 for n in range(200)])),
    Case("segments", _flat((1100, 0, 1003, 9004), PIECES, 6)),
    Case("segments_norm_of_sum", _flat((1100, 0, 1003, 9004), PIECES, 6, denominator="norm_of_sum", nesterov=True)),
    Case("no_segments", _flat((11,), (), 2)),
    Case("not_skipped", _case([(7, 9), (4,)], skip=torch.zeros(()))),
    Case("skipped", _case([(7, 9), (4,)], skip=torch.ones(()))),
    Case("resnet50", _case(resnet50(), lr=1e-3, momentum=0.9, weight_decay=1e-6, trust_coefficient=1e-3, eps=1e-8), production=True),
    Case(
        "vit_b",
        _case(
            vit_b(), lr=1e-3, momentum=0.9, weight_decay=1e-6, trust_coefficient=1e-3, denominator="norm_of_sum",
            adapt=[len(shape) > 1 for shape in vit_b()],
        ),
        production=True,
    ),
)  # fmt: skip


def mutated(arguments):
    """The weight decay left out."""
    return {**arguments, "weight_decay": 0.0}


TELLING = ("small", "awkward", "norm_of_sum", "lr_in_momentum", "nesterov", "channels_last", "many_tiny", "segments", "not_skipped")
