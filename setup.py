"""Where do fuseer's packages lie, and how are fuseer.kernels._C and _C_cuda built, or the reason kept why they were not?"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
ROOMS = {"fuseer.kernels": "kernels", "fuseer.engine": "engine"}
PACKAGES = [
    ".".join([room, *found.split(".")]) if found else room
    for room, folder in ROOMS.items()
    for found in ["", *find_namespace_packages(str(ROOT / folder))]
]
CUDA_LIBRARY = "_C_cuda.so"
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-g0"]
# libcudart is torch's, which is in the process before the library; kernels/cuda_library.py loads it
CUDA_FLAGS = ["-O3", "-std=c++17", "-shared", "-cudart=shared", "-Xcompiler=-fPIC", "--threads=0"]
SIMD_FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


def cuda_compiler():
    """(nvcc, "") or ("", the reason why no CUDA kernel can be compiled that this torch could launch)."""
    try:
        from torch import __version__, version
    except ImportError as error:
        return "", f"torch cannot be imported while building ({error}); install it first and add --no-build-isolation"
    if version.cuda is None:
        return "", f"torch {__version__} knows no CUDA; install one that does, and fuseer again"
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))
    if nvcc is None:
        return "", f"no nvcc on PATH, in CUDA_HOME or /usr/local/cuda; install CUDA {version.cuda.split('.')[0]} and fuseer again"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)", said)
    if release is None or release.group(1) != version.cuda.split(".")[0]:
        have = release.group(1) if release else "an unknown release"
        return "", f"nvcc is of CUDA {have}, torch {__version__} of CUDA {version.cuda}; put an nvcc of that release on PATH"
    return nvcc, ""


def architectures():
    """nvcc's options for TORCH_CUDA_ARCH_LIST ("8.0;9.0a+PTX"), else for the first of each generation, which its other GPUs run too.

    The newest is kept as PTX as well, for GPUs to come. ValueError for a name that is no number.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not asked:
        return ["-arch=all-major"]
    options = []
    for name in asked:
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if found is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must list numbers such as 8.0;9.0a+PTX; got {name!r}")
        arch = "".join(found.groups()[:3])
        options += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        options += [f"-gencode=arch=compute_{arch},code=compute_{arch}"] if found.group(4) else []
    return options


def build_cuda(library):
    """Compiles csrc/**/*.cu into `library`; None, or the reason why that was not possible."""
    nvcc, reason = cuda_compiler()
    if reason:
        return reason
    sources = [str(path) for path in sorted(ROOT.glob("csrc/**/*.cu"))]
    library.parent.mkdir(parents=True, exist_ok=True)
    host = ["-ccbin", os.environ["CXX"].split()[0]] if os.environ.get("CXX") else []
    try:
        command = [nvcc, *CUDA_FLAGS, *architectures(), *host, "-o", str(library), *sources]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except (OSError, ValueError) as error:
        return str(error)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        told = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0]
        return f"nvcc failed ({told}); run pip install -v --no-deps --no-build-isolation -e . and read its output"
    return None


def extension_and_builder():
    """(Extension, build_ext class), or (an empty Extension, the reason why it cannot be compiled)."""
    nothing = Extension("fuseer.kernels._C", sources=[])
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return nothing, f"no C++ compiler: {compiler} is not on PATH; install g++, or set CXX, and install fuseer again"
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return nothing, f"torch cannot be imported while building ({error}); install it first and add --no-build-isolation"
    x86 = platform.machine() in ("x86_64", "AMD64")
    facts = {
        "COMPILER": compiler,
        "FLAGS": " ".join(CXX_FLAGS),
        "INSTRUCTION_SETS": " ".join(SIMD_FLAGS if x86 else ["DEFAULT"]),
        "TORCH": torch.__version__,
    }
    extension = cpp_extension.CppExtension(
        "fuseer.kernels._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp") if not path.stem.endswith("_simd")),
        define_macros=[(f"FUSEER_{name}", f'"{value}"') for name, value in facts.items()] + [("FUSEER_X86_SIMD", None)] * x86,
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-fopenmp"],
        optional=True,
    )
    return extension, cpp_extension.BuildExtension


def compile_simd(builder, ext):
    """The objects of every csrc/**/*_simd.cpp, one per instruction set; which of them runs is chosen by the CPU at run time."""
    objects = []
    sets = SIMD_FLAGS if ("FUSEER_X86_SIMD", None) in ext.define_macros else ["DEFAULT"]
    for name in sets:
        flags = [*CXX_FLAGS, *SIMD_FLAGS[name], f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]
        objects += builder.compiler.compile(
            sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*_simd.cpp")),
            output_dir=str(Path(builder.build_temp).resolve() / name),
            include_dirs=ext.include_dirs,
            extra_postargs={"cxx": flags} if builder.use_ninja else flags,
        )
    return objects


EXTENSION, BUILDER = extension_and_builder()


class BuildOrTellWhy(build_ext if isinstance(BUILDER, str) else BUILDER):
    """Builds the extension and the CUDA library, each for itself; in place of one that fails, also of an earlier one, stands the reason."""

    def run(self):
        first, *others = self.folders()
        reason = BUILDER if isinstance(BUILDER, str) else self.try_to_build()
        self.keep("_C", "_C.*.so", reason)
        without_cuda = BUILDER if isinstance(BUILDER, str) else build_cuda(first / CUDA_LIBRARY)
        self.keep("_C_cuda", CUDA_LIBRARY, without_cuda)
        for folder in others if without_cuda is None else ():
            shutil.copy(first / CUDA_LIBRARY, folder)
        if reason is not None:
            sys.stderr.write(f"\nfuseer: the C++ extension was NOT built; every op runs on its reference.\nfuseer: {reason}\n\n")
        if without_cuda is not None:
            sys.stderr.write(f"fuseer: the CUDA kernels were not built: {without_cuda}\n")

    def keep(self, name, libraries, reason):
        """Has every folder hold either the library or the reason why there is none."""
        for folder in self.folders():
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / f"{name}_reason.txt"
            kept.unlink(missing_ok=True)
            if reason is not None:
                for stale in folder.glob(libraries):
                    stale.unlink()
                kept.write_text(reason + "\n", encoding="utf-8")

    def try_to_build(self):
        try:
            super().run()
        except (BaseError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"the build failed ({first_line}); run pip install -v --no-deps --no-build-isolation -e . and read its output"
        return None

    def folders(self):
        """Where the libraries go: the build folder of a wheel, and the checkout too where this is an editable install."""
        folders = [Path(self.build_lib) / "fuseer" / "kernels"]
        return [*folders, ROOT / "kernels"] if self.inplace or getattr(self, "editable_mode", False) else folders

    def build_extension(self, ext):
        ext.extra_objects = [*ext.extra_objects, *compile_simd(self, ext)]
        super().build_extension(ext)


setup(package_dir=ROOMS, packages=PACKAGES, ext_modules=[EXTENSION], cmdclass={"build_ext": BuildOrTellWhy})
