"""Does a signal to any rank end all of them at one step, saved where there is time, and does the run then go on bitwise?"""

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch

from fuseer.engine import checkpoint, cli, distributed, preemption, train
from fuseer.engine.config import apply_overrides
from fuseer.engine.evaluate.frozen import Labelled
from fuseer.engine.log import RunLog
from fuseer.engine.methods.swav import SwAV
from fuseer.engine.preemption import Preemption, Stopped
from fuseer.engine.recipes.recipe import load_recipe
from tests.ranks import on_ranks

STEPS = 9
SMALL = {
    "method.hidden_widths": "[16]",
    "method.embedding_width": "8",
    "method.prototypes": "6",
    "model.name": "anynet",
    "model.options": '{"depths": [1], "widths": [16], "group_widths": 8, "stem_width": 8, "stem_stride": 2}',
    "model.sync_norm_ranks": "2",
    "data.pipeline": "torchvision",
    "batch_size": "8",
    "precision": "fp32",
    "epochs": "0",
    "steps": str(STEPS),
    "optim.warmup_steps": "2",
    "log_every_steps": "1",
    "knn.every_steps": "0",
}


def small(images, **more):
    return apply_overrides(load_recipe("tiny_swav").config(), {**SMALL, "data.path": str(images), **more})


def ended(config, out: Path, at: int = 0, signals: tuple = (), resume: bool = False) -> tuple[str, list[int]]:
    """What the run said at its end, nothing at its last step, and the steps that it did; `signals` reach this process in step `at`."""
    done, follow = [], SwAV.after_step

    def after_step(self, step):
        follow(self, step)
        done.append(step)
        if step == at and len(done) > 1:
            for number in signals:
                os.kill(os.getpid(), number)

    with mock.patch.object(SwAV, "after_step", after_step):
        try:
            train.train(config, out, resume=resume)
        except Stopped as stopped:
            return str(stopped), done
    return "", done


def on_rank(rank: int, images: str, folder: str) -> dict:
    folder, found = Path(folder), {}
    mine = (signal.SIGTERM, signal.SIGTERM) if rank == 1 else ()
    found["whole"] = ended(small(images), folder / "whole")
    found["stopped"] = ended(small(images), folder / "stopped", 3, mine)
    if rank == 0:
        shutil.copytree(folder / "stopped", folder / "resumed")
    found["resumed"] = ended(small(images), folder / "resumed", resume=True)
    rare = small(images, stop_check_every_steps="2", checkpoint_every_steps="5")
    found["rare"] = ended(rare, folder / "rare", 3, (signal.SIGUSR1,) if rank == 0 else ())
    late = small(images, stop_grace_seconds="1e-6", checkpoint_every_steps="3")
    found["late"] = ended(late, folder / "late", 3, mine)
    return found


@pytest.fixture(scope="module")
def runs(small_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stops")
    return on_ranks(2, on_rank, str(small_images), str(folder)), folder


def records(out: Path, kind: str = "train") -> list[dict]:
    return [record for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if record["kind"] == kind]


def test_a_signal_to_one_rank_stops_all_at_one_step_and_saves_it(runs):
    (first, second), folder = runs
    step = second["stopped"][1][-1]
    assert first["stopped"][1] == second["stopped"][1] and 3 < step <= 5 < STEPS, "seen at step 3, sent after it, read one step later"
    assert second["stopped"][0].startswith(f"stopped after step {step} by SIGTERM; saved in ")
    assert first["stopped"][0].startswith(f"stopped after step {step} by a signal to another rank; saved in ")
    assert first["whole"] == second["whole"] == ("", list(range(STEPS + 1)))
    assert [path.name for path in checkpoint.complete(folder / "stopped" / "ckpt")] == [f"step_{step:08d}"]


def test_it_goes_on_bitwise(runs):
    (first, second), folder = runs
    assert first["resumed"] == second["resumed"] == ("", list(range(first["stopped"][1][-1], STEPS + 1)))
    losses = {record["step"]: record["loss"] for record in records(folder / "resumed")}
    assert losses == {record["step"]: record["loss"] for record in records(folder / "whole")} and len(set(losses.values())) == STEPS
    last = [checkpoint.latest(folder / name / "ckpt") for name in ("resumed", "whole")]
    for ours in last[0].glob("*.safetensors"):
        assert ours.read_bytes() == (last[1] / ours.name).read_bytes(), ours.name


def test_ranks_ask_each_other_every_so_many_steps_and_save_no_step_twice(runs):
    (first, second), folder = runs
    said, steps = first["rare"]
    assert steps == second["rare"][1] == list(range(6)), "asked after steps 1, 3 and 5: sent after 3, read after 5"
    assert said == "stopped after step 5 by SIGUSR1; that step is saved; go on with resume=true"


def test_without_the_time_for_a_save_nothing_is_written(runs):
    (first, second), folder = runs
    step = first["late"][1][-1]
    for rank in (first, second):
        assert f"stopped after step {step} by" in rank["late"][0] and "without saving: the last save took" in rank["late"][0]
        assert "resume=true goes on from step 3" in rank["late"][0]
    assert step > 3 and [path.name for path in checkpoint.complete(folder / "late" / "ckpt")] == ["step_00000003"]


@pytest.fixture
def alone():
    yield distributed.start()
    distributed.stop()


def test_a_signal_during_the_probe_ends_it(alone, small_images, tmp_path):
    plain = Labelled.batches

    def batches(self, *given):
        for batch in plain(self, *given):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with mock.patch.object(Labelled, "batches", batches):
        said, steps = ended(small(small_images, **{"knn.every_steps": "2"}), tmp_path / "run")
    assert said.startswith("stopped after step 2 by SIGTERM; saved") and steps == [0, 1, 2]
    assert records(tmp_path / "run", "knn") == []


def test_the_command_ends_with_a_status_of_its_own(small_images, tmp_path, capsys):
    words = [f"{key}={value}" for key, value in SMALL.items()]
    follow = SwAV.after_step

    def after_step(self, step):
        follow(self, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with mock.patch.object(SwAV, "after_step", after_step):
        arguments = ["pretrain", "recipe=tiny_swav", f"data={small_images}", f"out={tmp_path / 'run'}", "resume=auto", *words]
        assert cli.main(arguments) == preemption.EXIT_STATUS == 75
    assert "fuseer: stopped after step 2 by SIGINT; saved in" in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.html").exists(), "who is asked to go does not draw first"
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    assert cli.main(arguments) == 0 and (tmp_path / "run" / "report.html").exists()
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert cli.main(arguments) == 2 and "already at step 9 of 9" in capsys.readouterr().err


def test_auto_starts_only_where_there_is_no_checkpoint(alone, small_images, tmp_path):
    from fuseer.engine.resume import agree_on_folder

    config, out = small(small_images), tmp_path / "run"
    assert agree_on_folder(config, out, alone, "auto") is False
    out.mkdir()
    (out / "config.json").write_text(config.to_json())
    assert agree_on_folder(config, out, alone, "auto") is False, "killed before its first checkpoint"
    with pytest.raises(ValueError, match="already holds a run"):
        agree_on_folder(config, out, alone, False)
    (out / "ckpt" / "step_00000003").mkdir(parents=True)
    assert agree_on_folder(config, out, alone, "auto") is True, "damaged or not: never afresh over a checkpoint"
    with pytest.raises(ValueError, match="batch_size was 8"):
        agree_on_folder(config.model_copy(update={"batch_size": 4}), out, alone, "auto")


def test_only_a_second_interrupt_ends_at_once():
    ranks = distributed.Ranks(0, 1, 0, 1, torch.device("cpu"))
    with mock.patch.object(preemption.time, "monotonic", side_effect=[0.0, 0.5, 5.0, 6.0]), Preemption(ranks) as stop:
        assert not stop.agreed()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_before_the_first_step_there_is_nothing_to_save():
    ranks, writer = distributed.Ranks(0, 1, 0, 1, torch.device("cpu")), mock.Mock(seconds=None)
    with Preemption(ranks) as stop, pytest.raises(Stopped, match="^stopped after step 0 by SIGTERM; there was nothing to save$"):
        os.kill(os.getpid(), signal.SIGTERM)
        stop.leave(0, saved=0, writer=writer, save=writer.save)
    writer.save.assert_not_called()


def test_signals_are_left_alone_outside_the_main_thread():
    ranks, found = distributed.Ranks(0, 1, 0, 1, torch.device("cpu")), []

    def enter():
        with Preemption(ranks) as stop:
            found.append(stop.agreed())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False]


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 2.0}\n{"kind": "train", "st')
    log = RunLog(tmp_path, first_rank=True, start=1, total=2, images_per_step=8)
    log.event("resume", 1)
    log.close()
    assert [record["kind"] for record in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == ["train", "resume"]
