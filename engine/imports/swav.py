"""How do SwAV's and VISSL's checkpoints, SEER's among them, become run folders with trunk, head and prototypes?"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fuseer.engine.config import TrainConfig, apply_overrides
from fuseer.engine.export import timm_form
from fuseer.engine.imports.official import read_file, refuse_misfits, refuse_used, tensors_of, write_run
from fuseer.engine.methods.method import Ground
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.models.regnet import NAMED, named_stages, stages_of
from fuseer.engine.recipes.recipe import load_recipe, recipe_names

# ClassyVision's names inside a block: ours
BLOCK = {
    "proj": "shortcut.conv",
    "bn": "shortcut.bn",
    "f.a.0": "conv1.conv",
    "f.a.1": "conv1.bn",
    "f.b.0": "conv2.conv",
    "f.b.1": "conv2.bn",
    "f.se.excitation.0": "se.fc1",
    "f.se.excitation.2": "se.fc2",
    "f.c": "conv3.conv",
    "f.final_bn": "conv3.bn",
}
STEM = {"_feature_blocks.conv1.stem.0": "stem.conv", "_feature_blocks.conv1.stem.1": "stem.bn"}
# 10B's blocks stand in parts, one for each chunk that was recomputed
IN_BLOCK = re.compile(r"_feature_blocks\.res(\d+)\.(?:block\d+-part\d+\.)?block\d+-(\d+)\.(.+)")
CLASSY_256GF = [640, 1696, 2544, 5088]
BGR = ("regnety_64gf", "regnety_128gf")


class Parts(NamedTuple):
    """What a file holds: tensors of the backbone under our keys, those of the head by layer, prototypes [K, D], a classifier, remarks."""

    recipe: str
    name: str
    options: dict[str, Any]
    trunk: dict[str, Tensor]
    head: dict[str, Tensor]
    prototypes: Tensor | None
    classifier: dict[str, Tensor]
    remarks: tuple[str, ...] = ()


def import_swav(file: Path, out: Path, *, data: str | None = None) -> dict:
    """Makes a run folder `out` of an official SwAV ResNet-50: trunk, projection head and prototypes.

    `file` is a torch file of {key: tensor}, of {"state_dict": …} as training left it, or a .safetensors. Keys, with `module.` before them
    or without: conv1, bn1, layer1 … 4 as torchvision's, projection_head.{0,1,3}.*, prototypes.weight. Its stem pads in two steps, 1 and 2,
    which is the 3 of torchvision's and timm's. `data` is the folder that evaluations of the run will read.
    Returns {kind, model, difference, classes, remarks}: the largest difference from timm's features over the largest feature, classes of
    a classifier that was kept, sentences for the user.
    Raises ValueError where keys are missing or strange or shapes differ (wider ResNets), and where `out` already holds something.
    Source: facebookresearch/swav src/resnet50.py, hubconf.py.
    """
    refuse_used(out)
    return _import(swav_parts(read_file(file), file), file, out, data)


def import_seer(file: Path, out: Path, *, data: str | None = None, bgr: bool = False) -> dict:
    """Makes a run folder `out` of a VISSL file: SEER's or another RegNet's, or a ResNet-50's, pretrained with SwAV or fine-tuned.

    `file` is a torch file of classy_state_dict.base_model.model.{trunk, heads}, or of {trunk, heads} alone. Keys: trunk
    _feature_blocks.conv1.stem.*, .res{2…5}.[block1-part0.]block1-0.*, heads 0.projection_head.*, 0.prototypes0.weight, and 0.clf.0.* of a
    classifier, which goes where fine-tuning leaves its own. Which network it is, is read from the shapes; one that no name has becomes an
    "anynet". `bgr` turns the stem's input channels round, for networks trained on blue, green, red. `data` as for `import_swav`.
    Returns what `import_swav` does; difference is None where timm has no such network.
    Raises ValueError as `import_swav` does, for ClassyVision's regnet_y_256gf, and for a checkpoint in shards or slices.
    Source: facebookresearch/vissl vissl/models/trunks/{regnet,regnet_fsdp,resnext}.py, heads/{swav_prototypes_head,mlp}.py;
    facebookresearch/ClassyVision classy_vision/models/anynet.py.
    """
    refuse_used(out)
    return _import(vissl_parts(read_file(file), file, bgr), file, out, data)


def swav_parts(found: dict, file: Path) -> Parts:
    """The parts of what an official SwAV file holds."""
    state = {key.removeprefix("module."): value for key, value in tensors_of(found, file, "state_dict").items()}
    if len(of := [key for key in state if key.startswith("prototypes.")]) > 1:
        raise ValueError(f"import: {file} holds {len(of)} sets of prototypes ({', '.join(of)}), as DeepCluster-v2 does; SwAV has one")
    trunk = {f"model.{key}": value for key, value in state.items() if not key.startswith(("projection_head.", "prototypes."))}
    if "model.layer1.0.conv1.weight" not in trunk:
        raise ValueError(f"import: layer1.0.conv1.weight is missing, so this is no SwAV file; it holds {_some(state)}")
    return Parts("swav_rn50", "resnet50", {}, trunk, _under("projection_head.", state), state.get("prototypes.weight"), {})


def vissl_parts(found: dict, file: Path, bgr: bool = False) -> Parts:
    """The parts of what a VISSL file holds, its trunk's input turned round with `bgr`."""
    trunk, heads = _vissl(found, file)
    trunk = {_our_key(key): value for key, value in trunk.items()}
    if "_feature_blocks.layer1.0.conv1.weight" in trunk:
        recipe, name, options = "swav_rn50", "resnet50", {}
        trunk = {f"model.{key.removeprefix('_feature_blocks.')}": value for key, value in trunk.items()}
    else:
        recipe, name, options = _regnet(trunk, file)
    if bgr:
        stem = "model.conv1.weight" if name == "resnet50" else "stem.conv.weight"
        trunk[stem] = trunk[stem].flip(1)
    classifier = {f"head.{key}": value for key, value in _under("0.clf.0.", heads).items()}
    head, prototypes = _under("0.projection_head.", heads), heads.get("0.prototypes0.weight")
    other = [key for key in heads if not key.startswith(("0.projection_head.", "0.prototypes0.", "0.clf.0."))]
    remarks = [f"left out, as no network here has it: {_some(other)}"] if other else []
    if name in BGR and not head and not bgr:
        remarks.append(
            f"VISSL's supervised {name} was trained on blue, green, red, SEER's on RGB; bgr=true if this is it, for no tensor tells"
        )
    return Parts(recipe, name, options, trunk, head, prototypes, classifier, tuple(remarks))


def _vissl(found: dict, file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trunk and heads of a VISSL checkpoint."""
    if (kind := found.get("type", "consolidated")) != "consolidated":
        raise ValueError(f"import: {file} is a checkpoint in pieces (type {kind}); consolidate it with VISSL first, or take the _conso one")
    for name in ("classy_state_dict", "base_model", "model"):
        found = found[name] if isinstance(found.get(name), dict) else found
    if not isinstance(found.get("trunk"), dict):
        raise ValueError(f"import: {file} must hold classy_state_dict.base_model.model.trunk, as VISSL's do; it holds {_some(found)}")
    trunk = {key.removeprefix("base_model."): value for key, value in tensors_of(found["trunk"], file).items()}
    return trunk, tensors_of(found["heads"], file) if found.get("heads") else {}


def _our_key(key: str) -> str:
    """_feature_blocks.res3.block2-0.f.a.0.weight → stages.1.0.conv1.conv.weight; keys that no RegNet has as they are."""
    layer, _, tensor = key.rpartition(".")
    if layer in STEM:
        return f"{STEM[layer]}.{tensor}"
    at = IN_BLOCK.fullmatch(layer)
    return f"stages.{int(at[1]) - 2}.{at[2]}.{BLOCK[at[3]]}.{tensor}" if at and at[3] in BLOCK else key


def _regnet(trunk: Mapping[str, Tensor], file: Path) -> tuple[str, str, dict[str, Any]]:
    """(recipe, model name, its options) of the RegNet that the shapes tell."""
    stages = stages_of(trunk)
    if not stages or "stem.conv.weight" not in trunk:
        raise ValueError(f"import: {file} holds neither a RegNet's trunk nor a ResNet's; its keys are {_some(trunk)}")
    widths = [stage.width for stage in stages]
    if widths == CLASSY_256GF:
        raise ValueError(
            f"import: {file} holds ClassyVision's own regnet_y_256gf (stages {widths} wide), which is not SEER's RegNetY-256GF "
            f"({[stage.width for stage in named_stages('regnety_256gf')]}) and no network of ours; take the file of the one you mean"
        )
    stem = {"stem_width": len(trunk["stem.conv.weight"])} if len(trunk["stem.conv.weight"]) != 32 else {}
    for name in NAMED:
        if not name.endswith("_friendly") and named_stages(name) == stages:
            return f"seer_{name}" if f"seer_{name}" in recipe_names() else "seer_regnety_32gf", name, stem
    columns = {"depths": "depth", "widths": "width", "group_widths": "group_width", "bottleneck_ratios": "bottleneck_ratio"}
    options = {key: [getattr(stage, field) for stage in stages] for key, field in columns.items()}
    return "seer_regnety_32gf", "anynet", {**options, "se_ratios": stages[0].se_ratio, **stem}


def _import(parts: Parts, file: Path, out: Path, data: str | None) -> dict:
    config = config_of(parts, data)
    weights, backbone = fitted(parts, config, file)
    difference = _difference(weights, backbone, config)
    if difference is not None and not difference < 1e-4:
        raise ValueError(f"import: features differ from those of timm with the same tensors by {difference:.2g} of the largest")
    classifier = {key: value.float() for key, value in parts.classifier.items()}
    write_run(out, file, config, weights, classifier)
    kind = "fine-tuned" if classifier else "a trunk alone"
    if parts.prototypes is not None:
        kind = f"pretrained, with head and {len(parts.prototypes)} prototypes"
    classes = len(classifier.get("head.bias", ()))
    return {"kind": kind, "model": _shown(parts), "difference": difference, "classes": classes, "remarks": list(parts.remarks)}


def fitted(parts: Parts, config: TrainConfig, file: Path) -> tuple[dict[str, Tensor], nn.Module]:
    """The method's tensors in float32 and its backbone on device meta. ValueError where they are not those that the method wants."""
    with torch.device("meta"):
        backbone = initial_backbone(config)
        method = config.method.build(Ground(backbone, None, None, 0, 1, 1))
    weights = {f"backbone.{key}": value for key, value in parts.trunk.items()}
    weights |= {f"head.layers.{key}": value for key, value in parts.head.items()}
    if parts.prototypes is not None:
        # SwAV saves them as the update left them and divides rows by their length before the next forward; VISSL does so at once
        weights["prototypes.weight"] = F.normalize(parts.prototypes.float(), dim=1)
    weights = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    whole = bool(parts.head) or parts.prototypes is not None
    wanted = {key: value for key, value in method.state_dict().items() if key.startswith("backbone.") or (whole and key != "queue")}
    for key in wanted.keys() - weights.keys():
        # how many batches were seen changes nothing where momentum is fixed
        if key.endswith(".num_batches_tracked"):
            weights[key] = torch.zeros((), dtype=torch.long)
    refuse_misfits(f"{file} as {parts.name}", weights, wanted)
    if parts.classifier:
        classes = len(parts.classifier.get("head.bias", ()))
        of = {"head.weight": torch.empty(classes, backbone.width), "head.bias": torch.empty(classes)}
        refuse_misfits("the classifier", parts.classifier, of)
    return weights, backbone


def config_of(parts: Parts, data: str | None) -> TrainConfig:
    """The settings of a run with that network and head: those of its recipe, with what the file has otherwise."""
    # SEER was fine-tuned at 384 px
    size = "384" if parts.classifier else "224"
    overrides = {"model.name": parts.name, "model.options": json.dumps(parts.options), "knn.image_size": size}
    if data is not None:
        overrides["data.path"] = data
    linear = sorted(int(key.split(".")[0]) for key, value in parts.head.items() if value.dim() == 2)
    if linear:
        widths = [len(parts.head[f"{layer}.weight"]) for layer in linear]
        normed = any(key.endswith("running_mean") for key in parts.head)
        overrides |= {"method.hidden_widths": json.dumps(widths[:-1]), "method.embedding_width": str(widths[-1])}
        overrides["method.head_batch_norm"] = json.dumps(normed)
    if parts.prototypes is not None:
        overrides["method.prototypes"] = str(len(parts.prototypes))
    return apply_overrides(load_recipe(parts.recipe).config(), overrides)


@torch.no_grad()
def _difference(weights: Mapping[str, Tensor], backbone: nn.Module, config: TrainConfig) -> float | None:
    """max|timm's features - ours| / max|ours| of one random image of 64 px; None where timm has no such network.

    Both networks hold the very tensors of the file, so that 256GF takes no second 5 GB.
    """
    import timm

    backbone.load_state_dict(_under("backbone.", weights), assign=True)
    form = timm_form(config, backbone, 64)
    if form.name is None:
        return None
    with torch.device("meta"):
        theirs = timm.create_model(form.name, **form.options)
    theirs.load_state_dict(form.state, strict=True, assign=True)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = backbone.eval()(image)
    return ((theirs.eval()(image) - ours).abs().max() / ours.abs().max()).item()


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _some(state: Mapping) -> str:
    return ", ".join(map(str, list(state)[:5])) + (", …" if len(state) > 5 else "")


def _shown(parts: Parts) -> str:
    widths = parts.options.get("widths")
    return f"{parts.name} of stages {widths} wide, which no published network has" if widths else parts.name
