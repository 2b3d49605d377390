"""Does the weighted kNN give the published weights and agree with scikit-learn, however it is chunked?"""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from fuseer.engine.evaluate import knn
from fuseer.engine.evaluate.knn import extract_features, knn_accuracy, knn_predict, knn_votes


def clusters(train=300, test=97, width=8, classes=5):
    """Overlapping classes, so that neighbours disagree."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(classes, width, generator=generator)
    labels = torch.randint(classes, (train + test,), generator=generator)
    features = centres[labels] + 1.3 * torch.randn(train + test, width, generator=generator)
    return features[:train], labels[:train], features[train:], labels[train:]


def test_weights_of_the_oracle():
    cosines = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float64)
    train = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1)
    votes = knn_votes(train * 3, torch.tensor([2, 0, 1]), torch.tensor([[5.0, 0.0]], dtype=torch.float64), classes=4, k=3)
    torch.testing.assert_close(votes[0], torch.tensor([91910.6, 22026.5, 383518, 0.0], dtype=torch.float64), rtol=2e-6, atol=0)


def test_two_second_neighbours_outvote_the_first_only_when_warm():
    # exp(0.1 / T) against 2: the first neighbour wins below T = 0.144
    angles = torch.tensor([0.9, 0.8, 0.8]).acos()
    train, labels = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([0, 1, 1])
    test = torch.tensor([[1.0, 0.0]])
    assert knn_predict(train, labels, test, classes=2, k=3, temperature=0.14) == 0
    assert knn_predict(train, labels, test, classes=2, k=3, temperature=0.15) == 1


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (60, 0.5)])
def test_agrees_with_scikit_learn(k, temperature):
    train, labels, test, targets = clusters()

    def weights(distances):
        return np.exp((1 - distances**2 / 2) / temperature)

    unit = [nn.functional.normalize(rows.double(), dim=1).numpy() for rows in (train, test)]
    oracle = KNeighborsClassifier(k, weights=weights, algorithm="brute").fit(unit[0], labels.numpy())
    predicted = knn_predict(train, labels, test, classes=5, k=k, temperature=temperature)
    assert np.array_equal(predicted.numpy(), oracle.predict(unit[1]))
    accuracy = knn_accuracy(train, labels, test, targets, classes=5, k=k, temperature=temperature)
    assert accuracy == oracle.score(unit[1], targets.numpy())
    assert 0.3 < accuracy < 0.95


def test_chunks_do_not_change_the_result_and_stay_small(monkeypatch):
    train, labels, test, _ = clusters()
    whole = knn_votes(train, labels, test, classes=5)
    chunks = []

    def recorded(train, labels, rows, *rest):
        chunks.append(len(rows) * len(train))
        return original(train, labels, rows, *rest)

    original = knn._chunk_votes
    monkeypatch.setattr(knn, "_chunk_votes", recorded)
    for limit in (1, 7 * 300, 50 * 300):
        monkeypatch.setattr(knn, "MAX_ELEMENTS", limit)
        chunks.clear()
        torch.testing.assert_close(knn_votes(train, labels, test, classes=5), whole, rtol=1e-5, atol=0)
        assert len(chunks) > 1 and max(chunks) <= max(limit, 300)


def test_equal_neighbours_are_taken_by_index_and_equal_votes_by_label():
    # all train rows are the same: the first k count, whatever topk returns
    train, labels = torch.ones(40, 4), torch.arange(40) % 4
    votes = knn_votes(train, labels, torch.ones(1, 4), classes=4, k=6)[0]
    torch.testing.assert_close(votes / votes[2], torch.tensor([2, 2, 1, 1], dtype=torch.float64))
    assert knn_predict(train, labels, torch.ones(1, 4), classes=4, k=6) == 0
    assert knn_predict(train, 3 - labels, torch.ones(1, 4), classes=4, k=6) == 2


def test_half_features_and_autocast_keep_fp32_similarities():
    train, labels, test, _ = clusters()
    train, test = train.bfloat16(), test.bfloat16()
    truth = knn_votes(train.double(), labels, test.double(), classes=5)
    with torch.autocast("cpu", torch.bfloat16):
        votes = knn_votes(train, labels, test, classes=5)
    assert votes.dtype == torch.float64
    torch.testing.assert_close(votes, truth, rtol=1e-4, atol=0)


def test_no_test_rows_and_integer_types():
    train, labels, test, _ = clusters()
    assert knn_votes(train, labels, test[:0], classes=5).shape == (0, 5)
    assert torch.equal(knn_predict(train, labels.to(torch.uint8), test, classes=5), knn_predict(train, labels, test, classes=5))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": 301}, ValueError, "k=301 with 300 train rows"),
        ({"k": 0}, ValueError, "k=0"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive; got 0.0"),
        ({"classes": 4}, ValueError, "0..4 with classes=4"),
        ({"train_labels": torch.zeros(299, dtype=torch.long)}, ValueError, r"\[300\].*got \[299\]"),
        ({"train_labels": torch.zeros(300)}, TypeError, "float32"),
        ({"test_features": torch.zeros(3, 9)}, ValueError, r"\[300, 8\] and \[3, 9\]"),
        ({"test_features": torch.full((3, 8), float("nan"))}, ValueError, "test_features must be finite; got NaN or infinity in 3 rows"),
    ],
)
def test_refuses_in_words(change, error, words):
    train, labels, test, _ = clusters()
    arguments = {"train_features": train, "train_labels": labels, "test_features": test, "classes": 5, "k": 20, **change}
    with pytest.raises(error, match=words):
        knn_predict(**arguments)


def test_accuracy_needs_a_label_for_each_row():
    train, labels, test, targets = clusters()
    with pytest.raises(ValueError, match=r"got \[96\] labels"):
        knn_accuracy(train, labels, test, targets[:-1], classes=5)
    with pytest.raises(ValueError, match=r"got \[0\] labels"):
        knn_accuracy(train, labels, test[:0], targets[:0], classes=5)


def test_extract_features_is_evaluation_in_order_and_restores_modes():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    backbone[2].eval()
    images, labels = torch.randn(7, 3, 2, 2), torch.arange(7)
    with torch.autocast("cpu", torch.bfloat16):
        features, targets = extract_features(backbone, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    assert torch.equal(targets, labels) and features.dtype == torch.float32 and not features.requires_grad
    assert backbone.training and not backbone[2].training and backbone[3].training
    torch.testing.assert_close(features, backbone.eval()(images), rtol=0.02, atol=0.02)
    with pytest.raises(ValueError, match="at least one"):
        extract_features(backbone, [])


def test_extract_features_restores_modes_when_a_batch_fails():
    backbone = nn.Linear(3, 2)
    with pytest.raises(RuntimeError):
        extract_features(backbone, [(torch.zeros(2, 4), torch.zeros(2))])
    assert backbone.training
