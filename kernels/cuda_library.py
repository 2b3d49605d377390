"""Is fuseer.kernels._C_cuda, the CUDA kernels of csrc, here, if not why not, and how are they launched?

A library of its own that knows neither Python nor torch, only addresses, numbers and the stream: nvcc makes it in seconds for every
architecture, no torch release breaks it, where it fails _C stays, and tests put the same sources, compiled for the CPU, in its place.
"""

import ctypes
from pathlib import Path

import torch  # brings libcudart, which the library is linked against, into the process

PATH = Path(__file__).with_name("_C_cuda.so")
REASON_FILE = PATH.with_name("_C_cuda_reason.txt")
# numbers of a block of the kernels, block_size in csrc/tensor_lists.cuh
BLOCK = 2048


def _load():
    if REASON_FILE.exists():
        return None, f"the CUDA kernels were not built: {REASON_FILE.read_text(encoding='utf-8').strip()}"
    if not PATH.exists():
        return None, "the CUDA kernels were never built; run pip install --no-deps --no-build-isolation -e ."
    try:
        return ctypes.CDLL(str(PATH)), None
    except OSError as error:
        return None, f"the CUDA kernels do not load ({error}); install fuseer again beside torch {torch.__version__}"


LIBRARY, REASON = _load()


def refusal(name, tensors):
    """Why the kernels cannot take `tensors`, the argument `name`; None where they can."""
    if tensors[0].device.type != "cuda":
        return f"{name} is on {tensors[0].device.type}, not on a CUDA device"
    return REASON


def launch(entry, device, *arguments):
    """Calls the library's function `entry` on the current stream of `device`; RuntimeError where CUDA refuses.

    Tensors go as their addresses, None as a null pointer, integers as int64_t, floats as double.
    """
    with torch.cuda.device(device):
        torch.cuda.check_error(call(LIBRARY, entry, *arguments, torch.cuda.current_stream(device).cuda_stream))


def call(library, entry, *arguments):
    return getattr(library, entry)(*map(_passed, arguments))


def _passed(argument):
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return ctypes.c_void_p()
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)
