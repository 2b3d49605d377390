"""Does the linear classifier follow the published protocols, find what other solvers find, and leave network and files alone?"""

import json
import math
import re
import shutil
import threading

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from fuseer.engine.config import LinearConfig, apply_overrides
from fuseer.engine.evaluate import linear
from fuseer.engine.evaluate.frozen import Labelled, Pixels
from fuseer.engine.evaluate.linear import PROTOCOLS, Protocol, accuracies, chosen_protocol, classifier, evaluate_linear, fit, train_and_test
from fuseer.engine.models.backbone import initial_backbone
from fuseer.engine.models.norm import calibrate
from fuseer.engine.recipes.recipe import load_recipe, recipe_names, saved_config


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    return shutil.copytree(small_run, tmp_path_factory.mktemp("runs") / "run")


def asked(run, **more):
    return apply_overrides(saved_config(run), {key.replace("__", "."): str(value) for key, value in more.items()})


def test_learning_rates_are_those_of_the_papers():
    assert [PROTOCOLS["moco"].lr_at(epoch * 10 + 9, 10) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    parameter = nn.Parameter(torch.zeros(1))
    oracle = torch.optim.SGD([parameter], PROTOCOLS["swav"].lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(oracle, 100)
    for epoch in range(100):
        assert {PROTOCOLS["swav"].lr_at(epoch * 7 + step, 7) for step in range(7)} == {PROTOCOLS["swav"].lr_at(epoch * 7, 7)}
        assert PROTOCOLS["swav"].lr_at(epoch * 7, 7) == pytest.approx(schedule.get_last_lr()[0])
        oracle.step()
        schedule.step()
    simclr = [PROTOCOLS["simclr"].lr_at(step, 4) for step in (0, 90, 180)]
    assert simclr == pytest.approx([1.6, 0.8 * (1 + math.cos(math.pi / 4)), 0.8])
    peaks = {name: PROTOCOLS[name].lr_at(0, 4) for name in ("moco_v3", "moco_v3_vit", "byol", "relic", "dino")}
    assert peaks == pytest.approx({"moco_v3": 0.4, "moco_v3_vit": 12, "byol": 0.8, "relic": 1.2, "dino": 0.004})


def test_a_shorter_training_keeps_the_shape_and_says_what_changed():
    protocol, words = chosen_protocol(LinearConfig(protocol="moco", epochs=10, lr=3.0, batch_size=64))
    assert [protocol.lr_at(epoch * 5, 5) for epoch in (0, 5, 6, 7, 8)] == pytest.approx([0.75, 0.75, 0.075, 0.075, 0.0075])
    assert words.endswith("changed: epochs 10 instead of 100, batch_size 64 instead of 256, lr 3 instead of 30")
    assert "changed" not in chosen_protocol(LinearConfig(protocol="moco", epochs=100))[1]


def test_every_recipe_asks_for_a_protocol_that_there_is():
    assert {load_recipe(name).config().linear.protocol for name in recipe_names()} <= set(PROTOCOLS)


def clouds(rows, classes=4, width=6, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(5)) * 1.5
    labels = torch.randint(classes, (rows,), generator=generator)
    return centres[labels] + noise * torch.randn(rows, width, generator=generator), labels


def in_batches(features, labels, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(labels), generator=generator).split(size):
            yield [features[chosen]], labels[chosen]


LONG = Protocol("a test", lr=1.0, batch_size=256, epochs=150, schedule="cosine", weight_decay=1e-2, nesterov=True)


def test_it_finds_the_minimum_that_another_solver_finds_and_predicts_like_scikit_learn():
    (features, labels), (test, targets) = clouds(1024, noise=2.0), clouds(500, noise=2.0, seed=1)
    head = classifier(6, 4, False, seed=0)
    fit([head], in_batches(features, labels, 256), LONG, 4)
    oracle = nn.Linear(6, 4).double()
    solver = torch.optim.LBFGS(oracle.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def objective(layer, rows):
        return F.cross_entropy(layer(rows), labels) + 0.5e-2 * sum(p.square().sum() for p in layer.parameters())

    def closure():
        solver.zero_grad()
        loss = objective(oracle, features.double())
        loss.backward()
        return loss

    solver.step(closure)
    assert objective(head.double(), features.double()).item() == pytest.approx(objective(oracle, features.double()).item(), rel=1e-3)
    assert (head.weight - oracle.weight).norm() < 0.05 * oracle.weight.norm()
    reference = LogisticRegression(C=1 / (1e-2 * len(labels)), max_iter=500).fit(features.numpy(), labels.numpy())
    score = reference.score(test.numpy(), targets.numpy())
    assert 0.5 < score < 0.95
    assert accuracies(head, test.double(), targets)["accuracy"] == pytest.approx(score, abs=0.011)


def test_a_classifier_begins_as_published_and_by_the_seed():
    head = classifier(500, 20, False, seed=3)
    assert not head.bias.any() and head.weight.std().item() == pytest.approx(0.01, rel=0.05) and abs(head.weight.mean().item()) < 5e-4
    assert torch.equal(head.weight, classifier(500, 20, False, seed=3).weight)
    assert not torch.equal(head.weight, classifier(500, 20, False, seed=4).weight)
    norm, linear_part = classifier(500, 20, True, seed=3)
    assert norm.weight is None and torch.equal(linear_part.weight, head.weight)


def test_separable_classes_are_all_told_apart_whatever_their_scale_once_standardised():
    features, labels = clouds(512, noise=0.1)
    for scale in (1e-3, 1e3):
        head = classifier(6, 4, True, seed=0)
        fit([head], in_batches(scale * features + 7 * scale, labels, 256), LONG, 2)
        assert accuracies(head, scale * features + 7 * scale, labels) == {"accuracy": 1.0}
        assert not any(module.training for module in head.modules()), "statistics of the test images must not count"


def test_classifiers_that_train_together_are_bitwise_what_each_is_alone():
    (features, labels), short = clouds(512), Protocol("a test", 0.5, 128, 3, "cosine", weight_decay=1e-3)
    together = [classifier(6, 4, False, seed=0), classifier(3, 4, True, seed=0)]
    seen = []

    def scored(epoch, losses):
        # far from what was trained on: were these rows to enter any statistics, the classifiers would no longer agree
        tested = [accuracies(head, features[:, :width] + 50, labels) for head, width in zip(together, (6, 3), strict=True)]
        seen.append((epoch, len(losses), len(tested)))

    fit(together, (([rows[0], rows[0][:, :3]], y) for rows, y in in_batches(features, labels, 128)), short, 4, scored)
    assert seen == [(1, 2, 2), (2, 2, 2), (3, 2, 2)]
    for head, width in zip(together, (6, 3), strict=True):
        alone = classifier(width, 4, width == 3, seed=0)
        losses = fit([alone], (([rows[0][:, :width]], y) for rows, y in in_batches(features, labels, 128)), short, 4)
        assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), alone.state_dict().values(), strict=True))
        assert losses[0] < 1


def test_top_five_counts_and_needs_ten_classes():
    scores = torch.arange(12.0).repeat(12, 1)
    assert accuracies(nn.Identity(), scores, torch.arange(12)) == {"accuracy": pytest.approx(1 / 12), "top5": pytest.approx(5 / 12)}
    assert accuracies(nn.Identity(), scores[:, :9], torch.arange(12)) == {"accuracy": pytest.approx(1 / 12)}


def test_a_run_is_evaluated_by_its_own_protocol_and_written_whole(run):
    result = evaluate_linear(run)
    assert json.loads((run / "eval" / "linear.json").read_text()) == result and not list((run / "eval").glob("*.part"))
    assert (result["protocol"], result["epochs"], result["step"], result["image_size"]) == ("tiny", 30, 6, 28)
    assert (result["train_images"], result["test_images"], result["classes"]) == (160, 40, 10)
    assert [row["name"] for row in result["rows"]] == ["raw pixels", "initialisation, BatchNorm calibrated", "pretrained"]
    for row in result["rows"]:
        assert 0.2 < row["accuracy"] <= row["top5"] <= 1, row
    again = evaluate_linear(run)
    assert again["rows"] == result["rows"], "decided by the seed"


def test_its_rows_are_the_calibrated_initialisation_and_the_checkpoint(run):
    config = saved_config(run)
    labelled, protocol = Labelled.of(config), chosen_protocol(config.linear)[0]
    rows = {row["name"]: row for row in evaluate_linear(run)["rows"]}
    weights = load_file(next((run / "ckpt").glob("step_*")) / "model.safetensors")
    trained, fresh = initial_backbone(config), initial_backbone(config)
    trained.load_state_dict({key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")})
    calibrate(fresh, (images for images, _ in labelled.batches(labelled.train, torch.device("cpu"))))
    for name, network in (("pretrained", trained), ("initialisation, BatchNorm calibrated", fresh)):
        assert train_and_test({name: network}, labelled, protocol, 28) == [rows[name]]
    assert len({row["loss"] for row in rows.values()}) == 3


@pytest.mark.parametrize("pipeline", ["dali", "torchvision"])
def test_published_protocols_see_new_crops_through_the_runs_pipeline(run, pipeline, capsys, monkeypatch):
    other = {"dali": "torchvision.TorchvisionLoader", "torchvision": "dali.DaliLoader"}[pipeline]
    monkeypatch.delattr(f"fuseer.engine.data.{other}")
    config = asked(run, linear__protocol="swav", linear__epochs=4, linear__batch_size=16, data__pipeline=pipeline)
    threads = threading.active_count()
    before = {name: tensor.clone() for name, tensor in initial_backbone(config).state_dict().items()}
    result = evaluate_linear(run, config)
    said = capsys.readouterr().out
    assert "random crops of 8% to 100% of the area and flips; changed: epochs 4 instead of 100, batch_size 16 instead of 256" in said
    assert re.search(r"epoch 4/4  raw pixels \d.*initialisation \d.*pretrained \d+\.\d%, loss \d", said) and "epoch 5" not in said
    assert result["rows"] == evaluate_linear(run, config)["rows"]
    assert threading.active_count() <= threads, "the pipeline was closed"
    network = initial_backbone(config)
    train_and_test({"network": network}, Labelled.of(config), chosen_protocol(config.linear)[0], 28)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("pipeline", ["dali", "torchvision"])
@pytest.mark.parametrize("protocol", ["simclr", "tiny"])
def test_labels_stay_with_their_images(tmp_path, pipeline, protocol):
    """Each class is one colour: whoever mixes up labels cannot reach 100 %."""
    colours = {"blue": (10, 10, 240), "green": (10, 240, 10), "red": (240, 10, 10)}
    for split, count in (("train", 20), ("test", 5)):
        for name, colour in colours.items():
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                shade = tuple(min(255, value + 3 * number) for value in colour)
                Image.new("RGB", (40 + number, 50), shade).save(tmp_path / split / name / f"{number}.png")
    config = apply_overrides(
        load_recipe("tiny_swav").config(), {"data.path": str(tmp_path), "data.pipeline": pipeline, "knn.image_size": "14"}
    )
    chosen = chosen_protocol(LinearConfig(protocol=protocol, batch_size=12, epochs=15, lr=1.0))[0]
    (row,) = train_and_test({"pixels": Pixels(config)}, Labelled.of(config), chosen, 14)
    assert row["accuracy"] == 1.0


def test_large_images_are_averaged_before_their_pixels_are_features():
    config = load_recipe("tiny_swav").config()
    images = torch.rand(2, 3, 64, 64)
    features = Pixels(config, largest=32)(images).view(2, 3, 32, 32)
    torch.testing.assert_close(features, F.avg_pool2d(images, 2) * 0.353 + 0.286)
    assert Pixels(config, largest=32)(images[..., :32, :32]).shape == (2, 3 * 32 * 32)


class Restless(nn.Module):
    """A network that counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, images):
        self.calls += 1
        return images.flatten(1)[:, :5]


def test_a_network_that_changes_is_refused(run):
    with pytest.raises(RuntimeError, match=r"frozen network \(restless\) changed"):
        train_and_test({"restless": Restless()}, Labelled.of(saved_config(run)), chosen_protocol(saved_config(run).linear)[0], 28)


def test_an_interrupt_leaves_what_was_there(run, monkeypatch):
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "linear.json").write_text('{"earlier": 1}')

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(linear, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_linear(run)
    assert {path.name: path.read_text() for path in (run / "eval").glob("linear*")} == {"linear.json": '{"earlier": 1}'}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"linear__protocol": "moko"}, ValueError, "there is no protocol moko; did you mean moco"),
        ({"linear__protocol": "swav", "linear__batch_size": 161}, ValueError, "batch_size=161 is more than the 160 train images"),
        ({"linear__lr": 1e38}, RuntimeError, r"not finite in epoch 1; give a lower lr=… than 1e\+38"),
    ],
)
def test_what_cannot_work_is_refused_in_words(run, changes, error, words):
    with pytest.raises(error, match=words):
        evaluate_linear(run, asked(run, **changes))


def without_test_split(folder):
    shutil.rmtree(folder / "images" / "test")


def without_checkpoint(folder):
    shutil.rmtree(folder / "run" / "ckpt")


def with_a_stray_image(folder):
    shutil.copy(held_out(folder)[0], folder / "images" / "test" / "a.png")


def with_one_wider_image(folder):
    Image.new("RGB", (30, 28)).save(held_out(folder)[1])


def with_wide_images(folder):
    for path in held_out(folder):
        Image.new("RGB", (30, 28)).save(path)


def held_out(folder):
    return sorted(folder.glob("images/test/*/*.png"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_test_split, "needs train/ and test/ with the same two or more class folders"),
        (without_checkpoint, "holds no complete one"),
        (with_a_stray_image, "a.png lies in no class folder; move it into one of test/'s"),
        (with_one_wider_image, "is 30x28 pixels and others are 28x28; .*image_size=N"),
        (with_wide_images, "the images are 30x28 pixels; give image_size=N"),
    ],
)
def test_data_that_cannot_be_evaluated_is_refused_in_words(run, small_images, tmp_path, change, words):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(small_images, tmp_path / "images")
    change(tmp_path)
    with pytest.raises(ValueError, match=words):
        evaluate_linear(tmp_path / "run", asked(run, data__path=tmp_path / "images"))
