"""What do the Triton kernels become on sm_80, sm_90 and sm_100, and what do they save over eager? Told without a GPU.

python benchmarks/static_gpu.py [op ...] [--arch 80 90 100] [--beside]

Every op with a _triton.py is called at its production shapes on tensors without memory, under a pretended GPU: its own host code
decides what it would launch. Each distinct launch is compiled with Triton's own specialisation and its machine code is read.
A run over everything writes results/static_gpu.json and the tables in docs/gpu.md; with --beside, under another Triton, it adds one
line on what that one made of the kernels.
"""

import argparse
import collections
import contextlib
import datetime
import functools
import hashlib
import importlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from triton.runtime import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.launches import compiled, recorded
from benchmarks.machine_code import ARCHES, tool, wide
from benchmarks.report import fill
from benchmarks.traffic import UPDATED, Eager, floor_bytes, moved_bytes, tensors
from fuseer.kernels import _tl
from fuseer.kernels.testing import Case, inputs, update_inputs

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "static_gpu.json"
PAGE = ROOT / "docs" / "gpu.md"


def _scores(*shape, **options):
    return lambda generator: {"scores": torch.empty(shape, dtype=torch.float64), **options}


def _swapped(*shape):
    return _scores(*shape, queue_scores=None, assign=(0, 1), epsilon=0.05, iterations=3, temperature=0.1)


def _listed(crops, *shape):
    return lambda generator: _swapped(0)(generator) | {"scores": [torch.empty(shape, dtype=torch.float64) for _ in range(crops)]}


def _views(n, d, temperature=0.1):
    shapes = {"z1": (n, d), "z2": (n, d)}
    return lambda generator: _empty(shapes) | {"temperature": temperature, "normalize": True}


def _queue(n, q, d, temperature=0.2):
    shapes = {"query": (n, d), "keys": (q, d), "positive": (n, d)}
    return lambda generator: _empty(shapes) | {"positive_index": None, "temperature": temperature, "normalize": True}


def _empty(shapes):
    return {name: torch.empty(shape, dtype=torch.float64) for name, shape in shapes.items()}


BESIDE = {torch.float32: torch.bfloat16}
# shapes that fill a GPU, and paths that no shape of theirs takes, beside the production cases of cases.py
SHAPES = {
    "sinkhorn": (
        Case("seer_1024", _scores(1024, 16000, epsilon=0.05, iterations=10), production=True),
        Case("dino_64", _scores(64, 131072, epsilon=0.05, iterations=3), production=True, dtype=torch.bfloat16),
        Case("ibot_4096", _scores(4096, 131072, epsilon=0.05, iterations=3), production=True, dtype=torch.bfloat16),
        Case("wide_64", _scores(64, 262144, epsilon=0.05, iterations=3), production=True, dtype=torch.bfloat16),
    ),
    "swapped_prediction": (
        Case("seer_64", _swapped(8, 64, 16000), production=True),
        Case("listed_64", _listed(8, 64, 3000), production=True),
    ),
    "nt_xent": (
        Case("cold_8192", _views(4096, 128, temperature=0.02), production=True),
        Case("half_8192", _views(4096, 128), production=True, dtype=torch.float16),
        Case("wide_8192", _views(4096, 256), production=True),
        Case("strips_8192", _views(4096, 512), production=True),
    ),
    "info_nce": (
        Case("cold_256", _queue(256, 65536, 128, temperature=0.02), production=True),
        Case("half_256", _queue(256, 65536, 128), production=True, dtype=torch.float16),
        Case("strips_256", _queue(256, 65536, 512), production=True),
    ),
}


@dataclass(frozen=True)
class Call:
    """One op's forward, and backward where it is differentiable, at one shape on one architecture.

    forward, backward: the recorded launches; torch_ops and torch_bytes: what the host code leaves to torch beside them.
    """

    op: str
    case: Case
    dtype: torch.dtype
    arch: int
    arguments: dict
    outputs: tuple
    forward: list
    backward: list
    torch_ops: int
    torch_bytes: int

    @property
    def launches(self):
        return self.forward + self.backward

    @property
    def aligned(self):
        """Whether the rows of every matrix start at multiples of 16 bytes, so that 128-bit loads are possible at all."""
        if self.op in UPDATED:
            return True
        matrices = [x for x in tensors(self.arguments) if x.dim() > 1 and x.is_floating_point()]
        return all(x.shape[-1] * x.itemsize % 16 == 0 for x in matrices)


def ops():
    return sorted(path.parent.name for path in (ROOT / "kernels").glob("*/_triton.py"))


def cases(op, arch):
    """(case, dtype) of every production shape in the case's own dtype, in bfloat16 too where that is float32; on sm_90 of the others too.

    Those are small and awkward: Triton compiles an integer argument of 1 as a constant, which a kernel may not be written for.
    """
    known = _module(op, "cases").CASES
    production = (*(case for case in known if case.production), *SHAPES.get(op, ()))
    found = [(case, dtype) for case in production for dtype in dict.fromkeys((case.dtype, BESIDE.get(case.dtype, case.dtype)))]
    return found + [(case, case.dtype) for case in known if not case.production and arch == 90]


def weightless(op, case, dtype):
    """The case's arguments as meta tensors: shapes, strides and dtypes without memory; segments, which are the host's, as they are."""
    dtypes, empty = {} if op in UPDATED else {torch.float64: dtype}, functools.partial(torch.empty_strided, device="meta")
    with FakeTensorMode():
        listed = functools.partial(update_inputs, dtype_of=lambda name, i: torch.bfloat16 if name in case.halves else dtype)
        made = listed(case) if op in UPDATED else inputs(case, dtype)
    made = tree_map_only(torch.Tensor, lambda x: empty(x.shape, x.stride(), dtype=dtypes.get(x.dtype, x.dtype)), made)
    if made.get("segments") is not None:
        made["segments"] = case.build(torch.Generator())["segments"]
    return made


def _module(op, name):
    return importlib.import_module(f"fuseer.kernels.{op}.{name}")


def differentiated(function, op, arguments):
    """The output of one call; then, where the op is differentiable, the gradient of each differentiable argument that is there."""
    names = [name for name in _module(op, "cases").DIFFERENTIABLE if arguments[name] is not None]
    leaves = tree_map_only(torch.Tensor, lambda x: x.detach().requires_grad_(), {name: arguments[name] for name in names})
    out = function(**arguments | leaves)
    yield out
    if leaves:
        yield from torch.autograd.grad(out, tensors(leaves), torch.empty_like(out))


def call(op, case, dtype, arch):
    """What one call of the public op, and its gradient, would launch on `arch`."""
    door, backend, arguments = _module(op, "op"), _module(op, "_triton"), weightless(op, case, dtype)
    target = _tl.Target((arch // 10, arch % 10), ARCHES[arch].multiprocessors)
    bodies = {"RAW": "forward", "RAW_BACKWARD": "backward"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_tl, "target", lambda device: target))
        stack.enter_context(mock.patch.object(backend, "unsupported", lambda *args: None))
        for table, body in bodies.items():
            if hasattr(door, table):
                stack.enter_context(mock.patch.dict(getattr(door, table), triton=getattr(backend, body)))
        launches, function = stack.enter_context(recorded(arch)), functools.partial(getattr(door, op), backend="triton")
        if op in UPDATED:
            # the first call brings a table to the device, which those of a training find there
            function(**arguments)
            launches.clear()
        beside = stack.enter_context(Eager())
        steps = differentiated(function, op, arguments)
        outputs = [next(steps)]
        forward = len(launches)
        outputs += steps
    made = (launches[:forward], launches[forward:], beside.ops, beside.bytes)
    return Call(op, case, dtype, arch, arguments, tuple(outputs), *made)


def eager(op, arguments):
    """(ops, bytes) of the official formulation in benchmarks/kernels/<op>.py, forward and backward."""
    baseline = importlib.import_module(f"benchmarks.kernels.{op}")
    given = getattr(baseline, "prepared", lambda arguments: arguments)(arguments)
    with Eager() as counted:
        collections.deque(differentiated(baseline.official, op, given), maxlen=0)
    return counted.ops, counted.bytes


def calls(names, arches):
    """Every call of the ops named, recorded for every architecture."""
    return [call(op, case, dtype, arch) for op in names for arch in arches for case, dtype in cases(op, arch)]


def call_rows(made):
    """What each production call launches and moves, beside the official formulation."""
    return [_call_row(called) for called in made if called.case.production]


def _call_row(called):
    eager_ops, eager_bytes = eager(called.op, called.arguments)
    return {
        "op": called.op,
        "case": called.case.name,
        "dtype": str(called.dtype).removeprefix("torch."),
        "arch": called.arch,
        "launches": [len(called.forward), len(called.backward)],
        "torch_ops": called.torch_ops,
        "kernels": dict(collections.Counter(launch.name for launch in called.launches)),
        "eager_ops": eager_ops,
        "floor_bytes": floor_bytes(called),
        "moved_bytes": moved_bytes(called),
        "eager_bytes": eager_bytes,
    }


def kernel_rows(made):
    """Every distinct kernel of the calls, not yet compiled: {(op, key): row} and {key: launch}.

    production: whether a production shape launches it; aligned: whether one does whose rows allow 128-bit loads.
    """
    rows, launches = {}, {}
    for called in made:
        for launch in called.launches:
            constants = {launch.kernel.arg_names[place]: str(value) for (place, *_), value in launch.constants.items()}
            new = {"op": called.op, "kernel": launch.name, "arch": launch.arch, "key": launch.key, "cases": []}
            row = rows.setdefault((called.op, launch.key), new | {"production": False, "aligned": False, "constants": constants})
            case = f"{called.case.name} {str(called.dtype).removeprefix('torch.')}"
            row["cases"] += [case] if case not in row["cases"] else []
            row["production"] |= called.case.production
            row["aligned"] |= called.case.production and called.aligned
            launches[launch.key] = launch
    return rows, launches


def source(op):
    """A digest of the kernels an op may launch: its own and those of kernels/_*.py, wherever in their files they stand."""
    ground = [importlib.import_module(f"fuseer.kernels.{path.stem}") for path in sorted((ROOT / "kernels").glob("_*.py"))]
    texts = [value.src for module in (*ground, _module(op, "_triton")) for value in vars(module).values() if isinstance(value, JITFunction)]
    return hashlib.sha256("".join(sorted(texts)).encode()).hexdigest()[:16]


def versions():
    """What the numbers depend on, and when they were made."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "none",
        "triton": triton.__version__,
        "torch": torch.__version__,
        "ptxas": re.search(r"V([\d.]+)", tool(triton.knobs.nvidia.ptxas.path, "--version")).group(1),
    }


def _table(head, rows):
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)])


def call_table(calls):
    """One line per call on sm_90, or on the first architecture there is."""
    head = ("op", "case", "dtype", "launches", "eager ops", "must move, MB", "moved, MB", "eager moves, MB", "eager / ours")
    arch = 90 if any(row["arch"] == 90 for row in calls) else calls[0]["arch"]
    rows = []
    for row in (row for row in calls if row["arch"] == arch):
        moved = [f"{row[name] / 1e6:,.1f}" for name in ("floor_bytes", "moved_bytes", "eager_bytes")]
        launches = " + ".join(str(count) for count in (*row["launches"], row["torch_ops"]) if count)
        ratio = f"{row['eager_bytes'] / row['moved_bytes']:.1f}"
        rows.append((row["op"], row["case"], row["dtype"], launches, str(row["eager_ops"]), *moved, ratio))
    return _table(head, rows)


def kernel_table(kernels):
    """One line per kernel and architecture, the worst of its production variants in every column."""
    head = ["op", "kernel", "sm", "variants", "registers", "spills", "shared, B", "occupancy"]
    head += ["128-bit loads", "128-bit stores", "MUFU", "MMA"]
    groups = {}
    for row in (row for row in kernels if row["production"]):
        groups.setdefault((row["op"], row["kernel"], row["arch"]), []).append(row)
    rows = []
    for (op, kernel, arch), found in groups.items():
        most = [str(max(row[name] for row in found)) for name in ("registers", "spills", "shared", "mufu", "tensor_core")]
        least = [_least_wide(found, name) for name in ("loads", "stores")]
        busy = f"{min(row['occupancy'] for row in found):.0%}"
        shares = ["-" if share is None else f"{share:.0%}" for share in least]
        rows.append((op, f"`{kernel}`", str(arch), str(len(found)), *most[:3], busy, *shares, *most[3:]))
    return _table(head, rows)


def _least_wide(rows, name):
    shares = [wide(row[name]) for row in rows if row["aligned"]]
    return min((share for share in shares if share is not None), default=None)


def caption(found):
    made_with = f"Triton {found['triton']}, ptxas {found['ptxas']}, torch {found['torch']}"
    return f"Compiled, not run: {made_with}, {found['date']}, commit {found['commit']}."


def summary(result):
    """One sentence on every kernel of a result."""
    rows = result["kernels"]
    most, spills, arches = max(row["registers"] for row in rows), sum(row["spills"] for row in rows), sorted({row["arch"] for row in rows})
    found = f"{len(rows)} variants for {', '.join(f'sm_{arch}' for arch in arches)}, at most {most} registers, {spills} spills."
    return f"{caption(result)} {found}"


def page(text, result):
    """docs/gpu.md with its generated parts replaced."""
    text = fill(text, "calls", f"{call_table(result['calls'])}\n\n{caption(result)}")
    text = fill(text, "kernels", f"{kernel_table(result['kernels'])}\n\n{summary(result)}")
    return fill(text, "beside", "\n".join(f"- {line}" for line in result["beside"].values()))


def as_json(result):
    """One row a line, so that a change of one kernel is a change of one line."""
    parts = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in result.items() if not isinstance(value, list)]
    for name in ("calls", "kernels"):
        parts.append(f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(row)}" for row in result[name]) + "\n  ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def report(names, arches):
    """All that is written: versions, digests of the sources, calls, compiled kernels."""
    made = calls(names, arches)
    rows, launches = kernel_rows(made)
    facts = compiled(launches)
    kernels = [row | facts[key] for (_, key), row in rows.items()]
    return {**versions(), "sources": {op: source(op) for op in names}, "calls": call_rows(made), "kernels": kernels}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", choices=[*ops(), []], default=[])
    parser.add_argument("--arch", nargs="+", type=int, choices=ARCHES, default=list(ARCHES))
    parser.add_argument("--beside", action="store_true", help="add a line on the Triton in use to the written result")
    options = parser.parse_args()
    result = report(options.op or ops(), options.arch)
    sys.stdout.write(f"{call_table(result['calls'])}\n\n{kernel_table(result['kernels'])}\n\n{caption(result)}\n")
    if not options.op and options.arch == list(ARCHES):
        before = json.loads(RESULT.read_text(encoding="utf-8")) if options.beside or RESULT.exists() else {"beside": {}}
        if options.beside:
            result = before | {"beside": before["beside"] | {result["triton"]: summary(result)}}
        else:
            result["beside"] = before["beside"]
        RESULT.write_text(as_json(result), encoding="utf-8")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
