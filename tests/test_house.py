"""Do the walls stand, and would each of them stop what it is there to stop?"""

import inspect
from pathlib import Path

import house
import pytest
from house import (
    edges,
    environment_is_read_at_the_door,
    every_module_has_a_floor,
    exceptions_are_named,
    files_are_short,
    first_lines_say_the_question,
    functions_are_short,
    importing_does_nothing,
    imports_go_down,
    kernels_need_the_core_only,
    names_say_something,
    only_the_log_prints,
    ops_are_complete,
    ops_meet_at_their_doors,
    ops_read_their_own_variables_only,
    parameters_are_few,
    private_files_stay_private,
    reminders_have_links,
    rooms_are_imported_by_full_name,
    rooms_are_namespaces,
    siblings_stay_apart,
    tree_of_the_house,
)

WALLED = tree_of_the_house()
NEW = "engine/models/planted.py"
OP = "kernels/planted/op.py"
DOC = '"""Is this planted?"""\n'
# rule: (path of the planted file, its text), …; each alone must be caught
PLANTED = {
    every_module_has_a_floor: [("engine/planted.py", DOC), ("engine/planted/inner.py", DOC)],
    imports_go_down: [
        ("engine/schedule.py", "from fuseer.engine import train"),
        (NEW, "import fuseer.engine.cli"),
        (NEW, "from fuseer.engine.methods.swav import SwAV"),
        (NEW, "def late():\n    from ..methods import swav"),
        ("kernels/checks.py", "from fuseer.engine.config import TrainConfig"),
    ],
    siblings_stay_apart: [
        (NEW, "from fuseer.engine.models.regnet import AnyNet"),
        (NEW, "from fuseer.engine.models import backbone"),
        (NEW, "from . import regnet"),
        (NEW, "from fuseer.engine.data.view import x\nfrom fuseer.engine.data.dali import DaliLoader"),
        ("engine/optim.py", "import fuseer.engine.checkpoint"),
    ],
    ops_meet_at_their_doors: [
        (OP, "from fuseer.kernels.sinkhorn import cases"),
        (OP, "from fuseer.kernels import functional"),
        ("kernels/checks.py", "from fuseer.kernels.sinkhorn import sinkhorn"),
    ],
    private_files_stay_private: [
        (OP, "from fuseer.kernels.sinkhorn import _cpu"),
        (OP, "from ..sinkhorn._cpu import unsupported"),
        (NEW, "from fuseer.kernels.sinkhorn._cpu import unsupported"),
        (NEW, "from fuseer.kernels import _tl"),
        ("kernels/checks.py", "import fuseer.kernels._C"),
    ],
    rooms_are_imported_by_full_name: [
        (NEW, "from kernels.functional import sinkhorn"),
        (NEW, "import engine"),
        ("tests/engine/test_planted.py", "import kernels.sinkhorn"),
    ],
    kernels_need_the_core_only: [
        (OP, "import scipy"),
        (OP, "import pytest"),
        ("tests/kernels/test_planted.py", "from sklearn import metrics"),
        ("tests/kernels/test_planted.py", "import fuseer.engine.models.norm"),
    ],
    rooms_are_namespaces: [("kernels/__init__.py", DOC), ("engine/__init__.py", DOC)],
    ops_are_complete: [(OP, DOC), ("csrc/planted/planted_cpu.cpp", "")],
    files_are_short: [(NEW, "x = 1\n" * (house.FILE_LINES + 1)), ("kernels/checks.py", "x = 1\n" * (house.FILE_LINES + 1))],
    functions_are_short: [
        (NEW, "def f():\n" + "    x = 1\n" * house.FUNCTION_LINES),
        (NEW, "class A:\n  async def f(self):\n" + "    x = 1\n" * house.FUNCTION_LINES),
        (OP, "@triton.jit\ndef f():\n" + "    x = 1\n" * house.JIT_LINES),
    ],
    parameters_are_few: [
        (NEW, "def f(a, b, c, d, e, /, f, *, g, h, i): pass"),
        (NEW, "class A:\n    def f(self, a, b, c, d, e, f, g, *h, **i): pass"),
        (OP, "def _inner(a, b, c, d, e, f, g, h, i): pass"),
    ],
    environment_is_read_at_the_door: [
        (NEW, "import os\nx = os.environ.get('A')"),
        (NEW, "from os import getenv"),
        ("kernels/checks.py", "import os\ndef f():\n    return os.getenv('A')"),
    ],
    ops_read_their_own_variables_only: [
        ("kernels/dispatch.py", "import os\nx = os.environ.get('OTHER')"),
        ("kernels/dispatch.py", "import os\nx = os.environ['RANK']"),
    ],
    importing_does_nothing: [
        (NEW, "import torch\ntorch.set_num_threads(1)"),
        (NEW, "try:\n    import timm\nexcept ImportError:\n    timm = None"),
        (NEW, "for x in range(3):\n    y = x"),
        (NEW, "if 1 + 1 == 2:\n    x = 1"),
    ],
    reminders_have_links: [(NEW, "# TODO later"), (NEW, "x = 1  # FIXME")],
    only_the_log_prints: [(NEW, "print('x')"), ("engine/train.py", "def f():\n    import sys\n    sys.stdout.write('x')")],
    exceptions_are_named: [
        (NEW, "def f():\n    try:\n        pass\n    except:\n        pass"),
        (NEW, "def f():\n    try:\n        pass\n    except Exception:\n        pass"),
        (NEW, "def f():\n    try:\n        pass\n    except (ValueError, BaseException) as e:\n        pass"),
    ],
    first_lines_say_the_question: [(NEW, "x = 1"), (NEW, "\n" + DOC), (NEW, '"""\nIs this late?\n"""'), (NEW, "# a comment\n" + DOC)],
    names_say_something: [
        ("engine/models/model_utils.py", DOC),
        ("engine/common/x.py", DOC),
        ("engine/swav_v2.py", DOC),
        ("kernels/triton.py", "import triton.language"),
    ],
}


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    violations = "\n".join(rule(WALLED))
    assert not violations, violations


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [pytest.param(rule, *plant, id=f"{rule.__name__}-{i}") for rule, plants in PLANTED.items() for i, plant in enumerate(plants)],
)
def test_a_planted_violation_is_caught(rule, path, text):
    caught = set(rule(WALLED | {path: text})) - set(rule(WALLED))
    assert any(line.startswith(str(Path(path).parent)) or path in line for line in caught), f"{rule.__name__} let {path} pass:\n{text}"


def test_every_rule_is_put_to_the_test():
    rules = {rule for rule in vars(house).values() if inspect.isfunction(rule) and list(inspect.signature(rule).parameters) == ["tree"]}
    assert rules == set(PLANTED)


def test_what_the_rules_allow_passes():
    """A well-made op and method with every licence taken break no rule."""
    jit = "@triton.jit\ndef f(a, b, c, d, e, f, g, h, i, j):\n" + "    x = 1\n" * (house.JIT_LINES - 1)
    op = (
        "from fuseer.kernels import checks, dispatch\nfrom fuseer.kernels.planted import _triton, reference\n"
        "from fuseer.kernels.sinkhorn import sinkhorn\nfrom fuseer.kernels.sinkhorn.reference import sinkhorn as meaning\n"
        "def planted(a, b, c, d, e, f, g, h, i): pass\n"
    )
    method = (
        "from fuseer.engine.methods.method import Method\nfrom fuseer.engine.models.norm import BatchNorm\n"
        "from fuseer.kernels.functional import sinkhorn\n# TODO https://example.org/1\n"
        "def f():\n    try:\n        pass\n    except (OSError, ValueError):\n        pass\n"
        "if __name__ == '__main__':\n    f()\n"
    )
    built = {f"kernels/planted/{name}.py": DOC for name in ("__init__", "reference", "cases")}
    built |= {OP: DOC + op, "kernels/planted/_triton.py": DOC + "import triton\nfrom fuseer.kernels import _tl\n" + jit}
    built |= {"tests/kernels/test_planted.py": "import pytest\nfrom fuseer.kernels.planted import _triton", "kernels/_tl.py": DOC}
    built |= {"engine/methods/planted.py": DOC + method, "csrc/planted/planted_cuda.cu": ""}
    for rule in PLANTED:
        assert set(rule(WALLED | built)) <= set(rule(WALLED)), rule.__name__


def test_no_exception_is_left_over():
    """An exception that nothing needs any more is struck from its table."""
    pairs = {(path, target) for path, target, _ in edges(WALLED, "engine")}
    unused = [f"{path} -> {target}" for path, target in house.IMPORT_EXCEPTIONS if (path, target) not in pairs]
    unused += [path for path, _ in house.BUDGET_EXCEPTIONS if path not in WALLED]
    unused += [path for path in (*house.ENVIRONMENT_READERS, *house.ACTS_AT_IMPORT, *house.NAME_EXCEPTIONS) if path not in WALLED]
    assert not unused, "\n".join(unused)
