"""How are named tensors written to a file while no more than one of them is in memory?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

# the names that the safetensors format has for dtypes
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Entry(NamedTuple):
    """What is known of a tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write(path: Path, entries: list[Entry], tensors: Iterator[torch.Tensor]) -> None:
    """A safetensors file of `entries`, whose tensors are taken one after the other and written as they come.

    The format begins with the place of every tensor, so that names, dtypes and shapes must be known first: eight bytes that count those
    of a JSON header, the header padded with blanks, the tensors without gaps. Raises ValueError for a tensor unlike its entry and
    TypeError for a dtype that the format does not name. Source: huggingface/safetensors, README.
    """
    header, end = {}, 0
    for name, dtype, shape in entries:
        if dtype not in DTYPES:
            raise TypeError(f"tensor_file: {name} is {dtype}; a file holds {', '.join(map(str, DTYPES))}")
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in entries:
            tensor = next(tensors)
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"tensor_file: {name} was announced as {dtype} {list(shape)}; got {tensor.dtype} {list(tensor.shape)}")
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor  # else it would live on while the next one is made
