"""What do interpreted Triton kernels read, write and launch, and do they touch only memory that is theirs?

Loaded by pytest as a plugin (-p interpreter) in processes with TRITON_INTERPRET=1, where it also mends the interpreter: bfloat16
is rounded to nearest, tl.fma rounds once, a lane that is masked off loads NaN where the kernel names no other value; and a launch
prepares a module of kernels once, not at every call of a function in it, which is most of the time.
"""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch
import triton.language as tl
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter


def pytest_configure():
    mend()
    hasten()


def hasten():
    """Has triton.language patched once a launch and module."""
    patch, run, patched = interpreter._patch_lang, interpreter.InterpretedFunction.run, set()

    def patch_once(function):
        if function.__module__ in patched:
            return interpreter._LangPatchScope()
        patched.add(function.__module__)
        return patch(function)

    def run_anew(self, *args, **options):
        patched.clear()
        return run(self, *args, **options)

    interpreter._patch_lang, interpreter.InterpretedFunction.run = patch_once, run_anew


def mend():
    """Makes the interpreter compute what a GPU computes, where it does not."""
    builder = interpreter.InterpreterBuilder
    cast, load = builder.cast_impl, builder.create_masked_load

    def cast_impl(self, source, dtype):
        if source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), dtype.scalar)
        return cast(self, source, dtype)

    def create_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    def create_masked_load(self, pointers, mask, other, *hints):
        if other is None and pointers.get_element_ty() in (tl.float16, tl.float32, tl.float64):
            dtype = pointers.get_element_ty()
            other = interpreter.TensorHandle(np.full(pointers.data.shape, np.nan, interpreter._get_np_dtype(dtype)), dtype)
        return load(self, pointers, mask, other, *hints)

    builder.cast_impl, builder.create_fma, builder.create_masked_load = cast_impl, create_fma, create_masked_load


@dataclass
class Traffic:
    """Bytes that crossed a tensor's memory, and how many of them are different bytes."""

    read: int
    read_once: int
    written: int
    written_once: int


@dataclass
class Count:
    """What the launches inside `counted()` did: (kernel, grid) of each, and every address they read and wrote."""

    launches: list = field(default_factory=list)
    # tensors that kernels were given live until the count ends, so that no address stands for two of them
    given: list = field(default_factory=list)
    reads: list = field(default_factory=list)
    writes: list = field(default_factory=list)

    @property
    def kernels(self):
        return [name for name, _ in self.launches]

    def of(self, tensor):
        """The traffic in the elements of `tensor`, whatever else lies between them."""
        own = addresses(tensor)
        size = tensor.element_size()
        read, written = (_inside(np.concatenate([np.zeros(0, np.uint64), *runs]), own) for runs in (self.reads, self.writes))
        return Traffic(*(size * n for part in (read, written) for n in (len(part), len(np.unique(part)))))


def addresses(tensor):
    """The address of every element, sorted, each once."""
    offsets = np.zeros((), np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = np.add.outer(offsets, np.arange(size) * stride)
    return np.unique(tensor.data_ptr() + tensor.element_size() * offsets.astype(np.int64)).astype(np.uint64)


def _inside(found, own):
    return found[np.isin(found, own)]


@contextlib.contextmanager
def counted(reached=()):
    """Counts the launches made inside. AssertionError where a kernel touches memory outside its tensors, or races.

    Outside is every element that is not one of a tensor in the kernel's arguments, a stranger between strided ones included, nor of those
    that are `reached` by addresses in a table; that list may grow until the launch.
    It races where a launch writes an element twice, or a program reads what another writes: on a GPU these have no order.
    """
    count, builder = Count(), interpreter.interpreter_builder
    execute = interpreter.GridExecutor.__call__
    log = {"reads": [], "writes": []}
    own = np.zeros(0, np.uint64)

    def recording(kind, perform):
        def access(pointers, *rest):
            mask = rest[0] if kind == "reads" else rest[1]
            active = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))[mask.data.astype(bool)]
            # before it happens: outside memory of its own the process would die
            outside = np.setdiff1d(active, own)
            assert not len(outside), f"{kind} outside its tensors, {len(outside)} addresses"
            log[kind].append((active.reshape(-1), builder.grid_idx))
            return perform(pointers, *rest)

        return access

    def run(executor, *args, **options):
        nonlocal own
        tensors = [x for x in tree_leaves((args, options)) if isinstance(x, torch.Tensor)] + list(reached)
        count.given += tensors
        count.launches.append((executor.fn.__name__, tuple(executor.grid)))
        for accesses in log.values():
            accesses.clear()
        own = np.unique(np.concatenate([np.zeros(0, np.uint64), *(addresses(x) for x in tensors)]))
        execute(executor, *args, **options)
        _refuse_races(executor.fn.__name__, log)
        count.reads += [found for found, _ in log["reads"]]
        count.writes += [found for found, _ in log["writes"]]

    def refuse(*_):
        raise AssertionError("an atomic operation: its order, and so its sum, differs between runs")

    with contextlib.ExitStack() as stack:
        for name, replacement in (
            ("create_masked_load", recording("reads", builder.create_masked_load)),
            ("create_masked_store", recording("writes", builder.create_masked_store)),
            ("create_atomic_rmw", refuse),
            ("create_atomic_cas", refuse),
        ):
            setattr(builder, name, replacement)
            stack.callback(delattr, builder, name)
        interpreter.GridExecutor.__call__ = run
        stack.callback(setattr, interpreter.GridExecutor, "__call__", execute)
        yield count


def _refuse_races(kernel, log):
    (read, reader), (written, writer) = (_flat(log[kind]) for kind in ("reads", "writes"))
    where, first = np.unique(written, return_index=True)
    assert len(where) == len(written), f"{kernel} writes an element twice"
    both = np.isin(read, where)
    owner = writer[first][np.searchsorted(where, read[both])]
    assert (owner == reader[both]).all(), f"{kernel}: a program reads what another writes"


def _flat(accesses):
    """All addresses of a launch, and the number of the program that made each."""
    programs = {}
    numbers = [np.full(len(found), programs.setdefault(index, len(programs))) for found, index in accesses]
    return np.concatenate([np.zeros(0, np.uint64), *(found for found, _ in accesses)]), np.concatenate([np.zeros(0, np.int64), *numbers])
