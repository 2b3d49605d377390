"""Which implementation of an op runs, over which ranks, and why not the others?"""

import contextlib
import functools
import logging
import os

import torch
import torch.distributed

BACKENDS = ("triton", "cuda", "cpu", "reference")
COMPILED = object()
HALF = (torch.float16, torch.bfloat16)

_LIBRARY = torch.library.Library("fuseer", "FRAGMENT")
_LOG = logging.getLogger("fuseer.kernels")
_passed_over = set()


def register(name, schema, fake, **bodies):
    """Define fuseer::`name` once per backend: overload `name`.`backend`, all with one schema; the overloads by backend.

    `fake`: one for all, or {backend: its own, None: that of the others}, where what a backend keeps for its gradient has other dtypes.

    A body is the Python implementation, or COMPILED where csrc/library.cpp registers it (without the extension that overload
    stays empty, and the backend's unsupported() says why). The schema lives in Python alone: torch checks the C++ signature
    against it whichever of the two is loaded first, and an installation without a compiler has the same ops.
    """
    overloads = {}
    for backend, body in bodies.items():
        _LIBRARY.define(f"{name}.{backend}{schema}")
        if body is not COMPILED:
            _LIBRARY.impl(f"{name}.{backend}", _outside_autocast(body), "CompositeExplicitAutograd")
        fake_of_backend = fake.get(backend, fake[None]) if isinstance(fake, dict) else fake
        torch.library.register_fake(f"fuseer::{name}.{backend}", fake_of_backend, lib=_LIBRARY)
        overloads[backend] = getattr(getattr(torch.ops.fuseer, name), backend)
    return overloads


def define(name, schema):
    """Defines fuseer::`name`, a part of some op's body that csrc/library.cpp implements, and returns it; nobody else calls it."""
    _LIBRARY.define(f"{name}{schema}")
    return getattr(torch.ops.fuseer, name).default


def _outside_autocast(body):
    """`body` with autocast off: an op's arithmetic has the dtype that its docstring says, wherever it is called."""

    @functools.wraps(body)
    def outside(*arguments):
        with torch._C._DisableAutocast():
            return body(*arguments)

    return outside


def backend_of(impl):
    """The backend's name: the module's own, without the underscore."""
    return impl.__name__.rpartition(".")[2].lstrip("_")


def choose(op, impls, backend, *args):
    """The name of the backend that runs `op` on `args`.

    Asked by name (`backend`, else the environment's FUSEER_BACKEND) it is that one or an error: ValueError for a name that is no
    backend, RuntimeError with the reason where it cannot run. Unasked it is the first of `impls` that can, and each one passed
    over is named once, with its reason, in the log fuseer.kernels: a warning where only the reference is left, else information.
    """
    asked = os.environ.get("FUSEER_BACKEND") or None if backend is None else backend
    if asked is not None and asked not in BACKENDS:
        source = "FUSEER_BACKEND" if backend is None else "backend"
        raise ValueError(f"{op}: {source} must be one of {', '.join(BACKENDS)}; got {asked!r}")
    reasons = []
    for impl in impls:
        name = backend_of(impl)
        if asked is not None and name != asked:
            continue
        reason = None if name == "reference" else impl.unsupported(*args)
        if reason is None:
            if reasons and not torch.compiler.is_compiling():
                _tell(op, name, reasons)
            return name
        reasons.append(f"{name}: {reason}")
    have = ", ".join(backend_of(impl) for impl in impls)
    why = "; ".join(reasons) or f"{op} has no such backend"
    raise RuntimeError(f"{op}: backend {asked!r} was asked for and cannot run ({why}); available for {op}: {have}")


def _tell(op, name, reasons):
    for reason in reasons:
        key = (op, name, reason.partition(":")[0])
        if key not in _passed_over:
            _passed_over.add(key)
            _LOG.log(logging.WARNING if name == "reference" else logging.INFO, "%s: runs on %s (%s)", op, name, reason)


def group_name(op, group):
    """The name under which an op's schema carries `group`; '' for None, which means this process alone."""
    if group is None:
        return ""
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"{op}: group must be None (this process alone) or a ProcessGroup this rank belongs to; got {group!r}")
    return group.group_name


def all_reduce(tensor, reduction, name):
    """`tensor` reduced ("sum" or "max") over the group of that name, as a new tensor; itself where the name is ''."""
    if not name:
        return tensor
    reduced = torch.ops._c10d_functional.all_reduce(tensor.contiguous(), reduction, name)
    return torch.ops._c10d_functional.wait_tensor(reduced)


def gather_rows(tensor, name, same_rows=False, counts=None):
    """(the rows [M, ...] of all ranks in rank order, how many each brought, this rank) for the group of that name; alone where it is ''.

    Ranks may bring different numbers of rows, and none. Unless `counts` are known already, or `same_rows` promises them to be equal, they
    are exchanged first, which on a GPU waits for the device. No gradient.
    """
    if not name:
        return tensor, [len(tensor)], 0
    group = torch.distributed.distributed_c10d._resolve_process_group(name)
    if counts is None and same_rows:
        counts = [len(tensor)] * group.size()
    if counts is None:
        counts = _all_gather(torch.tensor([len(tensor)], device=tensor.device), group).tolist()
    longest = max(counts)
    padded = tensor.contiguous()
    if len(tensor) < longest:
        padded = torch.cat([padded, padded.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    every = _all_gather(padded, group)
    if min(counts) < longest:
        every = torch.cat([part[:count] for part, count in zip(every.split(longest), counts, strict=True)])
    return every, counts, group.rank()


def _all_gather(tensor, group):
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(tensor, group.size(), group.group_name)
    return torch.ops._c10d_functional.wait_tensor(gathered)


def mean_share(rows, name):
    """W / (rows of all ranks), by which a rank's sum over its own rows is multiplied: a scalar in the compute dtype; no host sync."""
    counts = all_reduce(torch.tensor([len(rows), 1], dtype=torch.float64, device=rows.device), "sum", name)
    return (counts[1] / counts[0].clamp_min(1)).to(compute_dtype(rows.dtype))


def indices_are_checked(device):
    """Whether values of an index tensor are looked at: always on the CPU; elsewhere, where that waits for the device, when asked for."""
    return device.type == "cpu" or os.environ.get("FUSEER_CHECK_INDICES") == "1"


def compute_dtype(dtype):
    """The dtype of an op's arithmetic, codes and losses: float32 for half inputs, the input's own otherwise."""
    return torch.float32 if dtype in HALF else dtype


def widened(function):
    """The forward body of a plain reference: all but indices in the compute dtype of the first; outputs contiguous, as the fakes say."""

    def forward(first, *rest):
        dtype = compute_dtype(first[0].dtype if isinstance(first, (list, tuple)) else first.dtype)
        out = function(*(_cast(value, dtype) for value in (first, *rest)))
        return tuple(x.contiguous() for x in out) if isinstance(out, tuple) else out.contiguous()

    return forward


def differentiated(function):
    """The backward body of a plain reference: d<dout, function(first, ...)>/d(first) by autograd; contiguous, in the dtype of `first`.

    Where `first` is a list of tensors of one shape, their gradients come stacked.
    """

    def backward(dout, first, *rest):
        listed = isinstance(first, (list, tuple))
        given = first if listed else [first]
        dtype = compute_dtype(given[0].dtype)
        with recording():
            leaves = [x.detach().to(dtype).requires_grad_() for x in given]
            out = function(leaves if listed else leaves[0], *(_cast(value, dtype) for value in rest))
            grads = torch.autograd.grad(out, leaves, dout.to(out.dtype), materialize_grads=True)
        return (torch.stack(grads) if listed else grads[0]).to(given[0].dtype).contiguous()

    return backward


def gradients(function, dout, leaves):
    """d<dout, function(*leaves)>/d(leaf) of each leaf, None of None: by autograd in dout's compute dtype, contiguous, in the leaf's own."""
    dtype = compute_dtype(dout.dtype)
    with recording():
        taken = [x if x is None else x.detach().to(dtype).requires_grad_() for x in leaves]
        wanted = [x for x in taken if x is not None]
        found = iter(torch.autograd.grad(function(*taken), wanted, dout.to(dtype), materialize_grads=True))
    return [x if x is None else next(found).to(x.dtype).contiguous() for x in leaves]


@contextlib.contextmanager
def recording():
    """Lets autograd record inside an op's body: below a TorchDispatchMode (opcheck, flop counters) its keys are switched off there."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.AutogradOther, keys.AutogradNestedTensor, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def widened_list(tensors, like):
    """Each tensor in the compute dtype of the one at its place in `like`."""
    return [x.to(compute_dtype(other.dtype)) for x, other in zip(tensors, like, strict=True)]


def changed(*lists):
    """Has autograd know that an op wrote these tensors: a graph that kept one refuses its backward, as after torch's in-place ops."""
    if not torch.compiler.is_compiling():
        for tensors in lists:
            if tensors:
                torch.autograd.graph.increment_version(tensors)


def _cast(value, dtype):
    if isinstance(value, (list, tuple)):
        return [_cast(x, dtype) for x in value]
    return value.detach().to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
