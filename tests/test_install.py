"""Does the tree install where there is no compiler, or none for CUDA, with the reason kept and no stale library?"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TREE = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "engine", "csrc")
LIBRARIES = ("_C" + sysconfig.get_config_var("EXT_SUFFIX"), "_C_cuda.so")
PROGRAM = """
import torch
from fuseer.kernels import cuda_library, extension
from fuseer.kernels.functional import sinkhorn
import fuseer.kernels.functional as functional
codes = sinkhorn(torch.rand(8, 5))
assert torch.equal(codes.sum(-1).round(decimals=4), torch.ones(8))
try:
    sinkhorn(torch.rand(8, 5), backend="cpu")
except RuntimeError as error:
    print(error)
print(extension.load(), extension.reason(), cuda_library.REASON, functional.__file__, sep="\\n")
"""

# One source of each kind in place of ours, whose compilation takes minutes: what is tried is the build, not the kernels.
SOURCES = {
    "library.cpp": """
        #include <pybind11/pybind11.h>
        long answer();
        PYBIND11_MODULE(_C, m) { m.def("answer", &answer); }
    """,
    "stub/stub_cpu_simd.cpp": """
        #if CPU_CAPABILITY_DEFAULT
        long answer() { return 42; }
        #endif
    """,
    "stub/stub_cuda.cu": "#error nobody may compile this",
}


def without_compiler(bin_folder):
    """An environment whose PATH holds one interpreter and nothing that compiles."""
    dropped = ("CC", "CXX", "CUDA_HOME", "PYTHONPATH", "FUSEER_BACKEND")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**environment, "PATH": str(bin_folder), "OMP_WAIT_POLICY": "PASSIVE", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def run(*command, cwd, env):
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of the tree with libraries left over from an earlier build."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_C*_reason.txt"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    plant(folder / "kernels")
    return folder


def plant(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for library in LIBRARIES:
        (folder / library).write_bytes(b"an earlier build")


@pytest.fixture
def python(tmp_path):
    """A new virtual environment that sees this one's packages, but not this checkout."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return tmp_path / "venv" / "bin" / "python"


def install(python, checkout, *what):
    options = ("--no-deps", "--no-build-isolation", "--ignore-installed", "--no-index")
    return run(python, "-m", "pip", "install", "-v", *options, *what, cwd=checkout, env=without_compiler(python.parent))


def check_that_it_runs_on_reference(python, folder):
    told = run(python, "-c", PROGRAM, cwd=folder.parent, env=without_compiler(python.parent)).splitlines()
    refused, library, reason, without_cuda, file, *logged = told
    assert "sinkhorn: backend 'cpu' was asked for and cannot run" in refused
    assert "no C++ compiler: c++ is not on PATH" in refused
    assert library == "None"
    assert reason.startswith("the C++ extension was not built: no C++ compiler")
    assert without_cuda.startswith("the CUDA kernels were not built: no C++ compiler")
    assert Path(file).is_relative_to(folder)
    assert any(line.startswith("sinkhorn: runs on reference (cpu: the C++ extension was not built: no C++ compiler") for line in logged)


def check_that_the_demo_trains(fuseer, folder):
    """Three steps of the demo's recipe on its bundled images, from another folder, where nothing can be compiled."""
    folder.mkdir()
    environment = without_compiler(fuseer.parent)
    assert "off" in run(fuseer, "doctor", cwd=folder, env=environment).partition("fuseer._C")[2].splitlines()[0]
    steps = ("steps=3", "batch_size=16", "knn.every_steps=0", "log_every_steps=1")
    run(fuseer, "pretrain", "recipe=tiny_swav", "out=run", *steps, cwd=folder, env=environment)
    found = {path.name for path in (folder / "run").iterdir()}
    assert found == {"config.json", "env.json", "metrics.jsonl", "events", "ckpt", "crops.png", "report.html"}


def test_editable_install_without_a_compiler(checkout, python):
    output = install(python, checkout, "-e", ".")
    assert "fuseer: the C++ extension was NOT built; every op runs on its reference." in output
    assert "no C++ compiler: c++ is not on PATH" in output
    assert not any((checkout / "kernels" / library).exists() for library in LIBRARIES)
    check_that_it_runs_on_reference(python, checkout)


def test_wheel_without_a_compiler(checkout, python, tmp_path):
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = checkout / "build" / f"lib.{platform}" / "fuseer" / "kernels"
    plant(stale)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path / "wheels")
    run(python, "-m", "pip", "wheel", *options, ".", cwd=checkout, env=without_compiler(python.parent))
    assert all((checkout / "kernels" / library).exists() for library in LIBRARIES), "a wheel must not touch the checkout's own library"
    (wheel,) = (tmp_path / "wheels").glob("fuseer-*.whl")
    install(python, tmp_path, wheel)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages/fuseer")
    assert not list(packages.rglob("*.so"))
    for room in ("kernels", "engine"):
        here = {path.relative_to(ROOT / room) for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts}
        assert here == {path.relative_to(packages / room) for path in (packages / room).rglob("*.py")}
    check_that_it_runs_on_reference(python, packages)
    check_that_the_demo_trains(python.parent / "fuseer", tmp_path / "elsewhere")


HAS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")


@pytest.fixture
def everything_but_nvcc(tmp_path):
    """A folder with every program of this PATH, save nvcc."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for path in os.environ["PATH"].split(os.pathsep):
        for program in Path(path).glob("*"):
            if not program.name.startswith("nvcc") and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return folder


@HAS_COMPILER
def test_without_nvcc_the_extension_is_built_alone(checkout, python, everything_but_nvcc, tmp_path):
    shutil.rmtree(checkout / "csrc")
    for name, text in SOURCES.items():
        (checkout / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / "csrc" / name).write_text(text)
    setup = (checkout / "setup.py").read_text()
    assert '"/usr/local/cuda")' in setup
    (checkout / "setup.py").write_text(setup.replace('"/usr/local/cuda")', f'"{tmp_path}/nowhere")'))
    environment = {**without_compiler(everything_but_nvcc), "MAX_JOBS": "2"}
    options = ("-v", "--no-deps", "--no-build-isolation", "--ignore-installed", "--no-index")
    output = run(python, "-m", "pip", "install", *options, "-e", ".", cwd=checkout, env=environment)
    assert "NOT built" not in output and "fuseer: the CUDA kernels were not built: " in output
    assert not (checkout / "kernels" / "_C_cuda.so").exists() and not (checkout / "kernels" / "_C_reason.txt").exists()
    program = "from fuseer.kernels import cuda_library as c, extension as e; print(e.load().answer(), e.reason(), c.REASON)"
    told = run(python, "-c", program, cwd=tmp_path, env=environment)
    assert re.match("42 None the CUDA kernels were not built: (no nvcc on PATH, in CUDA_HOME|torch .* knows no CUDA)", told), told


@HAS_COMPILER
def test_with_a_compiler_the_extension_is_here_and_says_how_it_was_built():
    import torch

    from fuseer.kernels import extension

    assert extension.reason() is None
    info = extension.load().build_info()
    assert set(info) == {"compiler", "flags", "instruction_sets", "cpu_capability", "torch"}
    assert info["torch"] == torch.__version__
    assert info["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
