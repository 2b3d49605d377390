"""Does the fault campaign hold on a few faults, is what it draws what it says, and would it notice?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import report
from benchmarks.engine import faults

ROOT = Path(__file__).parents[2]


def test_a_run_killed_twice_ends_as_one_left_alone():
    command = [sys.executable, "-m", "benchmarks.engine.faults", "kills=2", "stops=0", "seed=1", "store=false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("SIGKILL") == 2 and "bitwise equal after 2 faults" in done.stdout


def test_what_is_drawn():
    found = faults.drawn(30, 8, 0)
    assert found == faults.drawn(30, 8, 0) != faults.drawn(30, 8, 1)
    kills = [fault.phase for fault in found if fault.name == "SIGKILL"]
    assert {phase: kills.count(phase) for phase in faults.PHASES} == {"start": 6, "step": 12, "save": 12}
    assert sorted(fault.phase for fault in found if fault.name == "SIGTERM") == ["save"] * 4 + ["step"] * 4
    assert {fault.rank for fault in found} == {0, 1} and len({fault.into for fault in found}) == len(found)


def folder(place: Path, losses: list[float], weight: torch.Tensor) -> Path:
    step = place / "ckpt" / "step_00000002"
    step.mkdir(parents=True)
    records = [{"kind": "train", "step": step % 2 + 1, "loss": loss} for step, loss in enumerate(losses)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    save_file({"w": weight}, step / "model.safetensors")
    return place


def test_a_bit_is_a_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(faults.checkpoint, "latest", lambda ckpt: next(ckpt.iterdir()))
    clean = folder(tmp_path / "clean", [3.0, 2.0], torch.tensor([0.0, 1.0]))
    assert faults.differences(folder(tmp_path / "same", [3.0, 2.0, 3.0, 2.0], torch.tensor([0.0, 1.0])), clean) == []
    assert faults.differences(folder(tmp_path / "sign", [3.0, 2.0], torch.tensor([-0.0, 1.0])), clean) == ["w in model.safetensors"]
    repeated = folder(tmp_path / "loss", [3.0, 2.0, 3.0000001], torch.tensor([0.0, 1.0]))
    assert faults.differences(repeated, clean) == ["loss of step 1"]
    assert faults.differences(folder(tmp_path / "less", [3.0], torch.tensor([0.0, 1.0])), clean) == ["steps without a record"]


def test_the_table_of_faults():
    machine = {"device": "D", "threads": 1, "cores": 2, "instruction_set": "I", "commit": "c", "dirty": False, "date": "2026-01-02"}
    machine |= {"torch": "1", "triton": "2", "lightly": "absent", "seed": 0, "steps": 40, "every": 4, "seconds": 9}
    row = {"case": "SIGKILL", "rank": 1, "phase": "save", "step": 8, "resumed": 4, "lost": 4, "number": 2}
    other = {"case": "SIGTERM", "rank": 0, "phase": "step", "step": 3, "resumed": 5, "lost": 0, "number": 1}
    lines = report.fault_table([machine | row, machine | other]).splitlines()
    assert lines[2:4] == ["| 1 | SIGTERM | 0 | stepped | 3 | 5 | 0 |", "| 2 | SIGKILL | 1 | saved | 8 | 4 | 4 |"]
    assert lines[-1].startswith("1 × SIGKILL, 1 of them during a save, and 1 × SIGTERM in a run of 40 steps on two ranks, saved every 4;")
    assert report.fault_table([]) == ""


def test_strange_words_are_refused():
    with pytest.raises(ValueError, match="give kills=…, stops=…, .* got kils=3"):
        faults.run(["kils=3"])
