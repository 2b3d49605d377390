"""On which inputs do we believe ema_update_?"""

import torch

from fuseer.kernels.testing import Case, resnet50, vit_b

DIFFERENTIABLE = ()
WRITTEN = ("teacher", "shadow")
LISTS = ("teacher", "student", "shadow")
AWKWARD = ((), (0,), (1,), (15,), (16,), (17,), (3, 0, 2), (31, 33), (1025,), (8195,), (5, 8, 3, 3), (7, 5, 1, 1))


def _case(shapes, *, momentum=0.9, shadow=False, scalar=None, channels_last=False):
    def build(generator):
        def normal(shape):
            x = torch.randn(shape, dtype=torch.float64, generator=generator)
            return x.to(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else x

        return {
            "teacher": [normal(shape) for shape in shapes],
            "student": [normal(shape) for shape in shapes],
            "momentum": momentum if scalar is None else torch.tensor(momentum, dtype=scalar),
            "shadow": [torch.full(shape, torch.nan, dtype=torch.float64) for shape in shapes] if shadow else None,
        }

    return build


CASES = (
    Case("small", _case([(3, 4), (5,)])),
    Case("awkward", _case(AWKWARD)),
    Case("shadowed", _case(AWKWARD, shadow=True, momentum=0.75)),
    Case("scalar", _case(AWKWARD[:8], scalar=torch.float32, shadow=True)),
    Case("double_scalar", _case([(33,), (9, 2)], scalar=torch.float64)),
    Case("channels_last", _case([(5, 8, 3, 3), (64, 3, 7, 7), (4,)], channels_last=True)),
    Case("many_tiny", _case([(n % 5,) for n in range(300)], shadow=True)),
    Case("only_empty", _case([(0,), (2, 0)], shadow=True)),
    Case("all_student", _case([(17,), (40, 3)], momentum=0.0, shadow=True)),
    Case("all_teacher", _case([(17,), (40, 3)], momentum=1.0, shadow=True)),
    Case("resnet50", _case(resnet50(), momentum=0.996), production=True),
    Case("resnet50_shadow", _case(resnet50(), momentum=0.996, shadow=True), production=True, halves=("student", "shadow")),
    Case("vit_b", _case(vit_b(), momentum=0.996), production=True),
)


def mutated(arguments):
    """Half the step: a momentum half-way to 1."""
    return {**arguments, "momentum": 0.5 + 0.5 * arguments["momentum"]}


TELLING = ("small", "awkward", "shadowed", "scalar", "channels_last", "many_tiny")
