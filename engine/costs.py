"""What does one forward and backward pass of a configuration compute and keep in memory? Told without data, a GPU or the memory."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fuseer.engine.accelerators import peak_here
from fuseer.engine.config import TrainConfig
from fuseer.engine.data.view import Batch
from fuseer.engine.distributed import HALF, Ranks, micro_batch
from fuseer.engine.methods.method import Method
from fuseer.engine.models.norm import BatchNorm
from fuseer.engine.run import build_method
from fuseer.engine.teacher import Teachers


@dataclass(frozen=True)
class Size:
    """Parameters of a method by part, and of those that are trained what the optimizer needs to know; `teacher` is that of all teachers."""

    parts: dict[str, int]
    trained: int
    layers: int
    unit_rows: int
    rows: int
    teacher: int


@dataclass(frozen=True)
class Costs:
    """One micro-batch on one rank. `forward` and `executed` (with backward, and what is computed anew for it) are multiply-adds of an image
    in convolutions and matrix products. Bytes of storages beside the weights: `kept` from forward to backward, `peak` with the gradients,
    `peak_consumed` where each gradient is taken away as soon as it is whole, as ZeRO 2 and 3 do.

    `passes`: (pixels, crops, multiply-adds a crop) of each call of a backbone; `norms`: the channels of each call of a BatchNorm.
    """

    forward: int
    executed: int
    kept: int
    peak: int
    peak_consumed: int
    passes: tuple[tuple[int, int, int], ...]
    norms: tuple[int, ...]


def built(config: TrainConfig, micro_batch: int) -> tuple[Method, Teachers]:
    """The method and its teachers on device meta, as a process alone with `micro_batch` images builds them."""
    model = config.model.model_copy(update={"sync_norm_ranks": 0, "compile_blocks": False})
    alone = config.model_copy(update={"batch_size": micro_batch, "accumulation_steps": 1, "model": model})
    with _own_randomness(), torch.device("meta"):
        method = build_method(alone, Ranks(0, 1, 0, 1, torch.device("meta")))
        return method, Teachers(method)


def size_of(method: Method, teachers: Teachers) -> Size:
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    rows = [parameter for parameter in trained if hasattr(parameter, "unit_rows")]
    parts = {"trunk" if name == "backbone" else name: _numel(child.parameters()) for name, child in method.named_children()}
    parts["beside them"] = _numel(method.parameters(recurse=False))
    return Size(
        {name: numel for name, numel in parts.items() if numel},
        _numel(trained),
        len(trained),
        _numel(rows),
        sum(parameter.shape[0] for parameter in rows),
        _numel(teachers.parameters()),
    )


def traced(config: TrainConfig, micro_batch: int) -> Costs:
    """Runs the method itself, forward and backward, on tensors that have shapes and no data.

    Operators are those of a processor: libraries of a GPU may save and compute a little else.
    """
    method, teachers = built(config, micro_batch)
    samples = torch.arange(micro_batch)
    # what a method draws on the host it draws from real numbers, which the mode would hide
    samples.numpy = samples.numpy().copy
    batch = Batch([], samples, torch.full((micro_batch,), -1), 0)
    with FakeTensorMode(allow_non_fake_inputs=True), _own_randomness():
        # under autocast alone the weights stay float32
        half = HALF[config.precision] if config.precision in ("bf16", "fp16") else None
        _fill([*method.modules(), *teachers.modules()], half)
        batch.crops.extend(torch.empty(view.count, micro_batch, 3, view.size, view.size) for view in method.views)
        method.train()
        method.after_step(0)
        kept = _Pass(method, batch, config)
        consumed = _Pass(method, batch, config, consume=True)
    return Costs(
        kept.forward // micro_batch,
        kept.executed // micro_batch,
        kept.after_forward,
        kept.peak,
        consumed.peak,
        tuple(kept.passes),
        tuple(kept.norms),
    )


def mfu_of_an_image(config: TrainConfig, ranks: Ranks) -> float | None:
    """The share of all GPUs' peak that one image a second takes, without what is computed twice; None where no peak is known."""
    peak = peak_here(config.precision)
    if peak is None:
        return None
    model = config.model.model_copy(update={"recompute": (), "recompute_min_size": 0})
    costs = traced(config.model_copy(update={"model": model}), micro_batch(config, ranks.world_size))
    return 2 * costs.executed / (peak * ranks.world_size)


def _own_randomness():
    """A method is built from a seed, which a run in this process must not notice."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else [])


def _numel(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _fill(modules: list[nn.Module], half: torch.dtype | None) -> None:
    """Puts tensors of the mode in force in the place of those on meta; parameters that two modules share stay one."""
    twins: dict[int, torch.Tensor] = {}

    def twin(tensor, dtype):
        if id(tensor) not in twins:
            new = torch.empty(tensor.shape, dtype=dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                new.__dict__.update(tensor.__dict__)
            twins[id(tensor)] = new
        return twins[id(tensor)]

    for module in modules:
        for own, cast in ((module._parameters, half), (module._buffers, None)):
            own.update({name: twin(tensor, cast or tensor.dtype) for name, tensor in own.items() if tensor is not None})


def _multiply_adds(func, args, kwargs, out) -> int:
    packet = func._overloadpacket
    if packet is torch.ops.aten.convolution_backward:
        # torch 2.14's own formula counts the groups of a weight's gradient twice
        wanted = sum(args[10][:2])
        return wanted * (args[1] if args[7] else args[0]).numel() * args[2][0].numel()
    return flop_registry[packet](*args, **kwargs, out_val=out) // 2 if packet in flop_registry else 0


class _Pass(TorchDispatchMode):
    """One forward and backward, watched: what every operator allocates until nobody holds it any more."""

    def __init__(self, method: Method, batch: Batch, config: TrainConfig, *, consume: bool = False):
        super().__init__()
        self.live = self.peak = self.executed = 0
        self.passes: list[tuple[int, int, int]] = []
        self.norms: list[int] = []
        self._seen = weakref.WeakSet()
        for tensor in (*method.parameters(), *method.buffers(), *(p for t in method.teacher_of for p in method.__dict__[t].parameters())):
            self._seen.add(tensor.untyped_storage())
        cast = {"dtype": HALF.get(config.precision), "enabled": config.precision in HALF, "cache_enabled": not config.model.recompute}
        hooks = [parameter.register_post_accumulate_grad_hook(_forget) for parameter in method.parameters() if consume]
        with self:
            with self._watching(method), torch.autocast("cpu", **cast):
                total = method(batch).total
            self.forward, self.after_forward = self.executed, self.live
            total.backward()
        for hook in hooks:
            hook.remove()
        method.zero_grad()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.executed += _multiply_adds(func, args, kwargs or {}, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._account(tensor.untyped_storage())
        return out

    def _account(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, size: int) -> None:
        self.live -= size

    @contextmanager
    def _watching(self, method: Method) -> Iterator[None]:
        """Notes the calls of backbones and of norms; not those of a recomputation, which come later."""
        before = []

        def enter(module, args):
            before.append(self.executed)

        def leave(module, args, output):
            images = args[0]
            self.passes.append((images.shape[-1], len(images), (self.executed - before.pop()) // len(images)))

        networks = [method, *(method.__dict__[name] for name in method.teacher_of)]
        norms = {module for network in networks for module in network.modules() if isinstance(module, BatchNorm)}
        hooks = [norm.register_forward_pre_hook(lambda norm, args: self.norms.append(norm.num_features)) for norm in norms]
        hooks += [method.backbone.register_forward_pre_hook(enter), method.backbone.register_forward_hook(leave)]
        yield
        for hook in hooks:
            hook.remove()


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None
