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
        ("optim.name", "larc", "optim.name: .*'lars', 'sgd' or 'adamw'"),
        ("optim.variant", "lamb", "optim.variant: .*'larc', 'mocov3', 'simclr', 'byol' or 'paws'"),
        ("precision", "fp8", "precision"),
        ("optim.schedule", "linear", "optim.schedule: .*'cosine', 'step' or 'constant'"),
        ("optim.schedule", "step", "one of milestones_steps and milestones_epochs.*got schedule=step and no milestones"),
        ("optim.milestones_epochs", "[120, 160]", "and constant with neither; got schedule=cosine and milestones_epochs=.120.0, 160.0"),
        ("optim.variant", "mocov3", "variant=mocov3 is one of name=lars; adamw has none"),
        ("steps", "0", "exactly one of steps and epochs"),
        ("zero_stage", "4", "zero_stage: .*less than or equal to 3.*got 4"),
    ],
)
def test_mistakes_are_named(config, key, value, words):
    with pytest.raises(ValueError, match=words):
        apply_overrides(config, {key: value})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "constant", "milestones_steps": "[5]"}, "constant with neither; got schedule=constant and milestones_steps=.5."),
        ({"schedule": "constant", "per_epoch": "true"}, "schedule=constant has none: leave per_epoch out"),
        ({"milestones_steps": "[5]", "milestones_epochs": "[5]"}, "one of .*milestones_steps=.5. and milestones_epochs=.5.0."),
        ({"milestones_steps": "[5, 5]"}, "milestones_steps must rise from above 0; got .5, 5"),
        ({"milestones_epochs": "[0, 1]"}, "milestones_epochs must rise from above 0; got .0.0, 1.0"),
        ({"milestones_epochs": "[1, 2]", "per_epoch": "true"}, "per_epoch=true .*leave per_epoch out"),
        ({"milestones_epochs": "[1, 2]", "milestone_factor": "0"}, "milestone_factor: .*greater than 0"),
    ],
)
def test_schedules_that_contradict_themselves_are_refused(config, options, words):
    with pytest.raises(ValueError, match=words):
        apply_overrides(config, {"optim.schedule": "step", **{f"optim.{key}": value for key, value in options.items()}})


def test_published_schedules_are_accepted(config):
    v1 = apply_overrides(config, {"optim.schedule": "step", "optim.milestones_epochs": "[120, 160]", "optim.name": "sgd"})
    assert v1.optim.milestones_epochs == (120, 160) and v1.optim.milestone_factor == 0.1
    v2 = apply_overrides(config, {"optim.per_epoch": "true", "optim.name": "sgd"})
    assert v2.optim.per_epoch and v2.optim.schedule == "cosine"


@pytest.mark.parametrize(("name", "by_itself"), [("sgd", True), ("adamw", False)])
def test_thin_parameters_decay_as_published_unless_told(config, name, by_itself):
    chosen = apply_overrides(config, {"optim.name": name}).optim
    assert chosen.decays_thin is by_itself
    assert apply_overrides(config, {"optim.name": name, "optim.decay_thin": str(not by_itself)}).optim.decays_thin is not by_itself


@pytest.mark.parametrize("told", ["true", "false"])
def test_what_lars_decays_goes_with_its_variant(config, told):
    assert apply_overrides(config, {"optim.name": "lars", "zero_stage": "3"}).optim.variant == "larc"
    with pytest.raises(ValueError, match="decay_thin=.* is for sgd and adamw; what lars decays goes with its variant"):
        apply_overrides(config, {"optim.name": "lars", "optim.variant": "byol", "optim.decay_thin": told})


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean tiny_swav"):
        load_recipe("tiny_swaf")


def test_json_is_plain(config):
    assert json.loads(config.to_json())["method"]["prototypes"] == config.method.prototypes
