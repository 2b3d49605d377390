"""Do SwAV's and SEER's files become runs with the same features, head and prototypes, and are others refused in words?"""

import argparse
import collections
import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models import regnet as timm_regnet
from torch.nn import functional as F

from fuseer.engine import checkpoint, distributed
from fuseer.engine.cli import main
from fuseer.engine.config import apply_overrides
from fuseer.engine.imports.official import read_file
from fuseer.engine.imports.swav import config_of, fitted, import_seer, swav_parts, vissl_parts
from fuseer.engine.methods.method import Ground
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.models.regnet import NAMED, named_stages, regnet_stages
from fuseer.engine.recipes.recipe import load_recipe, saved_config
from fuseer.engine.run import begin_from
from fuseer.engine.train import train
from tests.engine.published_swav import (
    PARTS_OF_10B,
    SEER,
    SMALL,
    generated,
    heads_shapes,
    on_meta,
    swav_shapes,
    trunk_shapes,
    vissl,
)

DIMS = (368, 48, 24, 16)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def whole(run):
    """The method of a run folder with its imported weights, all of them, in evaluation mode."""
    config = saved_config(run)
    method = config.method.build(Ground(initial_backbone(config), None, None, 0, 1, 1))
    state = checkpoint.read(checkpoint.latest(run / "ckpt"), checkpoint.MODEL)
    missing, strange = method.load_state_dict(state, strict=False)
    assert missing == ["queue"] and not strange
    return method.eval()


def whole_backbone(run):
    backbone = initial_backbone(saved_config(run))
    checkpoint.load_weights(checkpoint.latest(run / "ckpt"), backbone, prefix="backbone.")
    return backbone.eval()


def projected(features, head, *, normed: bool):
    """Linear - (BatchNorm) - ReLU - Linear - (BatchNorm) - ReLU - Linear - normalise of the official tensors, operation by operation."""
    z, step = features, 3 if normed else 2
    for layer in (0, step, 2 * step):
        z = F.linear(z, head[f"{layer}.weight"], head[f"{layer}.bias"])
        if layer == 2 * step:
            break
        if normed:
            norm = [head[f"{layer + 1}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
            z = F.batch_norm(z, *norm, training=False, eps=1e-5)
        z = z.relu()
    return F.normalize(z, dim=1)


def under(prefix, state):
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


@pytest.fixture(scope="module")
def seer(tmp_path_factory):
    """(trunk, heads, file) with the keys of SEER's small files, a RegNetY-200MF as timm and the papers know it."""
    trunk, heads = generated(trunk_shapes(*SMALL)), generated(heads_shapes(DIMS, True, K=40), seed=1)
    file = tmp_path_factory.mktemp("seer") / "small.torch"
    torch.save(vissl(trunk, heads), file)
    return trunk, heads, file


def of_timm(found) -> torch.nn.Module:
    """timm's RegNetY-200MF with a VISSL file, as timm itself reads these."""
    model = timm.create_model("regnety_002", num_classes=0).eval()
    model.load_state_dict(timm_regnet._filter_fn(found), strict=True)
    return model


@pytest.mark.parametrize("name", SEER)
def test_full_size_files_are_found_out_and_fill_the_published_recipe(name, tmp_path):
    depths, widths, group_width, hidden, normed = SEER[name]
    ends = PARTS_OF_10B if name == "regnety_10b" else None
    heads = heads_shapes((widths[-1], *hidden), normed)
    found = vissl(on_meta(trunk_shapes(depths, widths, group_width, ends=ends)), on_meta(heads))
    parts = vissl_parts(found, tmp_path / "official.torch")
    recipe = load_recipe(f"seer_{name}").config()
    assert (parts.recipe, parts.name, parts.options, parts.remarks) == (recipe.recipe, name, {}, ())
    config = config_of(parts, None)
    assert config.method == recipe.method and config.model.name == recipe.model.name
    fitted(parts, config, tmp_path)
    trunk_alone = vissl_parts(vissl(found["classy_state_dict"]["base_model"]["model"]["trunk"], {}), tmp_path / "official.torch")
    assert bool(trunk_alone.remarks) == (name in ("regnety_64gf", "regnety_128gf"))
    fitted(trunk_alone, config_of(trunk_alone, None), tmp_path)


@pytest.mark.parametrize("normed", [True, False])
def test_features_embeddings_and_scores_are_those_of_the_file(seer, normed, tmp_path):
    trunk, heads, _ = seer
    heads = heads if normed else generated(heads_shapes(DIMS, False, K=40), seed=1)
    torch.save(vissl(trunk, heads), tmp_path / "a.torch")
    found = import_seer(tmp_path / "a.torch", tmp_path / "run")
    assert found["kind"] == "pretrained, with head and 40 prototypes" and found["model"] == "regnety_200mf" and found["difference"] < 1e-5
    method = whole(tmp_path / "run")
    with torch.no_grad():
        expected = of_timm(vissl(trunk, heads))(IMAGES)
        features = method.backbone(IMAGES)
        assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()
        embeddings = projected(expected, under("0.projection_head.", heads), normed=normed)
        torch.testing.assert_close(method.head(features), embeddings, rtol=1e-4, atol=1e-5)
        scores = embeddings @ F.normalize(heads["0.prototypes0.weight"], dim=1).T
        torch.testing.assert_close(method.prototypes(embeddings), scores, rtol=1e-5, atol=1e-6)
    assert method.config.head_batch_norm == normed and method.config.hidden_widths == (48, 24)


def test_parts_of_recomputed_chunks_are_the_same_network(seer, tmp_path):
    trunk, heads, _ = seer
    ends = ((1,), (1,), (2, 4), (7,))
    renamed = dict(zip(trunk_shapes(*SMALL, ends=ends), trunk.values(), strict=True))
    assert sum("-part1." in key for key in renamed) > 0
    ours, theirs = (vissl_parts(vissl(state, heads), tmp_path).trunk for state in (renamed, trunk))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_input_of_blue_green_red_is_turned_round(tmp_path):
    torch.save(small(), tmp_path / "a.torch")
    for name in ("false", "true"):
        assert main(["import", "seer", f"file={tmp_path / 'a.torch'}", f"out={tmp_path / name}", f"bgr={name}"]) == 0
    with torch.no_grad():
        expected = whole_backbone(tmp_path / "false")(IMAGES.flip(1))
        assert (whole_backbone(tmp_path / "true")(IMAGES) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_fine_tuned_file_goes_out_as_timm_reads_it(seer, tmp_path):
    classifier = {"0.clf.0.weight": torch.randn(5, 368), "0.clf.0.bias": torch.randn(5)}
    found = vissl(seer[0], classifier)
    torch.save(found, tmp_path / "tuned.torch")
    said = import_seer(tmp_path / "tuned.torch", tmp_path / "run")
    assert (said["kind"], said["classes"]) == ("fine-tuned", 5) and saved_config(tmp_path / "run").knn.image_size == 384
    out = tmp_path / "out.safetensors"
    assert main(["export", f"run={tmp_path / 'run'}", f"out={out}", "finetuned=true"]) == 0
    expected, back = timm_regnet._filter_fn(found), load_file(out)
    assert back.keys() == expected.keys() and all(torch.equal(back[key], expected[key]) for key in back)
    assert json.loads(safe_open(out, "pt").metadata()["timm_options"])["num_classes"] == 5


def test_an_exported_trunk_is_the_file_as_timm_reads_it(seer, tmp_path, capsys):
    trunk, heads, file = seer
    run, out = tmp_path / "run", tmp_path / "out.safetensors"
    assert main(["import", "seer", f"file={file}", f"out={run}"]) == 0
    said = capsys.readouterr().out
    assert "pretrained, with head and 40 prototypes: regnety_200mf" in said and "features differ from timm's by" in said
    assert main(["export", f"run={run}", f"out={out}"]) == 0
    expected, back = timm_regnet._filter_fn(vissl(trunk, heads)), load_file(out)
    assert back.keys() == expected.keys() and all(torch.equal(back[key], expected[key]) for key in back)


def test_a_network_without_a_name_comes_in_by_its_widths_and_is_evaluated(small_images, tmp_path, capsys):
    shapes, run = trunk_shapes((1, 2), (16, 32), 8), tmp_path / "run"
    torch.save(vissl(generated(shapes), generated(heads_shapes((32, 16, 8), True, K=12))), tmp_path / "a.torch")
    assert main(["import", "seer", f"file={tmp_path / 'a.torch'}", f"out={run}", f"data={small_images}"]) == 0
    said = capsys.readouterr().out
    assert "anynet of stages [16, 32] wide, which no published network has" in said and "timm" not in said
    assert whole(run).backbone(IMAGES).shape == (2, 32)
    assert main(["eval", "knn", f"run={run}", "image_size=28"]) == 0 and "pretrained" in capsys.readouterr().out


def test_swavs_resnet_50_is_torchvisions_with_head_and_prototypes(tmp_path, capsys):
    state = generated(swav_shapes(K=30))
    file, run = tmp_path / "swav_800ep_pretrain.pth.tar", tmp_path / "run"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert main(["import", "swav", f"file={file}", f"out={run}"]) == 0
    assert "pretrained, with head and 30 prototypes: resnet50" in capsys.readouterr().out
    bare, method = under("module.", state), whole(run)
    theirs = torchvision.models.resnet50().eval()
    theirs.fc = torch.nn.Identity()
    missing, strange = theirs.load_state_dict(bare, strict=False)
    assert not missing and {key.split(".")[0] for key in strange} == {"projection_head", "prototypes"}
    with torch.no_grad():
        expected, ours = theirs(IMAGES), method.backbone(IMAGES)
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
        z = F.linear(expected, bare["projection_head.0.weight"], bare["projection_head.0.bias"])
        norm = [bare[f"projection_head.1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        z = F.linear(F.batch_norm(z, *norm).relu(), bare["projection_head.3.weight"], bare["projection_head.3.bias"])
        torch.testing.assert_close(method.head(ours), F.normalize(z, dim=1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(method.prototypes.weight, F.normalize(bare["prototypes.weight"], dim=1))
    # VISSL's file of the same network
    of_head = {key: value for key, value in bare.items() if key.startswith(("projection_head.", "prototypes."))}
    trunk = {f"_feature_blocks.{key}": value for key, value in bare.items() if key not in of_head}
    heads = {f"0.{key.replace('prototypes.', 'prototypes0.')}": value for key, value in of_head.items()}
    parts, official = vissl_parts(vissl(trunk, heads), file), swav_parts(state, file)
    assert parts.trunk.keys() == official.trunk.keys() and parts.head.keys() == official.head.keys()
    assert all(torch.equal(parts.trunk[key], official.trunk[key]) for key in parts.trunk) and parts.recipe == official.recipe == "swav_rn50"


def test_the_official_resnet_50_of_swav_fills_the_published_recipe(tmp_path):
    state = on_meta(swav_shapes())
    assert len(state) == 318 + 9 + 1, "torchvision's without fc, the head's, the prototypes'"
    parts = swav_parts({"epoch": 800, "state_dict": state}, tmp_path)
    config = config_of(parts, None)
    fitted(parts, config, tmp_path)
    assert config.method == load_recipe("swav_rn50").config().method


def changed(state, **tensors):
    return {key: value for key, value in {**state, **tensors}.items() if value is not None}


def small(**tensors):
    trunk = generated(trunk_shapes((1,), (16,), 8))
    return vissl(changed(trunk, **{f"_feature_blocks.{key}": value for key, value in tensors.items()}), {})


def classy_256():
    stages = regnet_stages(27, 640, 124.47, 2.04, 848, se_ratio=0.25)
    state = {f"_feature_blocks.res{i + 2}.block{i + 1}-0.f.c.weight": (s.width, s.width, 1, 1) for i, s in enumerate(stages)}
    state |= {f"_feature_blocks.res{i + 2}.block{i + 1}-0.f.b.0.weight": (s.width, s.group_width, 3, 3) for i, s in enumerate(stages)}
    return vissl(on_meta({**state, "_feature_blocks.conv1.stem.0.weight": (32, 3, 3, 3)}), {})


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (classy_256, r"ClassyVision's own regnet_y_256gf .*640, 1696, 2544, 5088.*not SEER's RegNetY-256GF .*746, 1492, 4103, 10444"),
        (lambda: small(**{"res2.block1-0.f.a.1.bias": None}), r"another network: backbone.stages.0.0.conv1.bn.bias is missing"),
        (lambda: small(extra=torch.zeros(3)), r"backbone._feature_blocks.extra \[3\] is strange here"),
        (lambda: small(**{"res2.block1-0.bn.bias": torch.zeros(9)}), r"backbone.stages.0.0.shortcut.bn.bias is \[9\], wanted \[16\]"),
        (lambda: small(**{"res2.block1-0.f.c.weight": None}), "neither a RegNet's trunk nor a ResNet's"),
        (lambda: {**small(), "type": "slice_list"}, "a checkpoint in pieces .type slice_list.; consolidate it"),
        (lambda: {"state_dict": {"a": torch.zeros(2)}}, "must hold classy_state_dict.base_model.model.trunk.*it holds state_dict"),
        (
            lambda: vissl(generated(trunk_shapes((1,), (16,), 8)), {"0.clf.0.weight": torch.zeros(5, 9), "0.clf.0.bias": torch.zeros(5)}),
            r"the classifier is of another network: head.weight is \[5, 9\], wanted \[5, 16\]",
        ),
        (
            lambda: vissl(generated(trunk_shapes((1,), (16,), 8)), {"0.prototypes0.weight": torch.zeros(5, 9)}),
            "head.layers.0.bias is missing",
        ),
    ],
)
def test_vissl_files_that_do_not_fit_are_refused_in_words(found, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        parts = vissl_parts(found(), tmp_path / "file.torch")
        fitted(parts, config_of(parts, None), tmp_path / "file.torch")


def test_swav_files_that_do_not_fit_are_refused_in_words(tmp_path):
    state = on_meta(swav_shapes())
    wide = {**state, "module.layer1.0.conv1.weight": torch.empty(128, 128, 1, 1, device="meta")}
    sets = {f"module.prototypes.prototypes{i}.weight": torch.zeros(3, 128) for i in (0, 1)}
    clusters = changed(state, **{"module.prototypes.weight": None}, **sets)
    for found, words in (
        (wide, r"backbone.model.layer1.0.conv1.weight is \[128, 128, 1, 1\], wanted \[64, 64, 1, 1\]"),
        (clusters, "2 sets of prototypes .*as DeepCluster-v2 does"),
        ({"a": torch.zeros(2)}, "layer1.0.conv1.weight is missing, so this is no SwAV file; it holds a"),
    ):
        with pytest.raises(ValueError, match=words):
            parts = swav_parts(found, tmp_path)
            fitted(parts, config_of(parts, None), tmp_path)


def test_heads_without_a_network_here_are_named_and_a_used_folder_is_refused(seer, tmp_path, capsys):
    trunk, _, _ = seer
    torch.save(vissl(trunk, {"0.channel_bn.weight": torch.zeros(368)}), tmp_path / "a.torch")
    for expected in (0, 2):
        assert main(["import", "seer", f"file={tmp_path / 'a.torch'}", f"out={tmp_path / 'run'}"]) == expected
    said = capsys.readouterr()
    assert "a trunk alone: regnety_200mf" in said.out and "left out, as no network here has it: 0.channel_bn.weight" in said.out
    assert "already holds something; name a new folder" in said.err


@pytest.fixture(scope="module", autouse=True)
def leave_the_world():
    yield
    distributed.stop()


@pytest.fixture
def start(tmp_path):
    """The run folder of a small imported file with head and prototypes."""
    trunk, heads = generated(trunk_shapes((1,), (16,), 8)), generated(heads_shapes((16, 12, 8), True, K=10))
    torch.save(vissl(trunk, heads), tmp_path / "a.torch")
    import_seer(tmp_path / "a.torch", tmp_path / "start")
    return tmp_path / "start"


def test_training_starts_from_imported_weights_and_resumes_without_them(start, small_images, tmp_path):
    given = checkpoint.read(checkpoint.latest(start / "ckpt"), checkpoint.MODEL)
    network = {"depths": [1], "widths": [16], "group_widths": 8}
    overrides = {"init": str(start), "data.path": str(small_images), "model.options": json.dumps(network), "optim.lr": "1e-9"}
    overrides |= {"method.hidden_widths": "[12]", "method.embedding_width": "8", "method.prototypes": "10", "method.queue_length": "0"}
    overrides |= {"batch_size": "8", "steps": "1", "zero_stage": "1", "precision": "fp32", "knn.every_steps": "0"}
    config = apply_overrides(load_recipe("tiny_swav").config(), overrides)
    train(config, tmp_path / "run")
    taken = checkpoint.read(checkpoint.latest(tmp_path / "run" / "ckpt"), checkpoint.MODEL)
    compared = [key for key in given if "running" not in key and "tracked" not in key]
    assert len(compared) > 20 and all((taken[key] - given[key]).abs().max() < 1e-6 for key in compared)
    shutil.rmtree(start)
    train(config.model_copy(update={"steps": 2}), tmp_path / "run", resume=True)


def test_a_start_of_another_head_is_said_and_of_another_network_refused(start, tmp_path, capsys):
    config, alone = saved_config(start), SimpleNamespace(is_first=True)
    other = apply_overrides(config, {"method.prototypes": "9", "seed": "3"})
    method = other.method.build(Ground(initial_backbone(other), None, None, 0, 1, 1))
    before = method.prototypes.weight.clone()
    begin_from(start, method, alone)
    assert "init: prototypes starts at random" in capsys.readouterr().out and torch.equal(method.prototypes.weight, before)
    given = checkpoint.read(checkpoint.latest(start / "ckpt"), checkpoint.MODEL)
    state = method.state_dict()
    assert all(torch.equal(state[key], given[key]) for key in given if key != "prototypes.weight")
    wider = apply_overrides(config, {"model.options.group_widths": "[16]"})
    method = wider.method.build(Ground(initial_backbone(wider), None, None, 0, 1, 1))
    with pytest.raises(ValueError, match=r"another network than this run's, 1 tensors differ, the first is backbone.stages.0.0.conv2"):
        begin_from(start, method, alone)
    with pytest.raises(ValueError, match="holds no ckpt/; name the folder of a run"):
        begin_from(tmp_path, method, alone)


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_stands_beside_the_tensors_is_named_and_never_executed(zipped, tmp_path, capsys):
    for beside, words in ((collections.deque([1]), "objects of collections.deque"), (Harmful(), "objects of print")):
        torch.save({**small(), "more": beside}, tmp_path / "a.torch", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=f"a.torch cannot be read as tensors alone .it also holds {words}"):
            import_seer(tmp_path / "a.torch", tmp_path / "run")
    torch.save({**small(), "args": argparse.Namespace(lr=1.0)}, tmp_path / "b.torch", _use_new_zipfile_serialization=zipped)
    assert read_file(tmp_path / "b.torch").keys() == small().keys() | {"args"}
    assert "executed" not in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_friendly_siblings_have_groups_of_eight_and_take_no_published_weights():
    for name in ("regnety_256gf", "regnety_10b"):
        ours, theirs = named_stages(f"{name}_friendly"), named_stages(name)
        assert all(stage.width % 8 == stage.group_width % 8 == 0 for stage in ours) and any(stage.group_width % 8 for stage in theirs)
        assert [stage.depth for stage in ours] == [stage.depth for stage in theirs]
        assert NAMED[f"{name}_friendly"][:4] == NAMED[name][:4]
        friendly = load_recipe(f"seer_{name}_friendly").config()
        with torch.device("meta"):
            method = friendly.method.build(Ground(initial_backbone(friendly), None, None, 0, 1, 1))
            published = initial_backbone(load_recipe(f"seer_{name}").config())
        state = {f"backbone.{key}": value for key, value in published.state_dict().items()}
        with pytest.raises(ValueError, match=r"stages \[.*\] wide, this one has \[.*with and without _friendly"):
            method.load_state_dict(state, strict=False)
