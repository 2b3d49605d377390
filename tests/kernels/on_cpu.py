"""How are the .cu files compiled for the host, and run there in place of the GPU's?

As a pytest plugin (-p on_cpu) it has every op take backend="cuda" on CPU tensors, by the library that CUDA_ON_CPU_LIBRARY names.
"""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

from fuseer.kernels import cuda_library

ROOT = Path(__file__).parents[2]
EMULATOR = ROOT / "tests" / "csrc"
KERNELS = tuple(sorted(ROOT.glob("csrc/**/*_cuda.cu")))
PLANTED = EMULATOR / "planted.cu"
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])
FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{EMULATOR / 'include'}"),
)
SANITIZERS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
# the one piece of CUDA's syntax in use that no macro turns into C++
DYNAMIC, HOST_DYNAMIC = re.compile(r"extern __shared__ (\w+) (\w+)\[\];"), r"\1* \2 = reinterpret_cast<\1*>(cuda_on_cpu::dynamic_shared());"
ORDERS = {"as numbered": 0, "reversed": 1, "shuffled": 7}


def build(folder, sources, *flags, edit=lambda text: text):
    """The library of these .cu files, each after `edit`, as ordinary C++ for the host; AssertionError with what the compiler said."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = []
    for source in sources:
        copies.append(folder / f"{source.stem}.cpp")
        copies[-1].write_text(f'#line 1 "{source}"\n{edit(DYNAMIC.sub(HOST_DYNAMIC, source.read_text()))}')
    library = folder / "library.so"
    beside = [f"-iquote{source.parent}" for source in sources]
    done = subprocess.run([COMPILER, *FLAGS, *flags, *beside, "-o", library, *copies], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return library


def loaded(path):
    library = ctypes.CDLL(str(path))
    library.cuda_on_cpu_said.restype = ctypes.c_char_p
    return library


def launcher(library, launches):
    """Stands for cuda_library.launch; notes the entries called in `launches`."""

    def launch(entry, device, *arguments):
        assert device.type == "cpu"
        launches.append(entry)
        code = cuda_library.call(library, entry, *arguments, None)
        if code:
            raise RuntimeError(f"{entry}: error {code}: {library.cuda_on_cpu_said().decode()}")

    return launch


def set_order(library, order):
    ctypes.c_int.in_dll(library, "cuda_on_cpu_order").value = order


def take_over(patch, library):
    """Has backend="cuda" run `library` on CPU tensors; the list into which its launches go. patch: setattr, or a monkeypatch's."""
    launches = []
    patch(cuda_library, "refusal", lambda name, tensors: None)
    patch(cuda_library, "launch", launcher(library, launches))
    return launches


def pytest_configure():
    take_over(setattr, loaded(os.environ["CUDA_ON_CPU_LIBRARY"]))
