"""How is an official checkpoint read without executing it, and what does the run folder made of it hold?"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fuseer.engine import checkpoint
from fuseer.engine.config import TrainConfig
from fuseer.engine.evaluate.finetune import WEIGHTS

# bytes that are no pickle at all fail wherever the unpickler happens to be
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, SafetensorError)


def refuse_used(out: Path) -> None:
    """ValueError where `out` already holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"import: out={out} already holds something; name a new folder")


def read_file(file: Path) -> dict:
    """What a .safetensors or torch file holds: tensors under their keys, or dictionaries of dictionaries of them.

    Nothing is executed: a torch file is read with weights_only=True, and mapped rather than copied where its format allows.
    Raises ValueError for a file that is absent, damaged or holds objects of other classes, which are named.
    """
    if not file.is_file():
        raise ValueError(f"import: file={file} is not there; name the .pth, .torch or .safetensors file")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # official training scripts save their arguments beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UNREADABLE as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it also holds objects of {foreign[1]}); where its code may run, save" if foreign else "damaged, or of another format); save"
        raise ValueError(f"import: {file} cannot be read as tensors alone ({why} the dictionaries of tensors anew") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"import: {file} must hold {{key: tensor}}; got {type(found).__name__} of other things")
    return found


def tensors_of(found: Mapping, file: Path, *names: str) -> dict[str, Tensor]:
    """{key: tensor} of `found`, or of what stands there under the first of `names` that it has. ValueError where it is anything else."""
    state = next((found[name] for name in names if name in found), found)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        wanted = " or ".join(f"{{'{name}': {{key: tensor}}}}" for name in names)
        raise ValueError(f"import: {file} must hold {wanted or '{key: tensor}'}; got {type(state).__name__} of other things")
    return dict(state)


def misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """In words: the keys that are missing, the keys that are strange, the shapes that differ."""
    wrong = [f"{key} is missing" for key in sorted(wanted.keys() - found.keys())]
    wrong += [f"{key} {list(found[key].shape)} is strange here" for key in sorted(found.keys() - wanted.keys())]
    both = sorted(found.keys() & wanted.keys())
    return wrong + [
        f"{key} is {list(found[key].shape)}, wanted {list(wanted[key].shape)}" for key in both if found[key].shape != wanted[key].shape
    ]


def refuse_misfits(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError that names the first eight `misfits`."""
    if wrong := misfits(found, wanted):
        raise ValueError(f"import: {what} is of another network: {'; '.join(wrong[:8])}{', …' if len(wrong) > 8 else ''}")


def write_run(out: Path, file: Path, config: TrainConfig, weights: dict[str, Tensor], classifier: Mapping[str, Tensor]) -> None:
    """Writes a run folder with `weights` as its checkpoint 0, and with a `classifier` (head.weight, head.bias) what fine-tuning leaves."""
    checkpoint.save_weights(out / "ckpt", weights, {"imported": str(file)})
    (out / "config.json").write_text(config.to_json())
    (out / "metrics.jsonl").write_text(json.dumps({"kind": "import", "step": 0, "file": str(file)}) + "\n")
    if classifier:
        (out / "eval").mkdir()
        backbone = {key: value for key, value in weights.items() if key.startswith("backbone.")}
        save_file({**backbone, **classifier}, out / "eval" / WEIGHTS)
