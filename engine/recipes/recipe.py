"""How is a recipe found by its name, and a run's settings read back?"""

import importlib
import json
import pkgutil
from pathlib import Path
from types import ModuleType

from fuseer.engine import recipes
from fuseer.engine.config import TrainConfig, nearest


def recipe_names() -> list[str]:
    """Every file of this folder but this one; a recipe's docstring gives its command and expected result, `config()` its settings."""
    return sorted(module.name for module in pkgutil.iter_modules(recipes.__path__) if module.name != "recipe")


def load_recipe(name: str) -> ModuleType:
    """The recipe's module. Raises ValueError naming the nearest recipe."""
    if name not in recipe_names():
        raise ValueError(f"recipe: there is no {name}{nearest(name, recipe_names())}")
    return importlib.import_module(f"fuseer.engine.recipes.{name}")


def saved_config(run: Path) -> TrainConfig:
    """The settings of the run in folder `run`. Raises ValueError where there is none."""
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"run={run} holds no config.json; name the folder that pretraining wrote")
    tree = json.loads(path.read_text())
    method = type(load_recipe(tree["recipe"]).config().method)
    return TrainConfig(**{**tree, "method": method(**tree["method"])})
