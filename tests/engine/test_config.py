"""Are settings frozen, checked, and refused in words?"""

import json

import pytest

from fuseer.engine.config import apply_overrides
from fuseer.engine.recipes.recipe import load_recipe, recipe_names, saved_config


@pytest.fixture
def config():
    return load_recipe("tiny_swav").config()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_and_survives_a_round_trip(name, tmp_path):
    config = load_recipe(name).config()
    assert config.recipe == name
    assert load_recipe(name).__doc__.count("\n") >= 4, "the docstring gives the command and the expected result"
    (tmp_path / "config.json").write_text(config.to_json())
    assert saved_config(tmp_path) == config


def test_overrides_reach_every_depth(config):
    given = {"seed": "7", "method.temperature": "0.2", "model.options.stem_stride": "2", "optim.betas": "[0.8, 0.9]", "data.path": "/x/y"}
    changed = apply_overrides(config, given)
    assert (changed.seed, changed.method.temperature, changed.model.options["stem_stride"]) == (7, 0.2, 2)
    assert changed.optim.betas == (0.8, 0.9) and changed.data.path == "/x/y"
    assert type(changed.method) is type(config.method) and config.seed == 0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("method.prototype", "9", "unknown key method.prototype; did you mean prototypes?"),
        ("bach_size", "9", "unknown key bach_size; did you mean batch_size?"),
        ("batch_size.x", "9", "batch_size has no settings below it"),
        ("batch_size", "many", "batch_size: .*got 'many'"),
        ("method.prototypes", "0", "method.prototypes: .*greater than or equal to 1.*got 0"),
        ("method.epsilon", "0", "method.epsilon"),
        ("optim.name", "lars", "optim.name: .*'larc', 'sgd' or 'adamw'"),
        ("precision", "fp8", "precision"),
        ("steps", "0", "exactly one of steps and epochs"),
        ("zero_stage", "3", "zero_stage: .*less than or equal to 2.*got 3"),
    ],
)
def test_mistakes_are_named(config, key, value, words):
    with pytest.raises(ValueError, match=words):
        apply_overrides(config, {key: value})


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean tiny_swav"):
        load_recipe("tiny_swaf")


def test_json_is_plain(config):
    assert json.loads(config.to_json())["method"]["prototypes"] == config.method.prototypes
