"""Do the Triton backends hold in Triton's interpreter, each file in a process whose kernels were decorated for it?"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# the op tests pick the Triton backends up by themselves there; of the files about one op, what bears the backend's name runs
FILES = {
    "interpreted.py": "",
    "interpreted_contrast.py": "",
    "interpreted_patches.py": "",
    "interpreted_swapped.py": "",
    "interpreted_updates.py": "",
    "test_all_updates.py": "",
    "test_all_ops.py": "",
    "test_sinkhorn.py": "triton",
    "test_ranks.py": "",
    "test_ranks_contrastive.py": "",
    "test_all_ops_autograd.py": "",
    "test_all_ops_compiled.py": "",
    "test_swapped_prediction.py": "triton",
    "test_soft_xent.py": "triton",
    "test_nt_xent.py": "triton",
    "test_masked_patch_mse.py": "triton",
    "test_info_nce.py": "triton",
    "test_ema_update_.py": "triton",
    "test_lars_update_.py": "triton",
    "test_ranks_updates.py": "",
    "test_patch_mask.py": "triton",
    "test_gather_tokens.py": "triton",
    "test_unshuffle_tokens.py": "triton",
    "test_gather_patches.py": "triton",
    "test_patch_embed_visible.py": "triton",
}


@pytest.fixture(scope="module")
def processes():
    """A process for every file, two at a time, the longest first."""
    with ThreadPoolExecutor(2) as pool:
        yield {file: pool.submit(interpreted, HERE / file, "-k", words) for file, words in FILES.items()}


@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(processes, file):
    done = processes[file].result()
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 3, done.stdout


def test_a_failure_in_there_fails_here(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("from fuseer.kernels import _tl\n\ndef test_planted():\n    assert not _tl.INTERPRETED\n")
    done = interpreted(planted)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout


def interpreted(file, *options):
    plugins = ["-p", "interpreter", "-p", "no:cacheprovider", "-o", "addopts="]
    command = [sys.executable, "-m", "pytest", *plugins, "--tb=short", *options, str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    environment.pop("FUSEER_BACKEND", None)
    return subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True)
