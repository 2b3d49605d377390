"""Do ranks write equal shares that are the whole, and do they read no more than they need?"""

import pytest
import torch

from fuseer.engine import shards


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 40])
def test_shares_are_equal_and_are_all(ranks):
    tensors = {"a": torch.arange(10.0), "none": torch.zeros(0, 3), "b": torch.arange(7, dtype=torch.float64), "c": torch.tensor(1.0)}
    whole = [shards.whole(name, tensor) for name, tensor in tensors.items()]
    cut = [shards.share(whole, rank, ranks) for rank in range(ranks)]
    rows = [(rank, [(part.name, part.shape, part.offset, part.numel) for part in own]) for rank, own in enumerate(cut)]
    assert shards.table(rows).keys() == tensors.keys()
    for name, tensor in tensors.items():
        values = [part.values().flatten() for own in cut for part in own if part.name == name]
        assert torch.equal(torch.cat(values), tensor.flatten())
    sizes = [sum(part.numel * part.dtype.itemsize for part in own) for own in cut]
    assert all(abs(size - sum(sizes) / ranks) < 8 for size in sizes), "each cut is less than an element away"


def test_only_what_overlaps_is_read(tmp_path):
    """Of 3 ranks' files the second is gone: what does not touch it is read all the same."""
    tensor = torch.arange(30.0)
    rows = []
    for rank in range(3):
        own = shards.share([shards.whole("a", tensor)], rank, 3)
        shards.write(tmp_path, "model.safetensors", rank, 3, own)
        rows.append((rank, [(part.name, part.shape, part.offset, part.numel) for part in own]))
    (tmp_path / "model.00001.safetensors").unlink()
    files = shards.Shards(tmp_path, {"world_size": 3, "tensors": {"model.safetensors": shards.table(rows)}}, "model.safetensors")
    target = torch.empty(4)
    files.fill(target, "a", 3)
    assert torch.equal(target, tensor[3:7])
    files.fill(target, "a", 26)
    assert torch.equal(target, tensor[26:])
    with pytest.raises(FileNotFoundError):
        files.fill(target, "a", 8)
