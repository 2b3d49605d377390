"""What was found on this machine, what is switched off, and why?"""

import importlib.util
import platform
import shutil
from importlib.metadata import PackageNotFoundError, distribution, version

import torch

from fuseer.engine.distributed import cores
from fuseer.kernels import cuda_library, extension


def findings() -> list[tuple[str, str, str]]:
    """(what, state, remark) for everything that decides how fast a run goes or whether it can start."""
    return [
        ("python", platform.python_version(), f"{cores()} cores, idle threads sleep (OMP_WAIT_POLICY=PASSIVE)"),
        ("torch", torch.__version__, f"CPU capability {torch.backends.cpu.get_cpu_capability()}"),
        _gpu(),
        _extension(),
        _cuda_kernels(),
        _package("triton", "triton", "GPU kernels", "pip install triton; on the CPU nothing needs it"),
        _package("deepspeed", "deepspeed", "the training engine", "pip install 'fuseer[engine]'"),
        _dali(),
        _package("timm", "timm", "backbones other than RegNet", "pip install 'fuseer[engine]'"),
        _apex(),
        _program("g++", "builds fuseer.kernels._C", "ops run on their reference implementation"),
        _program("nvcc", "builds fuseer.kernels._C_cuda", "no CUDA kernel is built; Triton needs none"),
        _program("chromium", "checks report.html in the tests", "that check is reported as not run"),
    ]


def _gpu() -> tuple[str, str, str]:
    if torch.cuda.is_available():
        return "GPU", "found", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, NCCL between ranks"
    return "GPU", "none", "training runs on the CPU, gloo between ranks; DALI decodes on the CPU"


def _extension() -> tuple[str, str, str]:
    module = extension.load()
    if module is None:
        return "fuseer._C", "off", f"{extension.reason()}; ops run on their reference implementation"
    info = module.build_info()
    return "fuseer._C", "built", ", ".join(f"{key} {value}" for key, value in info.items())


def _cuda_kernels() -> tuple[str, str, str]:
    if cuda_library.REASON is not None:
        return "fuseer._C_cuda", "off", f"{cuda_library.REASON}; Triton needs none of them"
    return "fuseer._C_cuda", "built", "the CUDA C++ kernels"


def _package(name: str, module: str, use: str, remedy: str) -> tuple[str, str, str]:
    if importlib.util.find_spec(module) is None:
        return name, "absent", f"off: {use}; {remedy}"
    return name, version(name), use


def _dali() -> tuple[str, str, str]:
    for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120"):
        try:
            return "DALI", version(name), "the input pipeline"
        except PackageNotFoundError:
            continue
    remedy = "pip install 'fuseer[dali-cu13]'; PyPI's nvidia-dali is a placeholder"
    return "DALI", "absent", f"off: torchvision's pipeline draws the same views, slower; {remedy}"


def _apex() -> tuple[str, str, str]:
    """NVIDIA's apex is never needed; PyPI's package of that name is a web toolkit and unrelated."""
    try:
        files = {str(path) for path in distribution("apex").files or ()}
    except PackageNotFoundError:
        return "apex", "absent", "not needed"
    if any(path.startswith("apex/optimizers/") for path in files):
        return "apex", version("apex"), "NVIDIA's; not needed"
    return "apex", "wrong one", "PyPI's apex is a web authentication toolkit, not NVIDIA's; ignored; pip uninstall apex"


def _program(name: str, use: str, otherwise: str) -> tuple[str, str, str]:
    path = shutil.which(name)
    return (name, "found", use) if path else (name, "absent", f"off: {otherwise}")
