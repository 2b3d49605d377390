"""Do torch.library's opcheck and torch.compile, whole-graph and dynamic, accept every op on every backend?"""

import torch
from grid import INTERPRETED, every_other, first, lengths, over, part, quick, raw_arguments, resized, telling, trials, with_tensors
from torch._dynamo.testing import CompileCounterWithBackend

CHECKED = (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16)


def raw_backward_arguments(trial, raw):
    """The backward op's arguments, found by name among the forward's inputs and outputs, or in what cases.py adds to them."""
    forward, backward = trial.module.RAW[trial.backend], trial.module.RAW_BACKWARD[trial.backend]
    returned = forward(*raw)
    returned = returned if isinstance(returned, tuple) else (returned,)
    known = dict(zip((a.name for a in forward._schema.arguments), raw, strict=True))
    known.update(zip((r.name for r in forward._schema.returns), returned, strict=True))
    known["dloss"] = known["dout"] = torch.ones_like(returned[0])
    known.update(getattr(part(trial.op, "cases"), "backward_arguments", lambda known: {})(known))
    return tuple(known[a.name] for a in backward._schema.arguments)


@over(trials(dtypes=CHECKED, chosen=first if INTERPRETED else telling))
def test_opcheck(trial):
    """Dense in single, in gaps in half precision: what opcheck looks at depends on each alone."""
    layouts = {torch.float32: (torch.Tensor.contiguous,), torch.bfloat16: (every_other,)}
    for layout in sum(layouts.values(), ()) if INTERPRETED else layouts[trial.dtype]:
        raw = raw_arguments(trial.op, with_tensors(trial.arguments(), layout))
        torch.library.opcheck(trial.module.RAW[trial.backend], raw)
        if hasattr(trial.module, "RAW_BACKWARD"):
            torch.library.opcheck(trial.module.RAW_BACKWARD[trial.backend], raw_backward_arguments(trial, raw))


@over(trials((torch.float32,), quick))
def test_opcheck_of_the_empty_and_the_single(trial):
    """test_schema and test_faketensor alone, on every case: shapes, strides and dtypes of what the fakes promise."""
    utils = ("test_schema", "test_faketensor")
    raw = raw_arguments(trial.op, trial.arguments())
    torch.library.opcheck(trial.module.RAW[trial.backend], raw, test_utils=utils)
    if hasattr(trial.module, "RAW_BACKWARD"):
        torch.library.opcheck(trial.module.RAW_BACKWARD[trial.backend], raw_backward_arguments(trial, raw), test_utils=utils)


def batches(trial):
    """The trial at its own number of rows, and at two others."""
    rows, last = lengths(trial.case)
    known = trial.case.sizes
    sizes = [{row: known.get(row, row) * times + 1 for row in rows} for times in (2, 3)]
    return [trial, *(trial.but(case=resized(trial.case, numbers)) for numbers in sizes)]


def check_compiled(trial, backend, call):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for batch in batches(trial):
        expected = batch.outputs(call=call)
        for name, x in batch.outputs(call=compiled).items():
            assert torch.equal(x, expected[name]), (batch.case.name, name)
        frames.append(counter.frame_count)
    assert frames[0] and frames == frames[:1] * len(frames), f"compiled anew for another number of rows: {frames}"


@over(trials(dtypes=CHECKED, chosen=first if INTERPRETED else lambda op: telling(op)[:2]))
def test_compiles_whole_and_dynamic(trial):
    check_compiled(trial, "aot_eager", trial.call)


@over([] if INTERPRETED else trials(dtypes=(torch.float32,), chosen=first))
def test_inductor_compiles_whole_and_dynamic(trial):
    def doubled(**arguments):
        return trial.call(**with_tensors(arguments, lambda x: x * 2)) * 2

    check_compiled(trial, "inductor", doubled)


@over([] if INTERPRETED else [trial.but(backend=None) for trial in trials(CHECKED, first) if trial.backend == "reference"])
def test_compiles_whole_when_the_backend_is_not_named(trial):
    check_compiled(trial, "aot_eager", trial.call)
