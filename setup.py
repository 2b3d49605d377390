"""Where do fuseer's packages lie, and how is fuseer.kernels._C built, or the reason kept why it was not?"""

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
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-g0"]
SIMD_FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


def cuda_home(nvcc):
    """The toolkit behind `nvcc`, which may be a wrapper outside it: torch would take the wrapper's own folder and fail to link."""
    if os.environ.get("CUDA_HOME"):
        return os.environ["CUDA_HOME"]
    tops = []
    if nvcc:
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull, "-c", "-o", os.devnull]
        dry = subprocess.run(command, capture_output=True, text=True, check=False)
        tops = re.findall(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    for top in [*tops, "/usr/local/cuda"]:
        if (Path(top.strip()) / "include" / "cuda_runtime.h").is_file():
            return str(Path(top.strip()).resolve())
    return None


def cuda_sources():
    """The .cu files to compile, with CUDA_HOME set for torch, which reads it when it is imported; none without files or toolkit."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cu"))
    home = cuda_home(shutil.which("nvcc")) if sources else None
    if home is None:
        return []
    os.environ["CUDA_HOME"] = home
    return sources


def extension_and_builder():
    """(Extension, build_ext class), or (an empty Extension, the reason why it cannot be compiled)."""
    nothing = Extension("fuseer.kernels._C", sources=[])
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return nothing, f"no C++ compiler: {compiler} is not on PATH; install g++, or set CXX, and install fuseer again"
    sources = cuda_sources()
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return nothing, f"torch cannot be imported while building ({error}); install it first and add --no-build-isolation"
    kind, archs = cpp_extension.CppExtension, ""
    if sources:
        kind, archs = cpp_extension.CUDAExtension, os.environ.get("TORCH_CUDA_ARCH_LIST", "of the GPUs present")
    x86 = platform.machine() in ("x86_64", "AMD64")
    facts = {
        "COMPILER": compiler,
        "FLAGS": " ".join(CXX_FLAGS),
        "INSTRUCTION_SETS": " ".join(SIMD_FLAGS if x86 else ["DEFAULT"]),
        "CUDA_ARCHS": archs,
        "TORCH": torch.__version__,
    }
    extension = kind(
        "fuseer.kernels._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.cpp") if not path.stem.endswith("_simd")) + sources,
        define_macros=[(f"FUSEER_{name}", f'"{value}"') for name, value in facts.items()] + [("FUSEER_X86_SIMD", None)] * x86,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-std=c++20"]},
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
    """Builds the extension; where that fails, deletes any earlier library and leaves the reason in its place."""

    def run(self):
        reason = BUILDER if isinstance(BUILDER, str) else self.try_to_build()
        for folder in self.folders():
            folder.mkdir(parents=True, exist_ok=True)
            kept = folder / "_C_reason.txt"
            kept.unlink(missing_ok=True)
            if reason is not None:
                for stale in folder.glob("_C.*.so"):
                    stale.unlink()
                kept.write_text(reason + "\n", encoding="utf-8")
        if reason is not None:
            sys.stderr.write(f"\nfuseer: the C++ extension was NOT built; every op runs on its reference.\nfuseer: {reason}\n\n")

    def try_to_build(self):
        try:
            super().run()
        except (BaseError, OSError, RuntimeError, subprocess.SubprocessError) as error:
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"the build failed ({first_line}); run pip install -v --no-deps --no-build-isolation -e . and read its output"
        return None

    def folders(self):
        """Where the library goes: the build folder of a wheel, and the checkout too where this is an editable install."""
        folders = [Path(self.build_lib) / "fuseer" / "kernels"]
        return [*folders, ROOT / "kernels"] if self.inplace or getattr(self, "editable_mode", False) else folders

    def build_extension(self, ext):
        ext.extra_objects = [*ext.extra_objects, *compile_simd(self, ext)]
        super().build_extension(ext)


setup(package_dir=ROOMS, packages=PACKAGES, ext_modules=[EXTENSION], cmdclass={"build_ext": BuildOrTellWhy})
