"""How well do frozen features separate the classes, judged by weighted nearest neighbours?"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# elements of the largest matrix made at once: 64 MiB in float32
MAX_ELEMENTS = 2**24


def knn_votes(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, *, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """votes[n, c] = Σ exp(⟨x_n, t_j⟩ / temperature) over the k train rows t_j most similar to x_n that have label c.

    train_features [N_train, D], train_labels [N_train] integers in 0..classes-1, test_features [N_test, D], all on one device; rows are
    L2-normalised here. Votes [N_test, classes] are float64, similarities float32 at least. Of train rows equally similar at the border the
    earlier wins. Test rows go in chunks: memory does not grow with N_test · N_train. No gradient; this process alone.
    Raises ValueError for shapes, k outside 1..N_train, temperature <= 0, labels out of range, features that are not finite; TypeError for
    labels that are not integers. Source: dino, eval_knn.py (k = 20, temperature 0.07).
    """
    _check(train_features, train_labels, test_features, classes, k, temperature)
    dtype = torch.promote_types(torch.promote_types(train_features.dtype, test_features.dtype), torch.float32)
    train = F.normalize(train_features.to(dtype), dim=1)
    test = F.normalize(test_features.to(dtype), dim=1)
    chunk = max(1, MAX_ELEMENTS // max(train.shape[0], k * classes))
    return torch.cat([_chunk_votes(train, train_labels, rows, classes, k, temperature) for rows in test.split(chunk)])


@torch.no_grad()
def _chunk_votes(train, labels, rows, classes, k, temperature):
    with torch.autocast(rows.device.type, enabled=False):
        similarity = rows @ train.T
    values, neighbours = similarity.topk(min(k + 1, len(labels)))
    neighbours = neighbours[:, :k].sort(1).values
    if len(labels) > k:
        tied = (values[:, k] == values[:, k - 1]).nonzero()[:, 0]
        neighbours[tied] = _first_of_equals(similarity[tied], values[tied, k - 1 : k], k)
    weights = (similarity.gather(1, neighbours).double() / temperature).exp()
    # one slot per neighbour before the sum: atomics of a scatter-add would make ties depend on the run
    slots = weights.new_zeros(*weights.shape, classes)
    return slots.scatter_(2, labels[neighbours].long().unsqueeze(2), weights.unsqueeze(2)).sum(1)


def _first_of_equals(similarity, border, k):
    """The k most similar by index where several lie on the border: topk may return any of them, and not the same on every device."""
    above, level = similarity > border, similarity == border
    chosen = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return chosen.nonzero()[:, 1].view(-1, k)


def knn_predict(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, *, classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Class [N_test] with the most `knn_votes`, the lower label on a tie; arguments and errors are those of `knn_votes`."""
    return knn_votes(train_features, train_labels, test_features, classes=classes, k=k, temperature=temperature).argmax(1)


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share in 0..1 of test rows that `knn_predict` labels as test_labels [N_test] does; ValueError if there is no test row."""
    if test_labels.dim() != 1 or not 0 < len(test_labels) == len(test_features):
        raise ValueError(
            f"knn_accuracy: test_labels must be [N_test], one per test row and at least one; got {list(test_labels.shape)} labels "
            f"and features {list(test_features.shape)}"
        )
    predicted = knn_predict(train_features, train_labels, test_features, classes=classes, k=k, temperature=temperature)
    return (predicted == test_labels).double().mean().item()


@torch.no_grad()
def extract_features(backbone: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(features [N, D], labels [N]) of all (images, labels) pairs in `batches`, in order; every module's mode is restored.

    The backbone runs in evaluation mode, without gradient, on the images as they come; features are float32 at least and stay on its
    device, with the labels. This process alone. Raises ValueError if there is no batch.
    """
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    features, labels = [], []
    try:
        for images, targets in batches:
            rows = backbone(images)
            features.append(rows.to(torch.promote_types(rows.dtype, torch.float32)))
            labels.append(targets.to(rows.device))
    finally:
        for module, training in modes.items():
            module.training = training
    if not features:
        raise ValueError("extract_features: batches gave nothing; give at least one (images, labels) pair")
    return torch.cat(features), torch.cat(labels)


def _check(train_features, train_labels, test_features, classes, k, temperature):
    if train_features.dim() != 2 or test_features.dim() != 2 or train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"knn: train_features and test_features must be [N_train, D] and [N_test, D]; got {list(train_features.shape)} "
            f"and {list(test_features.shape)}"
        )
    if train_labels.shape != train_features.shape[:1]:
        raise ValueError(f"knn: train_labels must be [{len(train_features)}], one per train row; got {list(train_labels.shape)}")
    if train_labels.is_floating_point() or train_labels.is_complex() or train_labels.dtype == torch.bool:
        raise TypeError(f"knn: train_labels must be integers; got {train_labels.dtype}")
    if not 1 <= k <= len(train_features):
        raise ValueError(f"knn: k must be in 1..N_train; got k={k} with {len(train_features)} train rows; lower k or give more rows")
    if temperature <= 0:
        raise ValueError(f"knn: temperature must be positive; got {temperature}")
    low, high = train_labels.min().item(), train_labels.max().item()
    if low < 0 or high >= classes:
        raise ValueError(f"knn: train_labels must be in 0..classes-1; got {low}..{high} with classes={classes}")
    for name, features in (("train_features", train_features), ("test_features", test_features)):
        if not features.isfinite().all():
            raise ValueError(f"knn: {name} must be finite; got NaN or infinity in {(~features.isfinite()).any(1).sum().item()} rows")
