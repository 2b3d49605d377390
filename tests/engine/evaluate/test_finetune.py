"""Does fine-tuning follow MAE's recipe, tell pretraining from none at one budget, and see each image with its label?"""

import json
import math
import random
import re
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from fuseer.engine import checkpoint
from fuseer.engine.cli import main
from fuseer.engine.config import FinetuneConfig, apply_overrides
from fuseer.engine.data.mixed import Augmentation, mixed_batches
from fuseer.engine.data.sources import Reader, SampleIndex, open_source
from fuseer.engine.evaluate import finetune
from fuseer.engine.evaluate.classifier import Classifier, depths, parameter_groups
from fuseer.engine.evaluate.finetune import PROTOCOLS, WEIGHTS, chosen_protocol, evaluate_finetune, fit, measured, train_and_test
from fuseer.engine.evaluate.frozen import Labelled
from fuseer.engine.models.backbone import build_backbone, initial_backbone
from fuseer.engine.recipes.recipe import load_recipe, recipe_names, saved_config

VIT = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
PLAIN = Augmentation(
    size=12, mean=(0.5,) * 3, std=(0.5,) * 3, crop_area=(0.5, 1.0), rand_augment="", erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0
)


@pytest.fixture(scope="module")
def vit_run(small_images, tmp_path_factory):
    """A run of a small ViT whose checkpoint is its initialisation."""
    run = tmp_path_factory.mktemp("vit") / "run"
    overrides = {"model.name": "vit_tiny", "model.options": json.dumps(VIT), "data.path": str(small_images), "precision": "fp32"}
    config = apply_overrides(load_recipe("tiny_swav").config(), overrides)
    weights = {f"backbone.{name}": value for name, value in initial_backbone(config).state_dict().items()}
    checkpoint.save_weights(run / "ckpt", weights, {})
    (run / "config.json").write_text(config.to_json())
    (run / "metrics.jsonl").write_text("")
    return run


@pytest.fixture
def run(vit_run, tmp_path):
    return shutil.copytree(vit_run, tmp_path / "run")


def asked(run, **more):
    settings = {"epochs": 2, "batch_size": 32, **more}
    known = FinetuneConfig.model_fields
    return apply_overrides(
        saved_config(run), {f"finetune.{key}" if key in known else key.replace("__", "."): str(value) for key, value in settings.items()}
    )


def official_lr(epoch, lr, min_lr, warmup, epochs):
    """util/lr_sched.py of facebookresearch/mae."""
    if epoch < warmup:
        return lr * epoch / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


@pytest.mark.parametrize(("name", "lr", "epochs"), [("mae_vit_b", 2e-3, 100), ("mae_vit_l", 4e-3, 50), ("mae_vit_h", 4e-3, 50)])
def test_learning_rates_are_the_published_ones(name, lr, epochs):
    for step in (0, 1, 24, 25, 26, 100, epochs * 5 - 1):
        assert PROTOCOLS[name].lr_at(step, 5) == pytest.approx(official_lr(step / 5, lr, 1e-6, 5, epochs), rel=1e-12)


def official_layer(name, num_layers):
    """util/lr_decay.py, get_layer_id_for_vit."""
    if name in ["cls_token", "pos_embed"]:
        return 0
    if name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return num_layers


@pytest.mark.parametrize("learnt", [False, True])
def test_layers_of_a_vit_decay_as_officially(learnt):
    with torch.device("meta"):
        model = Classifier(build_backbone("vit_base", start="mae", learnt_positions=learnt), 1000, 0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, layer_decay=0.65, weight_decay=0.05)
    assert sum(len(group["params"]) for group in groups) == len(names) == 152 - (not learnt)
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter].removeprefix("backbone.model.")
            assert group["lr_scale"] == pytest.approx(0.65 ** (13 - official_layer(name, 13))), name
            assert group["weight_decay"] == (0.0 if parameter.ndim == 1 or name in ("pos_embed", "cls_token") else 0.05), name


def test_other_networks_decay_from_stem_to_head():
    regnet = depths(Classifier(build_backbone("anynet", depths=[1, 2], widths=[16, 32], stem_width=8), 3, 0))
    order = ["backbone.stem.conv.weight", "backbone.stages.0.0.conv1.conv.weight", "backbone.stages.1.0.conv1.conv.weight"]
    assert [regnet[name] for name in [*order, "backbone.stages.1.1.conv3.bn.bias", "head.weight"]] == [0, 1, 2, 3, 4]
    resnet = depths(Classifier(build_backbone("resnet18"), 3, 0))
    order = ["conv1.weight", "layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight", "layer4.1.conv2.weight"]
    found = [resnet[f"backbone.model.{name}"] for name in order]
    assert found == sorted(set(found)) and found[0] == 0 and resnet["head.bias"] == max(resnet.values()) == found[-1] + 1
    silent = Classifier(build_backbone("resnet18"), 3, 0)
    silent.backbone.model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="does not say which layers it has; give layer_decay=1"):
        depths(silent)
    assert [group["lr_scale"] for group in parameter_groups(silent, layer_decay=1.0, weight_decay=0.1)] == [1, 1]


def test_a_fine_tuned_vit_is_timms_with_global_pool():
    model = Classifier(build_backbone("vit_tiny", **VIT, frozen_patches=True), 5, 0).eval()
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.backbone.model.fc_norm.weight)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, global_pool="avg", img_size=28, **VIT).eval()
    state = {**model.backbone.model.state_dict(), **{f"head.{name}": value for name, value in model.head.state_dict().items()}}
    positions = torch.cat([torch.zeros(1, 32), model.backbone.positions(4, 4)])[None]
    theirs.load_state_dict({**state, "pos_embed": positions}, strict=True)
    images = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(model(images), theirs(images), rtol=1e-5, atol=1e-5)
    model(images).sum().backward()
    assert model.backbone.model.patch_embed.proj.weight.grad.abs().max() > 0, "patches learn even where pretraining froze them"


def test_the_head_begins_as_published_and_by_the_seed():
    heads = [Classifier(build_backbone("vit_tiny", **VIT), 500, seed).head for seed in (3, 3, 4)]
    assert not heads[0].bias.any() and heads[0].weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)


def test_fewer_epochs_keep_the_shape_and_say_what_changed():
    protocol, words = chosen_protocol(FinetuneConfig(epochs=20, batch_size=16))
    assert (protocol.warmup_epochs, protocol.micro_batch, protocol.layer_decay) == (1.0, 16, 0.65)
    assert words.endswith("changed: epochs 20 instead of 100, batch_size 16 instead of 1024, micro_batch 16 instead of 32")
    assert "RandAugment rand-m9-mstd0.5-inc1, random erasing 0.25" in words and "mixup 0.8 and cutmix 1" in words
    assert chosen_protocol(FinetuneConfig(), scratch=True)[0].layer_decay == 1
    assert chosen_protocol(FinetuneConfig(layer_decay=0.9), scratch=True)[0].layer_decay == 0.9
    assert {load_recipe(name).config().finetune.protocol for name in recipe_names()} <= set(PROTOCOLS)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes of one colour each: 24 images to train on, 6 to test on."""
    folder = tmp_path_factory.mktemp("colours")
    shades = {"blue": (10, 10, 240), "green": (10, 240, 10), "red": (240, 10, 10)}
    for split, count in (("train", 8), ("test", 2)):
        for name, colour in shades.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                shade = tuple(min(255, value + number) for value in colour)
                Image.new("RGB", (14 + number, 16), shade).save(folder / split / name / f"{number}.png")
    return folder


def batches(folder, *, batch=6, parts=1, threads=1, count=5, **changes):
    source = open_source(str(folder), split="train")
    index = SampleIndex(len(source), batch, 1, accumulation_steps=parts)
    stream = mixed_batches(Reader(source, 0.0, 0), index, replace(PLAIN, **changes), threads=threads)
    found = list(islice(stream, count))
    stream.close()
    return found


def test_labels_stay_with_their_images(colours):
    for images, targets in batches(colours, rand_augment="", smoothing=0.3):
        assert images.shape == (6, 3, 12, 12) and images.dtype == targets.dtype == torch.float32
        brightest = images.mean((2, 3)).argmax(1)
        assert torch.equal(targets.argmax(1), 2 - brightest), "blue, green, red"
        torch.testing.assert_close(targets.max(1).values, torch.full((6,), 0.8))
        torch.testing.assert_close(targets.sum(1), torch.ones(6))


STRONG = {"rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1}


def test_neither_workers_nor_parts_nor_the_past_change_an_image(colours):
    one, two = (batches(colours, threads=threads, **STRONG) for threads in (1, 2))
    assert all(torch.equal(a, b) for pair in zip(one, two, strict=True) for a, b in zip(*pair, strict=True))
    whole, halves = batches(colours, count=2), batches(colours, parts=3, count=6)
    for (images, targets), parts in zip(whole, (halves[:3], halves[3:]), strict=True):
        assert torch.equal(images, torch.cat([part[0] for part in parts])) and torch.equal(targets, torch.cat([part[1] for part in parts]))
    epochs = batches(colours, batch=24, count=2)
    assert not torch.equal(epochs[0][0].sum(0), epochs[1][0].sum(0)), "new crops in every epoch"


def test_the_callers_generators_stay_as_they_are(colours):
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    batches(colours, **STRONG)
    after = random.getstate(), np.random.get_state(), torch.get_rng_state()
    assert before[0] == after[0] and (before[1][1] == after[1][1]).all() and torch.equal(before[2], after[2])


def test_mixup_and_cutmix_mix_an_image_with_its_mirror_in_the_batch(colours):
    plain = batches(colours, count=8)
    shares = set()
    for (images, targets), (mixed, blend) in zip(plain, batches(colours, count=8, mixup=0.8), strict=True):
        share = next(((blend[i, targets[i].argmax()]).item() for i in range(6) if not torch.equal(targets[i], targets[5 - i])), None)
        if share is not None:
            torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(blend, share * targets + (1 - share) * targets.flip(0))
            shares.add(round(share, 4))
    assert len(shares) > 4, "a new share for every batch"
    for (images, targets), (cut, blend) in zip(plain, batches(colours, count=8, cutmix=1.0), strict=True):
        own = (cut == images).all(1)
        assert ((cut == images.flip(0)).all(1) | own).all()
        share = next(((blend[i, targets[i].argmax()]).item() for i in range(6) if not torch.equal(targets[i], targets[5 - i])), None)
        if share is not None:
            differing = (images != images.flip(0)).all((1, 2, 3))
            assert own[differing].float().mean().item() == pytest.approx(share, abs=1e-5)


def test_an_odd_micro_batch_cannot_be_mixed(colours):
    with pytest.raises(ValueError, match="even number of images in a micro-batch; got 3"):
        batches(colours, batch=3, mixup=0.5)
    assert len(batches(colours, batch=3)) == 5


def steps_of(model, protocol, index, data):
    fit(model, iter(data), protocol, index)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_a_batch_in_parts_is_the_batch_and_layers_move_by_their_share():
    protocol = chosen_protocol(FinetuneConfig(protocol="tiny", epochs=1, batch_size=8))[0]
    data = [(torch.randn(8, 3, 14, 14), torch.eye(4)[torch.randint(4, (8,))]) for _ in range(4)]
    parts = [(images.split(4)[half], targets.split(4)[half]) for images, targets in data for half in (0, 1)]

    def fresh():
        torch.manual_seed(0)
        return Classifier(build_backbone("vit_tiny", **VIT), 4, 0)

    before = torch.cat([parameter.detach().flatten() for parameter in fresh().parameters()])
    whole = steps_of(fresh(), protocol, SampleIndex(32, 8, 0), data)
    cut = steps_of(fresh(), protocol, SampleIndex(32, 8, 0, accumulation_steps=2), parts)
    assert (whole - cut).norm() < 1e-4 * (whole - before).norm()
    model, start = fresh(), fresh()
    steps_of(model, replace(protocol, layer_decay=1e-4), SampleIndex(32, 8, 0), data)
    moved = {name: (p - q).abs().max().item() for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True)}
    assert moved["head.weight"] > 100 * moved["backbone.model.blocks.1.mlp.fc1.weight"] > 0
    assert moved["backbone.model.blocks.1.mlp.fc1.weight"] > 100 * moved["backbone.model.blocks.0.mlp.fc1.weight"]


@pytest.mark.parametrize("name", ["vit_tiny", "anynet"])
def test_it_learns_what_can_be_learnt(colours, name):
    options = VIT if name == "vit_tiny" else {"depths": [1], "widths": [16], "stem_width": 8, "stem_stride": 2}
    overrides = {"model.name": name, "model.options": json.dumps(options), "data.path": str(colours), "knn.image_size": "14"}
    config = apply_overrides(load_recipe("tiny_swav").config(), {**overrides, "precision": "fp32"})
    protocol = chosen_protocol(FinetuneConfig(protocol="tiny", epochs=10, batch_size=6, lr=0.2, layer_decay=1.0))[0]
    images = Labelled.of(config)
    model = Classifier(initial_backbone(config), 3, 0)
    found = train_and_test(model, images, protocol, 14, "network")
    assert found["accuracy"] == 1.0 and found["loss"] < 0.6 and "top5" not in found
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert measured(model.train(), images, False)["accuracy"] == 1.0 and not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "test images leave no statistics"


def test_both_rows_are_kept_where_their_budget_is_one(run, capsys):
    first = evaluate_finetune(run, asked(run), scratch=True)
    assert [row["name"] for row in first["rows"]] == ["initialisation"] and not (run / "eval" / WEIGHTS).exists()
    both = evaluate_finetune(run, asked(run))
    assert json.loads((run / "eval" / "finetune.json").read_text()) == both and not list((run / "eval").glob("*.part"))
    assert [row["name"] for row in both["rows"]] == ["initialisation", "pretrained"] and both["rows"][0] == first["rows"][0]
    assert [row["layer_decay"] for row in both["rows"]] == [1.0, 0.75]
    assert "epoch 2/2  pretrained" in capsys.readouterr().out
    again = evaluate_finetune(run, asked(run))
    for row in (*both["rows"], *again["rows"]):
        del row["seconds"]
    assert again["rows"] == both["rows"], "decided by the seed"
    alone = evaluate_finetune(run, asked(run, epochs=1))
    assert [row["name"] for row in alone["rows"]] == ["pretrained"]
    assert "the earlier row (initialisation) had another budget and is left out" in capsys.readouterr().out


def test_the_rows_differ_in_the_weights_they_began_with_only(run):
    """The checkpoint here is the initialisation, so that with one layer decay both rows are one."""
    rows = [evaluate_finetune(run, asked(run, layer_decay=0.8), scratch=scratch)["rows"][-1] for scratch in (True, False)]
    assert rows[0]["accuracy"] == rows[1]["accuracy"] and rows[0]["loss"] == rows[1]["loss"]
    place = checkpoint.latest(run / "ckpt") / checkpoint.MODEL
    weights = {name: torch.randn_like(value) for name, value in load_file(place).items()}
    shutil.rmtree(run / "ckpt")
    checkpoint.save_weights(run / "ckpt", weights, {})
    assert evaluate_finetune(run, asked(run, layer_decay=0.8))["rows"][-1]["loss"] != rows[0]["loss"]


def test_the_weights_it_leaves_give_the_accuracy_it_states(run):
    config = asked(run, epochs=3, lr=0.05)
    row = evaluate_finetune(run, config)["rows"][-1]
    model = Classifier(initial_backbone(config), 10, 1)
    model.load_state_dict(load_file(run / "eval" / WEIGHTS))
    assert measured(model, Labelled.of(config), False) == {"accuracy": row["accuracy"], "top5": row["top5"]}


def test_the_command_prints_both_rows_and_exports_what_it_made(run, tmp_path, capsys):
    words = [f"run={run}", "epochs=1", "batch_size=32", "image_size=14"]
    assert main(["eval", "finetune", *words, "scratch=true"]) == 0
    assert "gain over" not in capsys.readouterr().out
    assert main(["eval", "finetune", *words]) == 0
    said = capsys.readouterr().out
    assert "fine-tuned (tiny, 1 epochs), 160 train, 40 test images of 14 px" in said
    rows = {row["name"]: row for row in json.loads((run / "eval" / "finetune.json").read_text())["rows"]}
    for name, row in rows.items():
        assert re.search(rf"\n  {name} +{row['accuracy']:.2%} +top-5 +{row['top5']:.2%}\n", said), name
    assert re.search(r"gain over the initialisation +[+-]\d", said)
    assert main(["export", f"run={run}", f"out={tmp_path / 'a.safetensors'}", "finetuned=true", "image_size=28"]) == 0
    assert load_file(tmp_path / "a.safetensors")["head.weight"].shape == (10, 32)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"protocol": "mae"}, ValueError, "there is no protocol mae; did you mean mae_vit"),
        ({"batch_size": 256}, ValueError, "batch_size=256 is more than the 160 train images"),
        ({"batch_size": 32, "micro_batch": 12}, ValueError, "multiple of micro_batch; got 32 and 12"),
        ({"lr": 1e30}, RuntimeError, r"not finite in epoch 1; give a lower lr=… than 1e\+30"),
        ({"data__path": "/no/such"}, ValueError, "/no/such does not exist"),
    ],
)
def test_what_cannot_work_is_refused_in_words(run, changes, error, words):
    with pytest.raises(error, match=words):
        evaluate_finetune(run, asked(run, **changes))
    assert not (run / "eval").exists()


def test_an_interrupt_leaves_what_was_there(run, monkeypatch):
    (run / "eval").mkdir()
    (run / "eval" / "finetune.json").write_text('{"rows": []}')

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_finetune(run, asked(run))
    assert {path.name: path.read_text() for path in (run / "eval").iterdir()} == {"finetune.json": '{"rows": []}'}
