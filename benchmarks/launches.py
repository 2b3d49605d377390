"""Which launches would host code make on a GPU that is not there, and what does Triton compile them to?"""

import contextlib
import functools
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.machine_code import ARCHES, machine_code, occupancy


@dataclass(frozen=True)
class Launch:
    """One recorded launch with all that compiling it needs, and the bytes of the tensors it was given, by (storage, offset)."""

    kernel: object
    programs: int
    signature: dict
    constants: dict
    attributes: dict
    options: dict
    arch: int
    given: dict

    @property
    def name(self):
        return self.kernel.fn.__name__

    def __str__(self):
        constants = ", ".join(f"{self.kernel.arg_names[place]}={value}" for (place, *_), value in self.constants.items())
        return f"{self.name} for sm_{self.arch} with {constants}, {self.options}"

    def source(self):
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)

    @functools.cached_property
    def key(self):
        """A digest, equal for launches that are one compiled kernel as long as the sources stay."""
        parts = (self.kernel.__module__, self.signature, self.constants, self.attributes, sorted(self.options.items()))
        return hashlib.sha256(f"{self} {parts}".encode()).hexdigest()[:16]


class PretendedDriver:
    """What Triton asks of a driver before it compiles. The device's name keeps its caches apart from those of real devices."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return f"pretended sm_{self.arch}"

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def recorded(arch):
    """A list that fills with the launches made inside, as Triton specialises them for `arch`; none is compiled, none runs."""
    launches, seen = [], {}

    def keep(**told):
        seen.update(told["compile"])
        return True

    def getitem(kernel, grid):
        def launch(*args, **kwargs):
            kernel.run(*args, grid=grid, warmup=True, **kwargs)
            options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
            bound = kernel.signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in options})
            sizes = grid(bound.arguments) if callable(grid) else grid
            tensors = [x for x in tree_leaves(dict(bound.arguments)) if isinstance(x, torch.Tensor)]
            given = {(storage(x), x.storage_offset()): nbytes(x) for x in tensors}
            compiled = (dict(seen["signature"]), dict(seen["constants"]), dict(seen["configs"][0]))
            launches.append(Launch(kernel, math.prod(sizes), *compiled, options, arch, given))

        return launch

    with (
        mock.patch.object(triton.runtime.driver, "_active", PretendedDriver(arch)),
        mock.patch.object(triton.runtime.JITFunction, "__getitem__", getitem),
        triton.knobs.runtime.scope(),
    ):
        triton.knobs.runtime.jit_cache_hook = keep
        yield launches


def storage(tensor):
    return tensor.untyped_storage()._cdata


def nbytes(tensor):
    """Bytes of the distinct elements: an axis of stride 0 counts once."""
    return tensor.itemsize * math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)


def compiled(launches):
    """{key: facts} of {key: launch}; RuntimeError naming all that do not compile."""
    with ThreadPoolExecutor(2) as pool:
        facts = dict(zip(launches, pool.map(_compile, launches.values()), strict=True))
    failed = [f"{launches[key]}: {error}" for key, error in facts.items() if isinstance(error, str)]
    if failed:
        raise RuntimeError("these launches do not compile\n" + "\n".join(failed))
    return facts


def _compile(launch):
    """Facts about the launch's machine code, or why there is none, in words."""
    try:
        made = triton.compile(launch.source(), target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    except (RuntimeError, triton.TritonError) as error:
        # the first line says where, the last one why; between them stands the source
        said = str(error).strip().splitlines()
        return " ".join(dict.fromkeys((f"{type(error).__name__}:", said[0], said[-1].strip())))
    facts = {**machine_code(made.asm["cubin"]), "shared": made.metadata.shared, "threads": 32 * made.metadata.num_warps}
    return facts | {"ctas": made.metadata.num_ctas, "occupancy": occupancy(ARCHES[launch.arch], facts)}
