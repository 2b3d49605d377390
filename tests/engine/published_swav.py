"""Which keys and shapes do the official files of SwAV and of VISSL's SEER hold, and how are ones with exactly these keys made?"""

import torch
import torchvision

# trunk: (depths, stage widths, group width), head: (its widths, BatchNorm in it); K = 16,000 of width 256 in all. The numbers of
# vissl configs/config/benchmark/nearest_neighbor/models/seer/*.yaml, trunks by classy_vision/models/regnet.py's rule
SEER = {
    "regnety_8gf": ((2, 4, 10, 1), (168, 448, 896, 2016), 56, (4096, 4096, 256), True),
    "regnety_16gf": ((2, 4, 11, 1), (224, 448, 1232, 3024), 112, (4096, 4096, 256), True),
    "regnety_32gf": ((2, 5, 12, 1), (232, 696, 1392, 3712), 232, (4096, 4096, 256), True),
    "regnety_64gf": ((2, 5, 12, 1), (328, 984, 1968, 4920), 328, (8192, 8192, 256), False),
    "regnety_128gf": ((2, 7, 17, 1), (528, 1056, 2904, 7392), 264, (8192, 8192, 256), False),
    "regnety_256gf": ((2, 7, 17, 1), (746, 1492, 4103, 10444), 373, (8192, 8192, 256), False),
    "regnety_10b": ((2, 7, 17, 1), (2020, 4040, 11110, 28280), 1010, (8192, 8192, 256), False),
}
SMALL = ((1, 1, 4, 7), (24, 56, 152, 368), 8)
PARTS_OF_10B = ((2,), (7,), (9, 17), (1,))


def norm(prefix: str, C: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"{prefix}.{name}": (C,) for name in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, f"{prefix}.num_batches_tracked": ()}


def trunk_shapes(depths, widths, group_width, *, ends=None) -> dict[str, tuple[int, ...]]:
    """VISSL's RegNet trunk; with `ends` of parts for every stage, as its FSDP trunk (10B) names the blocks."""
    at = "_feature_blocks."
    shapes = {f"{at}conv1.stem.0.weight": (32, 3, 3, 3), **norm(f"{at}conv1.stem.1", 32)}
    before = 32
    for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        for index in range(depth):
            block = f"{at}res{stage + 2}."
            if ends:
                block += f"block{stage + 1}-part{sum(index >= end for end in ends[stage])}."
            block += f"block{stage + 1}-{index}"
            if index == 0:
                shapes |= {f"{block}.proj.weight": (width, before, 1, 1), **norm(f"{block}.bn", width)}
            shapes |= {f"{block}.f.a.0.weight": (width, before, 1, 1), **norm(f"{block}.f.a.1", width)}
            shapes |= {f"{block}.f.b.0.weight": (width, group_width, 3, 3), **norm(f"{block}.f.b.1", width)}
            squeezed = round(before / 4)
            shapes |= {
                f"{block}.f.se.excitation.0.weight": (squeezed, width, 1, 1), f"{block}.f.se.excitation.0.bias": (squeezed,),
                f"{block}.f.se.excitation.2.weight": (width, squeezed, 1, 1), f"{block}.f.se.excitation.2.bias": (width,),
                f"{block}.f.c.weight": (width, width, 1, 1), **norm(f"{block}.f.final_bn", width),
            }  # fmt: skip
            before = width
    return shapes


def projection_shapes(prefix: str, dims, normed: bool) -> dict[str, tuple[int, ...]]:
    """Linear [- BatchNorm] - ReLU, …, Linear, numbered as they stand in torch's Sequential."""
    shapes, layer = {}, 0
    for width_in, width in zip(dims[:-1], dims[1:], strict=True):
        shapes |= {f"{prefix}.{layer}.weight": (width, width_in), f"{prefix}.{layer}.bias": (width,)}
        if normed and width is not dims[-1]:
            shapes |= norm(f"{prefix}.{layer + 1}", width)
        layer += 3 if normed else 2
    return shapes


def heads_shapes(dims, normed: bool, K: int = 16_000) -> dict[str, tuple[int, ...]]:
    return {**projection_shapes("0.projection_head", dims, normed), "0.prototypes0.weight": (K, dims[-1])}


def swav_shapes(K: int = 3000) -> dict[str, tuple[int, ...]]:
    """swav_800ep_pretrain.pth.tar: a ResNet-50 with torchvision's names, head 2048-2048-128 with BatchNorm, prototypes."""
    with torch.device("meta"):
        trunk = torchvision.models.resnet50().state_dict()
    shapes = {key: tuple(value.shape) for key, value in trunk.items() if not key.startswith("fc.")}
    shapes |= {**projection_shapes("projection_head", (2048, 2048, 128), True), "prototypes.weight": (K, 128)}
    return {f"module.{key}": shape for key, shape in shapes.items()}


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    whole = {key: torch.long for key in shapes if key.endswith("num_batches_tracked")}
    return {key: torch.empty(shape, dtype=whole.get(key, torch.float32), device="meta") for key, shape in shapes.items()}


def generated(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors through which a signal neither dies nor grows: weights by their fan-in, variances and scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif len(shape) > 1:
            state[key] = torch.randn(shape, generator=generator) * (2 / (torch.Size(shape).numel() / shape[0])) ** 0.5
        elif key.endswith("running_var") or (key.endswith("weight") and key.replace("weight", "running_var") in shapes):
            state[key] = 0.5 + torch.rand(shape, generator=generator)
        else:
            state[key] = 0.1 * torch.randn(shape, generator=generator)
    return state


def vissl(trunk, heads) -> dict:
    """As VISSL saves it, with the numbers that stand beside the model."""
    base = {"model": {"trunk": trunk, "heads": heads}, "meta": {"trunk": {}, "heads": []}}
    return {"phase_idx": 0, "iteration": 244000, "classy_state_dict": {"train": True, "base_model": base}, "type": "consolidated"}
