"""Which program updates which numbers of a list of tensors? The table in device memory by which kernels find them."""

import contextlib
import functools
import math
from typing import NamedTuple

import numpy as np
import torch

from fuseer.kernels import checks
from fuseer.kernels._tl import tl, triton

# columns of a row: addresses of up to three tensors; then the numbers [start, stop) behind those addresses; program p of the launch
# takes `each` blocks from block origin + p * each on; the layer and whether it is adapted; what the tensors are, see `_tensors`
PLACES = 3
START, STOP, ORIGIN, EACH, LAYER, ADAPTED, KIND, FIELDS = (tl.constexpr(PLACES + column) for column in range(8))
CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.float64: 4}
ALIGNED = tl.constexpr(16**PLACES)
# bytes of the widest access of a thread
ACCESS = 16
TABLES = 128

# tables that a CUDA graph reads whenever it is replayed, which may be for as long as the process lives
_captured = {}


class Table(NamedTuple):
    """Pieces of tensors, cut into blocks, dealt out to the programs of a launch.

    rows int64 [pieces, FIELDS]: a piece is a tensor or a segment of it, none is empty, in the order of their layers. owners int32
    [programs]: the row of each program. layers int64 [layers + 1]: programs layers[l] to layers[l + 1] - 1 are those of layer l.
    kinds: the different kinds among the rows, sorted. memory: all three, as they were brought to the device.
    """

    rows: torch.Tensor
    owners: torch.Tensor
    layers: torch.Tensor
    kinds: tuple
    memory: torch.Tensor

    @property
    def programs(self):
        return len(self.owners)


@contextlib.contextmanager
def flat(*lists, written):
    """The lists, fit to be walked as memory: tensors of one place whose strides differ or leave gaps are contiguous copies.

    Copies of the lists whose numbers are `written` are copied back in the end. An empty list stands for an absent one.
    """
    given = [list(tensors) for tensors in lists]
    dense = all(all(map(torch.Tensor.is_contiguous, tensors)) for tensors in lists)
    strided = [] if dense else [i for i, place in enumerate(zip(*filter(None, lists), strict=True)) if not walkable(place)]
    for tensors in filter(None, given):
        for i in strided:
            tensors[i] = tensors[i].contiguous()
    yield given
    for number in written:
        for i in strided if lists[number] else ():
            if given[number][i] is not lists[number][i]:
                lists[number][i].copy_(given[number][i])


def walkable(tensors):
    """Whether tensors of one shape lie alike and without gaps, so that the n-th numbers in memory belong together."""
    if all(x.is_contiguous() for x in tensors):
        return True
    steps, *others = ([(stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1] for x in tensors)
    dense = 1
    for stride, size in sorted(steps):
        if stride != dense:
            return False
        dense *= size
    return all(other == steps for other in others)


def table(lists, *, block, most=None, segments=None, adapt=None):
    """The Table of what `flat` gave, cut into blocks of `block` numbers, at most `most` programs a piece, each at least one block.

    segments, adapt: as lars_update_ takes them; without them every tensor is a layer, and adapted. Tables are kept, by the addresses,
    sizes and dtypes of all tensors: a table holds nothing else, so that one of freed tensors is right for those that follow in
    their memory. Bringing a new one to the device waits for that copy alone, on a stream of its own. RuntimeError where a CUDA
    graph is being captured and there is no table yet.
    """
    first = next(tensors for tensors in lists if tensors)
    numels = tuple(map(torch.Tensor.numel, first))
    addresses = tuple(tuple(map(torch.Tensor.data_ptr, tensors)) for tensors in lists)
    dtypes = tuple(tuple(x.dtype for x in tensors) for tensors in lists)
    layers = None if segments is None else segments.numpy().tobytes()
    found = _built(first[0].device, numels, addresses, dtypes, layers, None if adapt is None else tuple(adapt), block, most)
    if first[0].is_cuda:
        if torch.cuda.is_current_stream_capturing():
            _captured[id(found.memory)] = found
        else:
            # whoever takes the place of a table that is forgotten waits until this stream has read it
            found.memory.record_stream(torch.cuda.current_stream(first[0].device))
    return found


@functools.lru_cache(maxsize=TABLES)
def _built(device, numels, addresses, dtypes, segments, adapt, block, most):
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "ema_update_, lars_update_: a CUDA graph can be captured once the table of its tensors is on the device; got tensors without; "
            "call the op once on these very tensors before the capture, and let all tensors of a place have equal strides and no gaps"
        )
    if segments is None:
        pieces = np.array([(i, 0, numel, i) for i, numel in enumerate(numels)], dtype=np.int64).reshape(-1, 4)
    else:
        pieces = np.frombuffer(segments, dtype=np.int64).reshape(-1, 4)
        checks.segments_inside("lars_update_", pieces.tolist(), numels, len(adapt))
    adapted = np.ones(len(numels), np.int64) if adapt is None else np.array(adapt, dtype=np.int64)
    pieces = pieces[pieces[:, 2] > 0]
    pieces = pieces[np.argsort(pieces[:, 3], kind="stable")]
    rows, runs = _rows(pieces, *_tensors(len(numels), addresses, dtypes), adapted, block, most)
    layers = np.zeros(len(adapted) + 1, np.int64)
    np.add.at(layers[1:], pieces[:, 3], runs)
    owners = np.repeat(np.arange(len(rows), dtype=np.int32), runs)
    return _brought(rows, owners, layers.cumsum(), device)


def _tensors(count, addresses, dtypes):
    """Of each tensor's place in the lists: addresses [count, PLACES], numbers before its own, and its kind, [count] each.

    kind: CODES of the dtypes, a hexadecimal digit for each list, and ALIGNED where blocks of it start at multiples of ACCESS bytes. What
    is off by the same few numbers in every list is made so: its addresses are moved down, and the numbers before its own left alone.
    """
    memory, before, kinds = np.zeros((count, PLACES), np.int64), np.zeros(count, np.int64), np.zeros(count, np.int64)
    for i in range(count):
        given = [(place, addresses[place][i], dtypes[place][i]) for place in range(len(addresses)) if addresses[place]]
        off = [
            shift
            for shift in range(ACCESS // min(dtype.itemsize for *_, dtype in given))
            if not any((address - shift * dtype.itemsize) % ACCESS for _, address, dtype in given)
        ]
        before[i] = off[0] if off else 0
        kinds[i] = int(ALIGNED) if off else 0
        for place, address, dtype in given:
            memory[i, place] = address - before[i] * dtype.itemsize
            kinds[i] |= CODES[dtype] * 16**place
    return memory, before, kinds


def _rows(pieces, memory, before, kinds, adapted, block, most):
    """Rows of the table, and how many programs each gets."""
    tensor, start, numel, layer = pieces.T
    start = start + before[tensor]
    stop = start + numel
    first = start // block
    blocks = -(-stop // block) - first
    each = np.ones_like(blocks) if most is None else np.maximum(1, -(-blocks // most))
    runs = -(-blocks // each)
    origin = first - (runs.cumsum() - runs) * each
    columns = (start, stop, origin, each, layer, adapted[layer], kinds[tensor])
    return np.column_stack([memory[tensor], *columns]), runs


def _brought(rows, owners, layers, device):
    """The Table on the device, by one copy."""
    parts = [rows.ravel(), layers, np.frombuffer(owners.tobytes().ljust(8 * math.ceil(len(owners) / 2), b"\0"), np.int64)]
    host = torch.from_numpy(np.concatenate(parts))
    if device.type == "cuda":
        # waiting for a copy on the current stream would be waiting for all that it has yet to do
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            memory = host.to(device)
    else:
        memory = host.to(device)
    found, ends, whose = memory.split([len(part) for part in parts])
    kinds = tuple(np.unique(rows[:, -1]).tolist())
    return Table(found.view(rows.shape), whose.view(torch.int32)[: len(owners)], ends, kinds, memory)


@triton.jit
def own_row(rows_ptr, owners_ptr):
    """Where the row of this program begins."""
    return rows_ptr + tl.load(owners_ptr + tl.program_id(0)).to(tl.int64) * FIELDS


@triton.jit
def own_run(row, BLOCK: tl.constexpr):
    """Of this program: its first block and how many; and the row's numbers [start, stop)."""
    start, stop, each = tl.load(row + START), tl.load(row + STOP), tl.load(row + EACH)
    first = tl.load(row + ORIGIN) + tl.program_id(0) * each
    return first, tl.minimum(each, tl.cdiv(stop, BLOCK) - first).to(tl.int32), start, stop


@triton.jit
def numbers(row, PLACE: tl.constexpr, LAYOUT: tl.constexpr):
    """The tensor of a row that was in list PLACE, of the dtype and alignment that LAYOUT, one of Table.kinds, says; None without one."""
    CODE: tl.constexpr = (LAYOUT // 16**PLACE) % 16
    x_ptr = None
    if CODE != 0:
        address = tl.load(row + PLACE)
        if CODE == 1:
            x_ptr = address.to(tl.pointer_type(tl.float32))
        elif CODE == 2:
            x_ptr = address.to(tl.pointer_type(tl.bfloat16))
        else:
            x_ptr = address.to(tl.pointer_type(tl.float16))
        # blocks without a mask are read 128 bits at once if this is known, else 32
        if LAYOUT >= ALIGNED:
            x_ptr = tl.multiple_of(x_ptr, 16)
    return x_ptr
