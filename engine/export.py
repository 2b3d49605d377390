"""How does a run's network become one safetensors file that timm loads strictly?"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fuseer.engine.config import TrainConfig
from fuseer.engine.evaluate.finetune import WEIGHTS, Classifier
from fuseer.engine.evaluate.frozen import load_pretrained
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.models.regnet import NAMED as REGNETS
from fuseer.engine.models.regnet import SE_RATIO, AnyNet, to_timm
from fuseer.engine.models.vit import NAMED as VITS
from fuseer.engine.models.vit import OPTIONS as VIT_OPTIONS
from fuseer.engine.models.vit import ViT
from fuseer.engine.recipes.recipe import saved_config

# what timm calls the numbers of a RegNet; it has no name for a stride of the stem or of a stage
REGNET_OPTIONS = {"depth": "depth", "w0": "w0", "wa": "wa", "wm": "wm", "group_width": "group_size", "stem_width": "stem_width"} | {
    "bottleneck_ratio": "bottle_ratio", "se_ratio": "se_ratio"
}
POOLING = {"token": {}, "mean": {"global_pool": "avg", "fc_norm": False}, "fc_norm": {"global_pool": "avg"}}


class TimmForm(NamedTuple):
    """The arguments of timm.create_model, None where timm can build no such network, and the weights under timm's keys."""

    name: str | None
    options: dict[str, Any]
    state: dict[str, Tensor]

    @property
    def call(self) -> str:
        given = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"timm.create_model({self.name!r}{given})" if self.name else "none"


def export(run: Path, out: Path, *, finetuned: bool = False, image_size: int = 0) -> dict:
    """Writes the run's newest backbone, or with `finetuned` what `fuseer eval finetune` made of it with its classifier, to the file `out`.

    float32, keys and shapes as in timm; the header names the timm.create_model call whose model takes the file with strict=True. That is
    tried before anything is written, and the features of one random image are compared. A ViT's computed positions fill timm's pos_embed,
    for images of `image_size` (0: as the run's). Returns {model, keys, difference}: the largest difference of features over the largest
    feature, None where timm has no such model (RegNets of free widths or other strides): the keys are timm's all the same.
    Raises ValueError where the run has no such weights, `out` exists or does not end in .safetensors, or timm's network computes others.
    """
    config = saved_config(run)
    if out.suffix != ".safetensors" or out.exists():
        raise ValueError(f"export: out={out} {'exists' if out.exists() else 'must end in .safetensors'}; name a new file, x.safetensors")
    model = _finetuned(run, config) if finetuned else nn.Module()
    if not finetuned:
        model.backbone = initial_backbone(config)
        load_pretrained(run, model.backbone)
    model.eval()
    size = image_size or _image_size(config)
    form = timm_form(config, model.backbone, size, head=model.head if finetuned else None)
    difference = _difference(form, model, size) if form.name else None
    header = {"format": "pt", "timm": form.call, "timm_model": form.name or "", "timm_options": json.dumps(form.options)}
    part = out.with_name(f"{out.name}.part")
    save_file({key: tensor.detach().contiguous().clone() for key, tensor in form.state.items()}, part, metadata=header)
    part.rename(out)
    return {"model": form.call, "keys": len(form.state), "difference": difference}


def timm_form(config: TrainConfig, backbone: nn.Module, size: int, head: nn.Linear | None = None) -> TimmForm:
    """A backbone, with the classifier `head` or none, as timm knows it; see `TimmForm`."""
    options: dict[str, Any] = {"num_classes": 0 if head is None else head.out_features}
    given = config.model.options
    if isinstance(backbone, ViT):
        name, fixed = VITS[config.model.name]
        own = {key: value for key, value in given.items() if key in VIT_OPTIONS and key not in ("img_size", "drop_path_rate")}
        options |= {**fixed, **own, **POOLING[backbone.pool], "img_size": size}
        state = dict(backbone.model.state_dict())
        rows, columns = (size // side for side in backbone.patch)
        token = torch.zeros(1, backbone.width) if backbone.model.pos_embed is None else backbone.model.pos_embed[0, :1]
        state["pos_embed"] = torch.cat([token, backbone.positions(rows, columns)])[None]
        classifier = "head"
    elif isinstance(backbone, AnyNet):
        # timm's RegNets have four stages and stride 2 everywhere
        plain = len(backbone.stages) == 4 and given.get("stem_stride", 2) == given.get("strides", 2) == 2
        name = timm_regnet(config.model.name) if plain else None
        if name:
            own = {"group_width": REGNETS[config.model.name][-1]} if config.model.name.endswith("_friendly") else {}
            options |= {REGNET_OPTIONS[key]: value for key, value in {**own, **given}.items() if key in REGNET_OPTIONS}
        state, classifier = to_timm(backbone.state_dict()), "head.fc"
    else:
        name, options = config.model.name, {**given, **options}
        options.pop("drop_path_rate", None)
        state, classifier = dict(backbone.model.state_dict()), backbone.model.default_cfg["classifier"]
    if head is not None:
        state |= {f"{classifier}.{key}": value for key, value in head.state_dict().items()}
    return TimmForm(name, options, state)


def timm_regnet(name: str) -> str | None:
    """regnety_3_2gf → regnety_032, as timm counts in 0.1 GF; "regnet" → one whose numbers are all replaced; None for what timm lacks."""
    if name == "regnet":
        return "regnetx_002"
    kind, _, size = name.removesuffix("_friendly").partition("_")
    if name not in REGNETS or size == "10b" or kind not in SE_RATIO:
        return None
    tenths = float(size[:-2].replace("_", ".")) * (10 if size.endswith("gf") else 0.01)
    return f"{kind}_{round(tenths):03d}"


def _finetuned(run: Path, config: TrainConfig) -> Classifier:
    path = run / "eval" / WEIGHTS
    if not path.is_file():
        raise ValueError(f"export: {run} holds no fine-tuned weights; run fuseer eval finetune run={run} first")
    state = load_file(path)
    model = Classifier(initial_backbone(config), len(state["head.bias"]), config.seed)
    model.load_state_dict(state)
    return model


def _image_size(config: TrainConfig) -> int:
    views = getattr(config.method, "views", ())
    return config.model.options.get("img_size") or config.knn.image_size or (views[0].size if views else 224)


@torch.no_grad()
def _difference(form: TimmForm, model: nn.Module, size: int) -> float:
    """max|timm's output - ours| / max|ours| on one random image; RuntimeError of torch where a key or a shape is not timm's."""
    import timm

    theirs = timm.create_model(form.name, **form.options).eval()
    theirs.load_state_dict(form.state, strict=True)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    ours = model(image) if isinstance(model, Classifier) else model.backbone(image)
    difference = ((theirs(image) - ours).abs().max() / ours.abs().max()).item()
    if not difference < 1e-3:
        raise ValueError(
            f"export: {form.call} takes these weights, but its features differ from the run's by {difference:.2g} of the largest: an "
            "option of the model means something else there; nothing was written"
        )
    return difference
