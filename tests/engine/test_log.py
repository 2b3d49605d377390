"""What does a train record say of speed, share of the peak, memory and the parts of a step?"""

import json
import time

import pytest
import torch

from fuseer.engine.log import Laps, RunLog, peak_memory

CPU = torch.device("cpu")


def test_laps_add_up_and_begin_anew():
    laps, began = Laps(CPU), time.perf_counter()
    for _ in range(2):
        laps.begin()
        time.sleep(0.02)
        laps.end("data")
        laps.end("forward")
        time.sleep(0.01)
        laps.begin()
        time.sleep(0.03)
        laps.end("backward")
    spent, found = time.perf_counter() - began, laps.read()
    assert found["data"] >= 0.04 and found["backward"] >= 0.06 and found["forward"] < 0.04
    # what lies between an end and the next begin belongs to no part
    assert sum(found.values()) <= spent - 0.02
    assert laps.read() == {}


def test_a_record_tells_rates_memory_and_parts(tmp_path):
    log = RunLog(tmp_path, first_rank=True, start=4, total=8, images_per_step=10, device=CPU, crops_per_image=6, mfu_of_an_image=1e-4)
    batches = iter([1, 2])
    assert [log.awaited(batches), log.awaited(batches)] == [1, 2]
    log.end("forward")
    time.sleep(0.05)
    log.end("backward")
    log.train(6, 1.0, 0.1, {"loss": torch.tensor(2.0), "skipped": torch.tensor(0)})
    log.train(8, 1.0, 0.1, {"loss": torch.tensor(2.0), "skipped": torch.tensor(0)})
    log.close()
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first["crops_per_second"] == pytest.approx(6 * first["images_per_second"], rel=0.01)
    assert first["mfu"] == pytest.approx(1e-4 * first["images_per_second"], rel=0.05, abs=1e-4)
    assert first["peak_memory_gib"] == pytest.approx(peak_memory(CPU) / 2**30, rel=0.2)
    # two steps since the last record
    assert set(first["step_seconds"]) == {"data", "forward", "backward"} and 0.025 <= first["step_seconds"]["backward"] < 0.1
    assert second["step_seconds"] == {}


def test_without_a_known_peak_there_is_no_mfu(tmp_path):
    log = RunLog(tmp_path, first_rank=True, start=0, total=1, images_per_step=1)
    log.train(1, 1.0, 0.1, {"loss": torch.tensor(2.0), "skipped": torch.tensor(0)})
    log.close()
    assert "mfu" not in json.loads((tmp_path / "metrics.jsonl").read_text())
