"""What is a RegNet, and which AnyNet does a name, a quantised linear rule or a list of stages build?"""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fuseer.engine.models.norm import BatchNorm

# (depth, w0, wa, wm, group width) of pycls' model zoo; Y from 64gf on as SEER trained them. SEER's first paper prints the stage widths of
# 128gf, 528 1056 2904 7392, for its 256gf, whose weights are 746 1492 4103 10444 wide; ClassyVision's regnet_y_256gf is a third network
NAMED = {
    "regnetx_200mf": (13, 24, 36.44, 2.49, 8),
    "regnetx_400mf": (22, 24, 24.48, 2.54, 16),
    "regnetx_600mf": (16, 48, 36.97, 2.24, 24),
    "regnetx_800mf": (16, 56, 35.73, 2.28, 16),
    "regnetx_1_6gf": (18, 80, 34.01, 2.25, 24),
    "regnetx_3_2gf": (25, 88, 26.31, 2.25, 48),
    "regnetx_4gf": (23, 96, 38.65, 2.43, 40),
    "regnetx_6_4gf": (17, 184, 60.83, 2.07, 56),
    "regnetx_8gf": (23, 80, 49.56, 2.88, 120),
    "regnetx_12gf": (19, 168, 73.36, 2.37, 112),
    "regnetx_16gf": (22, 216, 55.59, 2.1, 128),
    "regnetx_32gf": (23, 320, 69.86, 2.0, 168),
    "regnety_200mf": (13, 24, 36.44, 2.49, 8),
    "regnety_400mf": (16, 48, 27.89, 2.09, 8),
    "regnety_600mf": (15, 48, 32.54, 2.32, 16),
    "regnety_800mf": (14, 56, 38.84, 2.4, 16),
    "regnety_1_6gf": (27, 48, 20.71, 2.65, 24),
    "regnety_3_2gf": (21, 80, 42.63, 2.66, 24),
    "regnety_4gf": (22, 96, 31.41, 2.24, 64),
    "regnety_6_4gf": (25, 112, 33.22, 2.27, 72),
    "regnety_8gf": (17, 192, 76.82, 2.19, 56),
    "regnety_12gf": (19, 168, 73.36, 2.37, 112),
    "regnety_16gf": (18, 200, 106.23, 2.48, 112),
    "regnety_32gf": (20, 232, 115.89, 2.53, 232),
    "regnety_64gf": (20, 352, 147.48, 2.4, 328),
    "regnety_128gf": (27, 456, 160.83, 2.52, 264),
    "regnety_256gf": (27, 640, 230.83, 2.53, 373),
    "regnety_10b": (27, 1744, 620.83, 2.52, 1010),
    # ours: groups of a multiple of 8 channels, as tensor cores take them; no published weights fit
    "regnety_256gf_friendly": (27, 640, 230.83, 2.53, 376),
    "regnety_10b_friendly": (27, 1744, 620.83, 2.52, 1008),
}
SE_RATIO = {"regnetx": 0.0, "regnety": 0.25}


@dataclass(frozen=True)
class Stage:
    """`depth` blocks of `width` channels, the first with `stride`.

    The 3x3 convolution has round(width · bottleneck_ratio) channels in groups of `group_width`; squeeze-excitation has
    round(se_ratio · input width of the block) channels, none at 0. Raises ValueError where the parts do not fit together.
    """

    depth: int
    width: int
    group_width: int
    bottleneck_ratio: float = 1.0
    se_ratio: float = 0.0
    stride: int = 2

    def __post_init__(self):
        for name in ("depth", "width", "group_width", "stride", "bottleneck_ratio"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Stage: {name} must be positive; got {getattr(self, name)}")
        if self.se_ratio < 0:
            raise ValueError(f"Stage: se_ratio must be 0 (none) or positive; got {self.se_ratio}")
        if self.bottleneck_width % self.group_width:
            width, group_width = compatible_width(self.width, self.bottleneck_ratio, self.group_width)
            raise ValueError(
                f"Stage: round(width * bottleneck_ratio) must be a multiple of group_width; got {self.width} * {self.bottleneck_ratio} and "
                f"{self.group_width}; the nearest that fits is width={width}, group_width={group_width}"
            )

    @property
    def bottleneck_width(self) -> int:
        return round(self.width * self.bottleneck_ratio)


def compatible_width(width: int, bottleneck_ratio: float, group_width: int) -> tuple[int, int]:
    """(width, group width) nearest to those given whose bottleneck splits into whole groups: the rule of pycls, half to even."""
    bottleneck = int(max(1, width * bottleneck_ratio))
    group_width = min(group_width, bottleneck)
    multiple = math.lcm(group_width, int(bottleneck_ratio)) if bottleneck_ratio > 1 else group_width
    bottleneck = max(multiple, round(bottleneck / multiple) * multiple)
    return int(bottleneck / bottleneck_ratio), group_width


def anynet_stages(
    depths: Sequence[int],
    widths: Sequence[int],
    *,
    group_widths: int | Sequence[int] = 8,
    bottleneck_ratios: float | Sequence[float] = 1.0,
    se_ratios: float | Sequence[float] = 0.25,
    strides: int | Sequence[int] = 2,
) -> tuple[Stage, ...]:
    """One `Stage` for each depth; every other argument is one value for all stages or one per stage, else ValueError."""

    def spread(name, value):
        values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * len(depths)
        if len(values) != len(depths):
            raise ValueError(f"anynet: {name} must be one value or one per stage ({len(depths)}); got {list(values)}")
        return values

    columns = (
        spread("widths", widths),
        spread("group_widths", group_widths),
        spread("bottleneck_ratios", bottleneck_ratios),
        spread("se_ratios", se_ratios),
        spread("strides", strides),
    )
    return tuple(Stage(*row) for row in zip(depths, *columns, strict=True))


def regnet_stages(
    depth: int,
    w0: int,
    wa: float,
    wm: float,
    group_width: int,
    *,
    bottleneck_ratio: float = 1.0,
    se_ratio: float = 0.0,
    strides: int | Sequence[int] = 2,
) -> tuple[Stage, ...]:
    """Stages of the quantised linear rule: u_j = w0 + wa·j, s_j = round(ln(u_j / w0) / ln wm), w_j = 8·round(w0·wm^s_j / 8).

    Runs of equal w_j are the stages; `compatible_width` then fits width and group width together. Rounding is half to even.
    `strides` is one value or one per stage. Raises ValueError unless depth >= 1, w0 > 0 is a multiple of 8, wa >= 0 and wm > 1.
    Source: Radosavovic et al., arXiv 2003.13678; pycls/models/regnet.py.
    """
    if depth < 1 or w0 <= 0 or w0 % 8 or wa < 0 or wm <= 1:
        raise ValueError(f"regnet: needs depth >= 1, w0 > 0 a multiple of 8, wa >= 0, wm > 1; got {depth}, {w0}, {wa}, {wm}")
    exponents = [round(math.log((w0 + wa * j) / w0) / math.log(wm)) for j in range(depth)]
    block_widths = [round(w0 * wm**s / 8) * 8 for s in exponents]
    widths = sorted(set(block_widths))
    fitted = [compatible_width(width, bottleneck_ratio, group_width) for width in widths]
    return anynet_stages(
        [block_widths.count(width) for width in widths],
        [width for width, _ in fitted],
        group_widths=[group for _, group in fitted],
        bottleneck_ratios=bottleneck_ratio,
        se_ratios=se_ratio,
        strides=strides,
    )


class _ConvNorm(nn.Module):
    def __init__(self, width_in, width_out, size, *, stride=1, groups=1, group=None):
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, size, stride, size // 2, groups=groups, bias=False)
        self.bn = BatchNorm(width_out, group=group)

    def forward(self, x):
        return self.bn(self.conv(x))


class _SqueezeExcitation(nn.Module):
    def __init__(self, width, squeezed, activation):
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.act = activation(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x):
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class _Block(nn.Module):
    """act(x' + conv1x1(SE(act(conv3x3(act(conv1x1(x))))))), each convolution normalised; x' is x, or projected where shapes change."""

    def __init__(self, width_in, stage, *, stride, activation, group):
        super().__init__()
        inner = stage.bottleneck_width
        self.conv1 = _ConvNorm(width_in, inner, 1, group=group)
        self.conv2 = _ConvNorm(inner, inner, 3, stride=stride, groups=inner // stage.group_width, group=group)
        self.se = _SqueezeExcitation(inner, max(1, round(stage.se_ratio * width_in)), activation) if stage.se_ratio else nn.Identity()
        self.conv3 = _ConvNorm(inner, stage.width, 1, group=group)
        projected = width_in != stage.width or stride != 1
        self.shortcut = _ConvNorm(width_in, stage.width, 1, stride=stride, group=group) if projected else nn.Identity()
        self.act = activation(inplace=True)

    def forward(self, x):
        y = self.act(self.conv1(x))
        y = self.se(self.act(self.conv2(y)))
        return self.act(self.conv3(y).add_(self.shortcut(x)))


class AnyNet(nn.Module):
    """Pooled features [B, D] of images [B, 3, H, W]: a 3x3 stem, then stages of residual bottleneck blocks, then the spatial mean.

    `stages` is a sequence of `Stage`; D, the last width, is `width`. The pooled features are float32 at least; `feature_map` gives
    [B, D, h, w] with h = ceil(H / product of all strides). `stem_stride=1` is for small images. `activation` is a class taking `inplace`.
    Norms are `BatchNorm` over `group` (None: this process). Convolutions start as N(0, 2 / (k² · width_out)), not divided by groups;
    norms at 1 and 0, with `zero_init_last` the last one of each block at 0 and 0. Raises ValueError for images of another shape.
    Source: Radosavovic et al., arXiv 2003.13678; pycls/models/anynet.py.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        stem_width: int = 32,
        stem_stride: int = 2,
        zero_init_last: bool = False,
        activation: type[nn.Module] = nn.ReLU,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        if not stages or stem_width < 1 or stem_stride not in (1, 2):
            raise ValueError(
                f"AnyNet: needs at least one stage, stem_width >= 1, stem_stride 1 or 2; got {len(stages)}, {stem_width}, {stem_stride}"
            )
        self.stem = _ConvNorm(3, stem_width, 3, stride=stem_stride, group=group)
        self.act = activation(inplace=True)
        self.stages = nn.ModuleList()
        width = stem_width
        for stage in stages:
            blocks = nn.Sequential()
            for index in range(stage.depth):
                stride = stage.stride if index == 0 else 1
                blocks.append(_Block(width, stage, stride=stride, activation=activation, group=group))
                width = stage.width
            self.stages.append(blocks)
        self.width = width
        self.widths = [stage.width for stage in stages]
        self.memory_format = torch.contiguous_format
        self._initialise(zero_init_last)

    def _initialise(self, zero_init_last):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
            elif isinstance(module, _Block) and zero_init_last:
                nn.init.zeros_(module.conv3.bn.weight)

    def _load_from_state_dict(self, state_dict, prefix, *others):
        """As nn.Module's; ValueError where the weights are of other stage widths, as those of a friendly sibling are."""
        keys = (f"{prefix}stages.{index}.0.conv3.conv.weight" for index in itertools.count())
        widths = [len(state_dict[key]) for key in itertools.takewhile(state_dict.__contains__, keys)]
        if widths and widths != self.widths:
            raise ValueError(
                f"AnyNet: the weights are of a network with stages {widths} wide, this one has {self.widths}: they do not fit each other, "
                "nor do those of a name with and without _friendly; name the model that the weights are of"
            )
        super()._load_from_state_dict(state_dict, prefix, *others)

    def feature_map(self, images: Tensor) -> Tensor:
        """The last stage's activations [B, D, h, w]."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"AnyNet: images must be [B, 3, H, W]; got {list(images.shape)}")
        x = self.act(self.stem(images))
        for stage in self.stages:
            x = stage(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        features = self.feature_map(images.contiguous(memory_format=self.memory_format))
        return features.mean((2, 3), dtype=torch.promote_types(features.dtype, torch.float32))


def named_stages(name: str, **options) -> tuple[Stage, ...]:
    """The stages of a key of `NAMED`, with `options` of `regnet_stages` in place of its own."""
    row = dict(zip(("depth", "w0", "wa", "wm", "group_width"), NAMED[name], strict=True))
    return regnet_stages(**{**row, "se_ratio": SE_RATIO[name.split("_")[0]], **options})


def stages_of(state: Mapping[str, Tensor]) -> tuple[Stage, ...]:
    """The stages of the `AnyNet` with these weights under our keys, as shapes tell: strides are taken for 2 and an se_ratio for 0.25."""
    stages = []
    while f"stages.{len(stages)}.0.conv3.conv.weight" in state:
        at = f"stages.{len(stages)}."
        depth = len({key.split(".")[2] for key in state if key.startswith(at)})
        width, inner = (state[f"{at}0.{name}.conv.weight"].shape[0] for name in ("conv3", "conv2"))
        group_width, squeezed = state[f"{at}0.conv2.conv.weight"].shape[1], f"{at}0.se.fc1.weight" in state
        stages.append(Stage(depth, width, group_width, inner / width, 0.25 if squeezed else 0.0))
    return tuple(stages)


def build_regnet(
    name: str,
    *,
    stem_width: int = 32,
    stem_stride: int = 2,
    zero_init_last: bool = False,
    activation: type[nn.Module] = nn.ReLU,
    group: dist.ProcessGroup | None = None,
    **stage_options,
) -> AnyNet:
    """The `AnyNet` called `name`: a key of `NAMED`, or "regnet" or "anynet" with the arguments of `regnet_stages` or `anynet_stages`.

    For a named model the stage options override its row: `strides`, `se_ratio`, `group_width`, `depth` and so on. Raises ValueError for
    an unknown name, TypeError for an option that `regnet_stages` or `anynet_stages` lacks.
    """
    if name == "anynet":
        stages = anynet_stages(**stage_options)
    elif name == "regnet":
        stages = regnet_stages(**stage_options)
    elif name in NAMED:
        stages = named_stages(name, **stage_options)
    else:
        raise ValueError(f"build_regnet: name must be regnet, anynet or one of {', '.join(NAMED)}; got {name!r}")
    return AnyNet(
        stages, stem_width=stem_width, stem_stride=stem_stride, zero_init_last=zero_init_last, activation=activation, group=group
    )


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """timm's RegNet X or Y state under our keys (s1.b1.downsample → stages.0.0.shortcut); its classifier is left out."""
    ours = {}
    for key, value in state.items():
        if not key.startswith("head."):
            key = re.sub(r"^s(\d+)\.b(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.{int(m[2]) - 1}.", key)
            ours[key.replace(".downsample.", ".shortcut.")] = value
    return ours


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state under the keys of timm's RegNet X or Y, without a classifier: the inverse of `from_timm`."""
    theirs = {}
    for key, value in state.items():
        key = re.sub(r"^stages\.(\d+)\.(\d+)\.", lambda m: f"s{int(m[1]) + 1}.b{int(m[2]) + 1}.", key)
        theirs[key.replace(".shortcut.", ".downsample.")] = value
    return theirs


@torch.no_grad()
def complexity(model: nn.Module, images: Tensor) -> dict[str, int]:
    """Multiply-adds and activations of one image: those of convolutions and linear layers, biases as one addition per output.

    `images` [B, 3, H, W] may be on device meta, like the model, which should be in evaluation mode. Norms, activations, pooling and
    sums count as 0.
    Source: pycls/models/blocks.py.
    """
    totals = {"flops": 0, "activations": 0}

    def count(layer, _, output):
        elements = output.numel() // images.shape[0]
        totals["activations"] += elements
        totals["flops"] += elements * (layer.weight[0].numel() + (layer.bias is not None))

    hooks = [layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return totals
