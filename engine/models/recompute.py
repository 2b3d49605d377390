"""Which blocks of a backbone are computed again in the backward pass instead of being kept, and which are compiled?"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuseer.engine.models.norm import recomputation

RESNET = ("layer1", "layer2", "layer3", "layer4")


class RecomputedStage(nn.Sequential):
    """Blocks one after the other, in chunks of which only the input is kept for backward, which computes their insides again.

    `ends` counts the blocks up to the end of each chunk, rising; blocks after the last are kept as ever. Only images of at least `min_size`
    pixels a side are computed again, as the backbone's forward sees them. Keys of the state are those of the plain Sequential. Losses and
    gradients are bitwise those of the plain one; norms see one forward, and a group of ranks as many collectives. The random state
    is kept for chunks that drop something, no others. Works under autocast and ZeRO 0 to 3.
    """

    def __init__(self, blocks: nn.Sequential, ends: Sequence[int], min_size: int):
        super().__init__(*blocks)
        self.ends, self.min_size, self.large_enough = tuple(ends), min_size, True
        self.train(blocks.training)

    def forward(self, x: Tensor) -> Tensor:
        blocks = list(self)
        if not (self.large_enough and torch.is_grad_enabled()):
            return _through(blocks, x)
        for first, last in itertools.pairwise((0, *self.ends)):
            chunk = blocks[first:last]
            draws = any(map(_drops, chunk))
            x = checkpoint(_through, chunk, x, use_reentrant=False, context_fn=recomputation, preserve_rng_state=draws)
        return _through(blocks[self.ends[-1] :], x)

    def extra_repr(self) -> str:
        return f"recomputed in chunks that end after blocks {list(self.ends)}, from {self.min_size} px on"


def recompute_stages(backbone: nn.Module, wanted: str | Sequence, min_size: int = 0) -> nn.Module:
    """Puts a `RecomputedStage` in the place of the stages of `backbone` that are `wanted`; returns the backbone.

    `wanted` is "all", stages counted from 1, or for every stage the blocks that end its chunks, an empty list where none is; stages named
    as such are cut into chunks of one block. Published for SEER's 10B: [[2], [7], [9, 17], []]. Raises ValueError where the backbone has
    no such stages or blocks. Source: vissl, configs/config/pretrain/seer/models/regnet10B.yaml.
    """
    places = _places(backbone)
    depths = [len(parent.get_submodule(name)) for parent, name in places]
    for (parent, name), ends in zip(places, _chunk_ends(wanted, depths), strict=True):
        if ends:
            setattr(parent, name, RecomputedStage(parent.get_submodule(name), ends, min_size))
    if min_size:
        backbone.register_forward_pre_hook(_note_size)
    return backbone


def compile_blocks(backbone: nn.Module) -> nn.Module:
    """Has torch.compile run each block, one graph for every size of crop; keys stay. Raises ValueError where no blocks are known."""
    for parent, name in _places(backbone):
        for block in parent.get_submodule(name):
            block.compile(dynamic=False)
    return backbone


def _places(backbone: nn.Module) -> list[tuple[nn.Module, str]]:
    """(parent, name) of every stage, a Sequential of blocks: of our RegNets, our ViTs (one stage) and timm's models built alike."""
    stages, model = getattr(backbone, "stages", None), getattr(backbone, "model", None)
    if stages is not None:
        return [(stages, name) for name, _ in stages.named_children()]
    names = [name for name in ("blocks", *RESNET) if isinstance(getattr(model, name, None), nn.Sequential)]
    if not names:
        raise ValueError(
            "model.recompute and model.compile_blocks know the stages of our RegNets and ViTs, and of timm's models layer1 to layer4 or "
            f"blocks; {type(model or backbone).__name__} has none of these: leave both out"
        )
    return [(model, name) for name in names]


def _chunk_ends(wanted: str | Sequence, depths: list[int]) -> list[list[int]]:
    """For each stage the blocks that end its chunks."""
    if wanted == "all":
        wanted = range(1, len(depths) + 1)
    if all(isinstance(stage, int) for stage in wanted):
        if strange := [stage for stage in wanted if not 1 <= stage <= len(depths)]:
            raise ValueError(f"model.recompute names stage {strange[0]}; this backbone has stages 1 to {len(depths)}")
        return [list(range(1, depth + 1)) if stage in wanted else [] for stage, depth in enumerate(depths, 1)]
    if len(wanted) != len(depths) or any(max(ends, default=0) > depth for ends, depth in zip(wanted, depths, strict=True)):
        raise ValueError(
            f"model.recompute must give the ends of chunks for each of {len(depths)} stages of {depths} blocks; "
            f"got {[list(ends) for ends in wanted]}"
        )
    return [list(ends) for ends in wanted]


def _note_size(backbone: nn.Module, inputs: tuple) -> None:
    side = min(inputs[0].shape[-2:])
    for module in backbone.modules():
        if isinstance(module, RecomputedStage):
            module.large_enough = side >= module.min_size


def _through(blocks: list[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _drops(block: nn.Module) -> bool:
    """Does anything below draw random numbers: dropout, or timm's drop-path?"""
    return any(getattr(module, "drop_prob", 0) or getattr(module, "p", 0) for module in block.modules())
