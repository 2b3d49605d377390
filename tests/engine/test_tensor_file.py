"""Does a file hold what it was given, bit by bit, while one tensor at a time is in memory?"""

import weakref

import pytest
import torch
from safetensors.torch import load_file

from fuseer.engine import tensor_file


def test_a_file_is_written_while_one_tensor_lives(tmp_path):
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in tensor_file.DTYPES}
    tensors |= {
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "turned": torch.randn(4, 6).t(),
        "bits": torch.tensor([-0.0, torch.nan]),
    }
    living = weakref.WeakSet()

    def one_by_one():
        for tensor in tensors.values():
            assert not living
            made = tensor.clone()
            living.add(made)
            yield made
            del made

    entries = [tensor_file.Entry(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    tensor_file.write(tmp_path / "file.safetensors", entries, one_by_one())
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_a_tensor_unlike_its_entry_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"scalar was announced as torch.int64 \[\]; got torch.float32 \[2\]"):
        tensor_file.write(tmp_path / "x", [tensor_file.Entry("scalar", torch.int64, ())], iter([torch.zeros(2)]))
    with pytest.raises(TypeError, match="x is torch.complex64; a file holds"):
        tensor_file.write(tmp_path / "x", [tensor_file.Entry("x", torch.complex64, ())], iter([]))
