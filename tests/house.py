"""What are the walls of the house: floors, rooms, budgets, environment, words?"""

import ast
import functools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# bottom first; a file or folder of engine/ stands on one floor and imports only from floors below
FLOORS = (
    ("kernels",),
    ("schedule", "distributed", "launch", "config", "log", "chart", "partitions", "tensor_file", "accelerators"),
    ("models", "data", "shards"),
    ("state",),
    ("teacher", "optim", "checkpoint", "monitor", "preemption", "skipping"),
    ("methods",),
    ("recipes",),
    ("evaluate",),
    ("run",),
    ("resume", "costs"),
    ("recovery",),
    ("train", "plan", "export", "imports", "report", "doctor", "curate", "preview"),
    ("cli",),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
GROUND = {
    "engine/methods/method.py",
    *(f"engine/evaluate/{name}.py" for name in ("knn", "frozen", "classifier")),
    "engine/imports/official.py",
    *(f"engine/models/{name}.py" for name in ("norm", "heads", "recompute")),
    *(f"engine/data/{name}.py" for name in ("view", "philox", "draw", "feed", "sources", "images", "pixels")),
    *(f"kernels/{name}.py" for name in ("dispatch", "checks", "extension", "cuda_library", "testing")),
    *(f"kernels/{name}.py" for name in ("_tl", "_chunks", "_potentials", "_contrast", "_strips")),
}
# (importer, imported): why a sibling, or a floor above, may be imported all the same
IMPORT_EXCEPTIONS = {
    ("engine/train.py", "engine/cli.py"): "run by deepspeed --module, it hands its arguments to the command line",
    ("engine/models/backbone.py", "engine/models/regnet.py"): "one name table over our models and timm's",
    ("engine/models/backbone.py", "engine/models/vit.py"): "one name table over our models and timm's",
    ("engine/distributed.py", "engine/config.py"): "deepspeed_config derives from TrainConfig",
    ("engine/recipes/recipe.py", "engine/recipes"): "recipes are found by listing their folder",
    ("engine/recipes/tiny_swav_long.py", "engine/recipes/tiny_swav.py"): "the same recipe, longer",
    ("engine/recipes/tiny_simclr.py", "engine/recipes/tiny_swav.py"): "the same network and photographs",
    ("engine/recipes/tiny_moco_v2.py", "engine/recipes/tiny_swav.py"): "the same network and photographs",
    ("engine/recipes/tiny_moco_v3.py", "engine/recipes/tiny_swav.py"): "the same network and photographs",
    ("engine/recipes/tiny_mae.py", "engine/recipes/tiny_swav.py"): "the same photographs",
    ("engine/recipes/mae_vit_l.py", "engine/recipes/mae_vit_b.py"): "the same recipe, another backbone",
    ("engine/recipes/mae_vit_h.py", "engine/recipes/mae_vit_b.py"): "the same recipe, another backbone",
    ("engine/recipes/moco_v3_vit_b.py", "engine/recipes/moco_v3_vit_s.py"): "the same recipe, another backbone",
    ("engine/recipes/seer_regnety_8gf.py", "engine/recipes/seer_regnety_32gf.py"): "the same recipe, another backbone",
    ("engine/recipes/seer_regnety_16gf.py", "engine/recipes/seer_regnety_32gf.py"): "the same recipe, another backbone",
    ("engine/recipes/seer_regnety_64gf.py", "engine/recipes/seer_regnety_32gf.py"): "the same recipe, another backbone",
    ("engine/recipes/seer_regnety_128gf.py", "engine/recipes/seer_regnety_64gf.py"): "the same recipe, another backbone",
    ("engine/recipes/seer_regnety_10b.py", "engine/recipes/seer_regnety_256gf.py"): "the same recipe, another backbone",
    ("engine/recipes/seer_regnety_256gf_friendly.py", "engine/recipes/seer_regnety_256gf.py"): "the same recipe, another backbone",
    ("engine/recipes/seer_regnety_10b_friendly.py", "engine/recipes/seer_regnety_10b.py"): "the same recipe, another backbone",
    ("engine/imports/swav.py", "engine/export.py"): "what comes in is compared with timm's network in the form that goes out",
    **{
        ("engine/data/sources.py", f"engine/data/{name}.py"): "the door to all that sources are made of"
        for name in ("bundled", "folder", "indexed", "listfile", "order", "reader", "tar")
    },
    ("engine/data/reader.py", "engine/data/decodable.py"): "files are examined before they are handed on",
    ("engine/data/tar.py", "engine/data/listfile.py"): "labels of lists and shards are numbered by one rule",
    ("engine/data/pack.py", "engine/data/tar.py"): "what is packed is read back before it is believed",
    ("engine/data/make_demo_set.py", "engine/data/bundled.py"): "makes what bundled unpacks",
}
# (path, what): why it may exceed its budget; what is "file" or a function's name
BUDGET_EXCEPTIONS = {}
# path: why it may read environment variables
ENVIRONMENT_READERS = {
    "kernels/dispatch.py": "FUSEER_BACKEND, FUSEER_CHECK_INDICES",
    "engine/distributed.py": "ranks as the launcher gives them",
    "engine/launch.py": "ranks as Slurm gives them",
    "engine/cli.py": "settings needed before torch loads",
}
# path: why it may act when imported
ACTS_AT_IMPORT = {"kernels/extension.py": "loads the compiled library once"}
# path: why it may bear a library's name
NAME_EXCEPTIONS = {"engine/data/torchvision.py": "the twin of dali.py on torchvision; imported, never run as a script"}

FILE_LINES, FUNCTION_LINES, JIT_LINES, PARAMETERS = 400, 60, 150, 8
CORE = {"torch", "triton", "numpy"}
PRINTERS = {"engine/log.py", "engine/cli.py"}
WRITERS = {"print", "sys.stdout.write", "sys.stderr.write"}
OP_FILES = ("__init__", "op", "reference", "cases")
# papers number MoCo's versions
VAGUE = re.compile(r"(utils?|helpers?|misc|common|legacy|(?<!moco_)v\d+)$")


@functools.cache
def parsed(source):
    return ast.parse(source)


@functools.cache
def tree_of_the_house():
    """Every Python file of kernels/, engine/ and tests/ with its text, and the paths of csrc/, relative to the root."""
    tree = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for room in ("kernels", "engine", "tests")
        for path in sorted((ROOT / room).rglob("*.py"))
    }
    return tree | {str(path.relative_to(ROOT)): "" for path in sorted((ROOT / "csrc").rglob("*.*"))}


def modules(tree, *rooms):
    """(path, syntax tree) of the Python files in the rooms named."""
    return [(path, parsed(text)) for path, text in tree.items() if path.endswith(".py") and path.startswith(tuple(f"{r}/" for r in rooms))]


def imported(path, module):
    """Dotted names that a file imports, relative ones resolved; `from a import b` gives a.b."""
    package = ["fuseer", *Path(path).parent.parts]
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def resolved(name, tree):
    """The path in the tree that a dotted name fuseer.… leads to: a file, else a folder; None for other names."""
    parts = name.split(".")
    if parts[0] != "fuseer":
        return None
    for end in range(len(parts), 1, -1):
        stem = "/".join(parts[1:end])
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in tree:
                return path
        if end < len(parts) or any(path.startswith(f"{stem}/") for path in tree):
            return stem
    return "/".join(parts[1:])


def edges(tree, *rooms):
    """(importer, imported path, dotted name) for every import of the house by the rooms named."""
    for path, module in modules(tree, *rooms):
        for name in imported(path, module):
            target = resolved(name, tree)
            if target is not None and target != path:
                yield path, target, name


def floor(path):
    parts = Path(path).with_suffix("").parts
    return FLOOR.get(parts[0] if parts[0] == "kernels" else parts[1] if len(parts) > 1 else None)


def every_module_has_a_floor(tree):
    return [f"{path}: is on no floor of FLOORS" for path, _ in modules(tree, "kernels", "engine") if floor(path) is None]


def imports_go_down(tree):
    found = []
    for path, target, name in edges(tree, "kernels", "engine"):
        here, there = floor(path), floor(target)
        if (there is None or (here is not None and there > here)) and (path, target) not in IMPORT_EXCEPTIONS:
            found.append(f"{path}: imports {name}, which is not on a floor below")
    return found


def siblings_stay_apart(tree):
    """Within one floor of engine/ only ground files and the exceptions above are imported."""
    return [
        f"{path}: imports its sibling {name}; what two share moves one floor down"
        for path, target, name in edges(tree, "engine")
        if floor(path) == floor(target) and target not in GROUND and (path, target) not in IMPORT_EXCEPTIONS
    ]


def ops_meet_at_their_doors(tree):
    """In kernels/ ground files see ground files; ops also their own folder and other ops' doors and references; lists see doors."""
    found = []
    for path, target, name in edges(tree, "kernels"):
        op, other = (Path(p).parts[1] if len(Path(p).parts) > 2 else None for p in (path, target))
        own_folder = op is not None and other == op
        door = other is not None and Path(target).name in ("__init__.py", "op.py", "reference.py")
        allowed = target in GROUND or own_folder or (door and path not in GROUND)
        if target.startswith("kernels/") and not allowed and name != "fuseer.kernels._C":
            found.append(f"{path}: imports {name}, which is neither a ground file nor an op's public function or reference")
    return found


def private_files_stay_private(tree):
    """<op>/_* is for <op> alone, fuseer.kernels._C for extension.py."""
    found = []
    for path, module in modules(tree, "kernels", "engine"):
        for name in imported(path, module):
            parts = name.split(".")
            if parts[:2] != ["fuseer", "kernels"]:
                continue
            private = [index for index, part in enumerate(parts) if part.startswith("_")]
            own = private and Path(path).parent.parts == tuple(parts[1 : private[0]]) and private[0] > 2
            shared = parts[2] in ("_tl", "_chunks", "_potentials", "_contrast", "_strips") and path.startswith("kernels/")
            library = parts[2] == "_C" and path == "kernels/extension.py"
            if private and not (own or shared or library):
                found.append(f"{path}: imports {name}, private to its folder")
    return found


def rooms_are_imported_by_full_name(tree):
    return [
        f"{path}: imports {name}; write fuseer.{name}"
        for path, module in modules(tree, "kernels", "engine", "tests")
        for name in imported(path, module)
        if name.split(".")[0] in ("kernels", "engine")
    ]


def kernels_need_the_core_only(tree):
    """fuseer.kernels runs on torch, triton, numpy; its tests add pytest, hypothesis, their own folder and tests/ranks.py."""
    found = []
    beside = {Path(path).stem for path in tree if path.startswith("tests/kernels/")}
    for room, extra in (("kernels", set()), ("tests/kernels", {"pytest", "hypothesis"} | beside)):
        for path, module in modules(tree, room):
            for name in imported(path, module):
                top = name.split(".")[0]
                if not (top in sys.stdlib_module_names | CORE | extra or name.startswith(("fuseer.kernels", "tests.ranks."))):
                    found.append(f"{path}: imports {name}, beyond {', '.join(sorted(CORE | extra - beside))}")
    return found


def rooms_are_namespaces(tree):
    shadows = {"kernels/__init__.py", "engine/__init__.py"} & tree.keys()
    return [f"{path}: shadows other packages of that name; remove it" for path in sorted(shadows)]


def ops_are_complete(tree):
    found = []
    folders = {Path(path).parts[1] for path in tree if path.startswith("kernels/") and len(Path(path).parts) > 2}
    for op in sorted(folders):
        wanted = [f"kernels/{op}/{name}.py" for name in OP_FILES] + [f"tests/kernels/test_{op}.py"]
        found += [f"{path}: missing for the op {op}" for path in wanted if path not in tree]
    compiled = {Path(path).parts[1] for path in tree if path.startswith("csrc/") and len(Path(path).parts) > 2}
    return found + [f"csrc/{op}/: has no kernels/{op}/" for op in sorted(compiled - folders)]


def functions(module):
    return [node for node in ast.walk(module) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def is_jit(function):
    decorators = [node.func if isinstance(node, ast.Call) else node for node in function.decorator_list]
    return any(ast.unparse(node) in ("triton.jit", "jit") for node in decorators)


def files_are_short(tree):
    return [
        f"{path}: {len(text.splitlines())} lines, the budget is {FILE_LINES}"
        for path, text in tree.items()
        if path.startswith(("kernels/", "engine/")) and len(text.splitlines()) > FILE_LINES and (path, "file") not in BUDGET_EXCEPTIONS
    ]


def functions_are_short(tree):
    found = []
    for path, module in modules(tree, "kernels", "engine"):
        for function in functions(module):
            lines, budget = function.end_lineno - function.lineno + 1, JIT_LINES if is_jit(function) else FUNCTION_LINES
            if lines > budget and (path, function.name) not in BUDGET_EXCEPTIONS:
                found.append(f"{path}: {function.name} has {lines} lines, the budget is {budget}")
    return found


def parameters_are_few(tree):
    """At most 8, self, cls and ctx apart; Triton kernels, the public ops and what these mean in their references are exempt."""
    found = []
    for path, module in modules(tree, "kernels", "engine"):
        for function in functions(module):
            given = [node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)]
            count = len([name for name in given if name not in ("self", "cls", "ctx")])
            public_op = path in (f"kernels/{function.name}/op.py", f"kernels/{function.name}/reference.py")
            if count > PARAMETERS and not (is_jit(function) or public_op or (path, function.name) in BUDGET_EXCEPTIONS):
                found.append(f"{path}: {function.name} takes {count} parameters, the budget is {PARAMETERS}")
    return found


def environment_is_read_at_the_door(tree):
    found = []
    for path, module in modules(tree, "kernels", "engine"):
        names = {ast.unparse(node) for node in ast.walk(module) if isinstance(node, ast.Attribute)} | set(imported(path, module))
        reads = names & {"os.environ", "os.environb", "os.getenv", "os.putenv"}
        if reads and path not in ENVIRONMENT_READERS:
            found.append(f"{path}: uses {', '.join(sorted(reads))}; only {', '.join(ENVIRONMENT_READERS)} may")
    return found


def ops_read_their_own_variables_only(tree):
    """kernels/ reads FUSEER_BACKEND and FUSEER_CHECK_INDICES, nothing else, from the environment."""
    found = []
    for path, module in modules(tree, "kernels"):
        for node in ast.walk(module):
            key = None
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                key = node.slice
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv") and node.args:
                key = node.args[0]
            if key is not None and ast.unparse(key).strip("'") not in ("FUSEER_BACKEND", "FUSEER_CHECK_INDICES"):
                found.append(f"{path}: reads the variable {ast.unparse(key)}")
    return found


def importing_does_nothing(tree):
    """At module level stand imports, assignments, definitions, and what only a script or a type checker runs."""
    found = []
    for path, module in modules(tree, "kernels", "engine"):
        for node in module.body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guarded = isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
            quiet = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if not (text or guarded or isinstance(node, quiet) or path in ACTS_AT_IMPORT):
                found.append(f"{path}:{node.lineno}: acts at import: {ast.unparse(node).splitlines()[0]}")
    return found


def reminders_have_links(tree):
    return [
        f"{path}:{number}: a reminder without a link"
        for path, text in tree.items()
        if path.startswith(("kernels/", "engine/"))
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(r"\b(TODO|FIXME|XXX)\b", line) and not re.search(r"https?://", line)
    ]


def only_the_log_prints(tree):
    return [
        f"{path}:{node.lineno}: prints; say it through log.py"
        for path, module in modules(tree, "kernels", "engine")
        for node in ast.walk(module)
        if path not in PRINTERS and isinstance(node, ast.Call) and ast.unparse(node.func) in WRITERS
    ]


def exceptions_are_named(tree):
    found = []
    for path, module in modules(tree, "kernels", "engine"):
        for node in ast.walk(module):
            if isinstance(node, ast.ExceptHandler):
                caught = [] if node.type is None else node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
                if not caught or {ast.unparse(kind) for kind in caught} & {"Exception", "BaseException"}:
                    found.append(f"{path}:{node.lineno}: catches everything; name the exceptions")
    return found


def first_lines_say_the_question(tree):
    """Every module opens, on line 1, with a docstring whose first line is not empty."""
    found = []
    for path, module in modules(tree, "kernels", "engine"):
        docstring = ast.get_docstring(module, clean=False)
        if not docstring or module.body[0].lineno != 1 or not docstring.splitlines()[0].strip():
            found.append(f"{path}: must open with a docstring that says its one question")
    return found


def names_say_something(tree):
    """No utils, helpers, misc, common, legacy, v2; no file named after a library that it imports."""
    found = []
    for path, module in modules(tree, "kernels", "engine"):
        parts = Path(path).with_suffix("").parts
        found += [f"{path}: {part} says nothing" for part in parts if VAGUE.search(part)]
        if parts[-1] in {name.split(".")[0] for name in imported(path, module)} and path not in NAME_EXCEPTIONS:
            found.append(f"{path}: is named after the library it imports, and shadows it as a script")
    return found
