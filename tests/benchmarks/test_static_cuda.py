"""Do the CUDA C++ kernels stay within their budgets on every architecture they were built for?"""

import re

import pytest
import torch

from benchmarks import static_cuda
from fuseer.kernels import cuda_library

# kernel: (registers of 256 threads that leave room for 4 blocks a multiprocessor, least 128-bit loads, least 128-bit stores)
BUDGETS = {"ema_update": (64, 28, 16), "lars_squares": (64, 28, 0), "lars_merge": (64, 0, 0), "lars_update": (80, 44, 28)}
pytestmark = pytest.mark.skipif(cuda_library.LIBRARY is None, reason=f"{cuda_library.REASON}: no machine code to read")


@pytest.fixture(scope="module")
def rows():
    return static_cuda.kernels()


def test_every_kernel_is_there_for_every_architecture(rows):
    arches = {row["arch"] for row in rows}
    assert {(row["kernel"], row["arch"]) for row in rows} == {(kernel, arch) for kernel in BUDGETS for arch in arches}


def test_budgets(rows):
    for row in rows:
        registers, loads, stores = BUDGETS[row["kernel"]]
        assert row["stack"] == row["spills"] == 0, row
        assert row["registers"] <= registers, row
        assert row["loads"].get(128, 0) >= loads and row["stores"].get(128, 0) >= stores, row


def test_page_has_the_kernels(rows):
    page = static_cuda.PAGE.read_text(encoding="utf-8").partition("<!-- cuda -->")[2]
    assert all(f"| `{kernel}` |" in page for kernel in BUDGETS)


def test_library_has_what_python_calls():
    """A function that takes a type of an anonymous namespace is not exported."""
    files = static_cuda.PAGE.parents[1].glob("kernels/*/_cuda.py")
    entries = {entry for path in files for entry in re.findall(r'"(fuseer_\w+)"', path.read_text(encoding="utf-8"))}
    assert len(entries) == len(BUDGETS) and all(hasattr(cuda_library.LIBRARY, entry) for entry in entries)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would run it")
def test_without_a_gpu_a_launch_is_refused():
    assert cuda_library.call(cuda_library.LIBRARY, "fuseer_lars_merge", None, 1, None, None, None) != 0
