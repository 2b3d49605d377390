"""Which programs are timed on which cases? `fuseer bench` starts this file as python -m benchmarks.run.

[op | sweep | step | report] [device=cpu|cuda] [repeats=N] [threads=N] [case=NAME] [compile=false] [store=false]
"""

import contextlib
import functools
import importlib
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from benchmarks import measure
from fuseer.engine.distributed import keep_freed_memory
from fuseer.kernels import dispatch, functional
from fuseer.kernels.testing import compared_updates, error_vs_eager, inputs, outputs, raw_arguments, update_inputs, verdicts

OPS = sorted(path.stem for path in (Path(__file__).parent / "kernels").glob("*.py"))
OTHERS = ("sweep", "step", "report")
OPTIONS = {"device": "cpu", "repeats": "0", "threads": "0", "case": "", "compile": "true", "store": "true"}


class Wrong(RuntimeError):
    """A result that fails its verdict: it has no speed."""


def part(op, name):
    return importlib.import_module(f"fuseer.kernels.{op}.{name}")


def reference(op):
    return getattr(part(op, "reference"), op)


def updates(op):
    """The names of the lists that the op writes in place; none where it returns what it computes."""
    return getattr(part(op, "cases"), "WRITTEN", ())


def given_to(op, case, device="cpu"):
    """The case's arguments in the dtypes that are timed."""
    if not updates(op):
        return inputs(case, case.dtype, device=device)
    return update_inputs(case, lambda name, i: torch.bfloat16 if name in case.halves else case.dtype, device=device)


def backends(op, arguments):
    """The backends that take these arguments, the preferred one first."""
    raw = raw_arguments(part(op, "op").RAW["reference"], arguments)
    named = [(dispatch.backend_of(impl), impl) for impl in part(op, "op").IMPLS]
    return [name for name, impl in named if name == "reference" or impl.unsupported(*raw) is None]


def ours(op, backend):
    return functools.partial(getattr(functional, op), backend=backend)


def published(op):
    return importlib.import_module(f"benchmarks.kernels.{op}")


def too_large(op, arguments, device):
    """{program: why it is not run}, of those whose memory the op's needs() foretells and this machine has not."""
    needs = getattr(published(op), "needs", lambda arguments: {})(arguments)
    found = {name: measure.too_large(size, device) for name, size in needs.items()}
    # the verdict runs it in float64 too
    found["truth"] = measure.too_large(2 * needs.get("reference", 0), device)
    return {name: why for name, why in found.items() if why is not None}


def believe(op, case, device):
    """Raises Wrong unless every backend that takes the case holds the verdict on it, at its very shape and dtype.

    Judged by the reference, or where that does not fit by the op's oracle(): the same in strips.
    """
    differentiable, arguments = part(op, "cases").DIFFERENTIABLE, given_to(op, case, device)
    absent = too_large(op, arguments, device)
    judge = published(op).oracle if "truth" in absent else reference(op)
    # of rows that only the oracle judges, the reference adds up the same in another order, and is not what is sold
    judged = [name for name in backends(op, arguments) if name not in absent and (name != "reference" or judge is reference(op))]
    for backend in judged:
        if updates(op):
            three = compared_updates(ours(op, backend), ours(op, "reference"), lambda: given_to(op, case, device), updates(op))
            found = {what: error_vs_eager(*x) for what, x in three.items()}
        else:
            found = verdicts(ours(op, backend), judge, case, case.dtype, differentiable, device=device)
        for name, verdict in found.items():
            if not verdict:
                raise Wrong(f"{op} {case.name}: backend {backend} is wrong, so nothing is timed: {name} {verdict}")


def scalar(out):
    return out.mean() if out.dim() else out


def told(out):
    """One number of what a differentiable op returns: of tokens the mean square, for their mean is next to nothing."""
    return (out.double().square().mean() if out.dim() > 2 else scalar(out)).squeeze()


def copied(out):
    """A copy of what an op without a gradient returns."""
    return tuple(x.clone() for x in out) if isinstance(out, tuple) else out.clone().squeeze()


def same_function(op, case, name, function, given, ours_on):
    """Raises Wrong where a program that we compare ourselves with computes, on what it is given, something else than ours."""
    if updates(op):
        return same_update(op, case, name, function, ours_on[0])
    differentiable = part(op, "cases").DIFFERENTIABLE
    reduced = told if differentiable else copied
    theirs = outputs(lambda **given: reduced(function(**given)), given, differentiable)
    own = outputs(lambda **given: reduced(ours_on[0](**given)), ours_on[1], differentiable)
    allowed = 1e-2 if case.dtype in dispatch.HALF else 1e-3
    for output, value in own.items():
        off = ((theirs[output] - value).double().norm() / value.double().norm()).item()
        if not off <= allowed:
            raise Wrong(f"{op} {case.name}: {name} is another function than {op}: {output} differs by {off:.1e} in rel-L2")


def same_update(op, case, name, function, our_function):
    """The same of lists updated in place, whose changes are compared: one step leaves most of a teacher as it was."""
    before, theirs, own = (given_to(op, case) for _ in range(3))
    function(**theirs)
    our_function(**own)
    for output in (output for output in updates(op) if before[output]):
        was, his, mine = (torch.cat([x.double().flatten() for x in lists[output]]) for lists in (before, theirs, own))
        off = ((his - mine).norm() / (mine - was.nan_to_num()).norm()).item()
        if not off <= 1e-2:
            raise Wrong(f"{op} {case.name}: {name} is another function than {op}: {output} differs by {off:.1e} of its change")


def called(function, arguments, differentiable):
    """One call as training makes it: with the backward pass where there is one."""
    if not differentiable:
        return lambda: function(**arguments)

    def step():
        leaves = {name: arguments[name].detach().requires_grad_() for name in differentiable if arguments[name] is not None}
        scalar(function(**{**arguments, **leaves})).backward()

    return step


def graphed(program, pool=None):
    """`program` replayed as a CUDA graph. RuntimeError where it cannot be captured, as one that waits for the GPU cannot.

    Graphs of one `pool` share their memory: none is replayed beside another, and what they compute is not looked at.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            program()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        program()
    return graph.replay


def programs(op, case, arguments, device, with_compile):
    """({name: program}, {name: kind}, {name: why it is not run}): the official formulation and its alternatives(), its compiled forms,
    what is installed, every backend of ours, and the parts of the work that nobody avoids.

    The published ones are given what the op's prepared() makes of the arguments, where it has one.
    """
    module, differentiable, own = published(op), part(op, "cases").DIFFERENTIABLE, backends(op, arguments)
    given = getattr(module, "prepared", dict)(arguments)
    functions = {"official": module.official, **getattr(module, "alternatives", lambda arguments: {})(arguments)}
    kinds = dict.fromkeys(functions, "eager")
    for name, function in installed(module, arguments).items():
        functions[name], kinds[name] = function, "third party"
    absent = too_large(op, arguments, device)
    judge = next(name for name in reversed(own) if name not in absent)
    for name, function in functions.items():
        if name not in absent:
            same_function(op, case, name, function, given, (ours(op, judge), arguments))
    if with_compile:
        modes = {"compile": None, "reduce-overhead": "reduce-overhead"} if device != "cpu" else {"compile": None}
        for name, mode in modes.items():
            functions[name], kinds[name] = torch.compile(module.official, dynamic=False, mode=mode), "compile"
    found = {name: called(function, given, differentiable) for name, function in functions.items()}
    for name in own:
        found[name], kinds[name] = called(ours(op, name), arguments, differentiable), "ours"
    if device != "cpu":
        pool = torch.cuda.graph_pool_handle()
        # reduce-overhead replays graphs already
        for name in [name for name in found if name not in ("reduce-overhead", *absent)]:
            with contextlib.suppress(RuntimeError):
                found[f"{name} graph"], kinds[f"{name} graph"] = graphed(found[name], pool), kinds[name]
    for name, program in getattr(module, "bounds", lambda arguments: {})(arguments).items():
        found[name], kinds[name] = program, "bound"
    found["copy"], kinds["copy"] = measure.copy_program(module.work(arguments).bytes, device), "floor"
    absent = {name: why for name, why in absent.items() if name in found}
    return {name: program for name, program in found.items() if name not in absent}, kinds, absent


def installed(module, arguments):
    with warnings.catch_warnings(), contextlib.suppress(ModuleNotFoundError):
        warnings.simplefilter("ignore")
        return module.third_party(arguments)
    _say_once("lightly is not installed, so no third-party program is timed: pip install lightly")
    return {}


@functools.cache
def _say_once(text):
    measure.say(text)


def bench(op, cases, *, device="cpu", repeats=0, with_compile=True, with_memory=True):
    """(rows, rejected cases' sentences) of the op on the cases: believed, timed, and then weighed."""
    machine = {**measure.header(device), **measure.rates(device)}
    seconds_of, control = measure.stopwatch(device), measure.control_loop(device)
    found, kept, rejected = [], {}, []
    for case in cases:
        believe(op, case, device)
        arguments = given_to(op, case, device)
        timed, kinds, absent = programs(op, case, arguments, device, with_compile)
        counted = {name: measure.operations(run, device) for name, run in timed.items() if device != "cpu" or kinds[name] != "compile"}
        rounds = measure.repeats_for(timed, seconds_of)
        try:
            timing = measure.timed(timed, control, repeats=repeats or rounds, seconds_of=seconds_of)
        except measure.Rejected as error:
            rejected.append(f"{op} {case.name}: rejected: {error}")
            continue
        told = {"case": case.name, "shape": _shape(arguments), "dtype": _dtype(case)}
        rows = measure.rows(op, told, timing, kinds=kinds, work=published(op).work(arguments), machine=machine)
        preferred = next(name for name in backends(op, arguments) if name not in absent)
        # as graphs the GPU's times are compared, not those of the host that launches
        preferred = next(name for name in (f"{preferred} graph", preferred) if name in timed)
        for row in rows:
            row.update(preferred=row["program"] == preferred, operations=counted.get(row["program"]))
        rows += [measure.missing(op, told, name, kinds[name], why, machine) for name, why in absent.items()]
        for row in rows:
            measure.say(_line(row))
        found += rows
        kept[case.name] = timed
    for row in (row for row in found if with_memory and "not_run" not in row):
        # the memory of a graph is the graph's before it runs
        extra = measure.extra_memory(kept[row["case"]][row["program"].removesuffix(" graph")], device)
        row["extra_mb"] = None if extra is None else round(extra / 1e6, 2)
    return found, rejected


def _dtype(case):
    return ", ".join([str(case.dtype).removeprefix("torch."), *(f"{name} bfloat16" for name in case.halves)])


def _shape(arguments):
    listed = [x for x in arguments.values() if isinstance(x, list) and isinstance(x[0], torch.Tensor)]
    if listed:
        return f"{len(listed[0])} tensors, {sum(x.numel() for x in listed[0]) / 1e6:.1f} M"
    tensors = {name: "×".join(map(str, x.shape)) for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    first, *rest = tensors.values()
    queue = tensors.get("queue_scores")
    return first if queue is None else f"{first} + {queue}"


def _line(row):
    which = f"{row['op']:<19}{row['case']:<18}{row['program']:<22}"
    if "not_run" in row:
        return f"{which}– (not run: {row['not_run']})"
    quantiles = "  ".join(f"{name} {row[f'{name}_ms']:10.3f}" for name in ("p50", "p20", "p80"))
    speedup = "–" if row["speedup"] is None else f"×{row['speedup']:.3g}"
    return f"{which}{quantiles} ms  {speedup:<8}{row['of_floor']:6.1%} of the {row['bound']} floor"


def sweep(options):
    """Every op that has sweeps, along each letter; times only."""
    failed = []
    for op in OPS:
        for letter, cases in published(op).sweeps().items():
            sizes = {case.name: size for size, case in cases.items()}
            found, rejected = bench(op, list(cases.values()), device=options["device"], repeats=int(options["repeats"]), with_memory=False)
            for row in found:
                row.update(sweep=letter, size=sizes[row["case"]])
            failed += rejected
            if found and options["store"] == "true":
                measure.store("sweep", found, place=("op", "sweep", "device", "threads"))
    return failed


def one_op(op, options):
    wanted = [case for case in part(op, "cases").CASES if case.production and options["case"] in ("", case.name)]
    if not wanted:
        names = ", ".join(case.name for case in part(op, "cases").CASES if case.production)
        raise ValueError(f"bench {op}: case must be one of {names}; got {options['case']}")
    with_compile = options["compile"] == "true"
    found, rejected = bench(op, wanted, device=options["device"], repeats=int(options["repeats"]), with_compile=with_compile)
    for row in (row for row in found if "not_run" not in row):
        which = f"{row['op']:<19}{row['case']:<18}{row['program']:<22}"
        ratios = ", ".join(f"{name} ×{ratio:g}" for name, ratio in row["against"].items())
        measure.say(f"{which}extra memory {row['extra_mb']} MB, operations {row['operations']}; {ratios}")
    if options["store"] == "true":
        measure.store(op, found)
    return rejected


def read(words):
    """(what, options) of the words key=value, --key value and at most one name; ValueError says what was wrong."""
    words, names, options = list(words), [], dict(OPTIONS)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and not equals:
            value = words.pop(0) if words else ""
        elif not equals:
            names.append(word)
            continue
        if key not in OPTIONS:
            raise ValueError(f"bench: unknown option {key}; choose from {', '.join(OPTIONS)}")
        options[key] = value
    for key in ("repeats", "threads"):
        if not options[key].isdigit():
            raise ValueError(f"bench: {key} must be a whole number; got {options[key]!r}")
    for key in ("compile", "store"):
        if options[key] not in ("true", "false"):
            raise ValueError(f"bench: {key} must be true or false; got {options[key]!r}")
    if options["device"] not in ("cpu", "cuda"):
        raise ValueError(f"bench: device must be cpu or cuda; got {options['device']!r}")
    if len(names) > 1 or (names and names[0] not in (*OPS, *OTHERS)):
        raise ValueError(f"bench: choose one of {', '.join((*OPS, *OTHERS))}, or nothing for all ops; got {' '.join(names)}")
    return (names[0] if names else None), options


def settled(options):
    """The process as the options want it; RuntimeError where the device is not here."""
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("bench: device=cuda was asked for and torch finds no CUDA device; leave it out to measure the CPU")
    if options["device"] == "cpu":
        keep_freed_memory()
    if int(options["threads"]):
        torch.set_num_threads(int(options["threads"]))
    # one compiled program per shape, none of them general
    torch._dynamo.config.recompile_limit = 256
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def all_ops(words):
    """Each op in a process of its own, for the memory of one must not disturb the times of the next; then the report."""
    codes = [subprocess.run([sys.executable, "-m", "benchmarks.run", op, *words], cwd=measure.ROOT, check=False).returncode for op in OPS]
    return max(codes)


def main(words):
    what, options = read(words)
    if what is None:
        return all_ops(words)
    if what == "report":
        from benchmarks import report

        report.main([])
        return 0
    settled(options)
    if what == "step":
        from benchmarks.engine import step

        rejected = step.bench(options)
    else:
        rejected = sweep(options) if what == "sweep" else one_op(what, options)
    for sentence in rejected:
        measure.say(sentence)
    return 1 if rejected else 0


if __name__ == "__main__":
    measure.settle_threads()
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, RuntimeError, ModuleNotFoundError) as error:
        sys.stderr.write(f"fuseer: {error}\n")
        sys.exit(2)
