"""Do the documented launch lines start what they say, and does a run on two hosts outlive the loss of one?"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fuseer.engine import checkpoint, cli, distributed, launch, train
from fuseer.engine.data.order import SampleIndex
from fuseer.engine.methods.swav import SwAV
from fuseer.engine.preemption import EXIT_STATUS
from fuseer.engine.recipes.recipe import recipe_names

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 12, 3
SMALL = (
    "recipe=tiny_swav",
    "method.hidden_widths=[16]",
    "method.embedding_width=8",
    "method.prototypes=6",
    # smooth and without BatchNorm: another order of the same sums must stay another order of the same sums
    "method.head_batch_norm=false",
    "method.head_activation=silu",
    "model.name=vit_tiny",
    'model.options={"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}',
    "data.pipeline=torchvision",
    "batch_size=8",
    # AdamW would make full steps of a zero gradient's rounding
    "optim.name=sgd",
    "optim.lr=0.05",
    "optim.warmup_steps=2",
    "log_every_steps=1",
    "knn.every_steps=0",
    "precision=fp32",
    f"steps={STEPS}",
    f"checkpoint_every_steps={EVERY}",
)


def documented() -> list[str]:
    """Every command line of README.md and docs/training.md, continued lines joined."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/training.md")]
    blocks = [block for text in texts for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)]
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def launched(line: str) -> list[str] | None:
    """What a launch line hands to `fuseer pretrain`, after the launcher's own parser has taken its part; None for other lines."""
    words = shlex.split(re.sub(r"\$\(\([^)]*\)\)|\$\{?\w+\}?", "1", line), comments=True)
    while words and (words[0] in ("srun", "exec") or words[0].startswith("--")):
        words = words[1:]
    if words[:1] == ["deepspeed"]:
        from deepspeed.launcher import runner

        taken = runner.parse_args(words[1:])
        assert (taken.module, taken.user_script) == (True, "fuseer.engine.train"), line
        return taken.user_args
    if words[:1] == ["torchrun"]:
        from torch.distributed import run

        taken = run.parse_args(words[1:])
        assert (taken.module, taken.training_script) == (True, "fuseer.engine.train"), line
        return taken.training_script_args
    if words[:3] == ["python", "-m", "fuseer.engine.train"]:
        return words[3:]
    return words[2:] if words[:2] == ["fuseer", "pretrain"] else None


def test_documented_launch_lines_are_understood():
    found, seen = {}, set()
    for line in documented():
        arguments = launched(line)
        if arguments is None or "…" in line.split("recipe=")[-1].split()[0]:
            continue
        options = dict(word.split("=", 1) for word in arguments if word != "key.path=value" and word != "…")
        assert options.keys() >= {"recipe", "out"} and options["recipe"] in recipe_names(), line
        cli._configure(options)
        found[line] = options
        seen.add(next(word for word in ("deepspeed", "torchrun", "srun", "fuseer") if word in line))
    assert seen == {"deepspeed", "torchrun", "srun", "fuseer"} and any("--hostfile" in line for line in found)


def test_the_documented_job_script_is_a_script(tmp_path):
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (script,) = [block for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) if block.startswith("#!/bin/bash")]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    (tmp_path / "srun").write_text(f"#!/bin/bash\necho \"$@\" >> {tmp_path}/called; exit $(cat {tmp_path}/status)\n")
    (tmp_path / "scontrol").write_text(f"#!/bin/bash\necho scontrol \"$@\" >> {tmp_path}/called\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    for status, requeued in ((0, False), (75, True), (1, False)):
        (tmp_path / "called").unlink(missing_ok=True)
        (tmp_path / "status").write_text(str(status))
        done = subprocess.run(["bash"], input=script, text=True, env=environment, cwd=tmp_path, capture_output=True)
        called = (tmp_path / "called").read_text()
        assert "python -m fuseer.engine.train" in called and "resume=auto" in called
        assert ("scontrol requeue 77" in called) is requeued, done.stderr


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[007-012,020]-ib,login1", "gpu007-ib"), ("a,b", "a"), ("n1", "n1"), ("x[3,5]", "x3"), ("r1n[01-02],r2n[01-02]", "r1n01")],
)
def test_the_first_host_of_a_slurm_list(nodes, first):
    assert launch.first_host(nodes) == first


def test_a_task_of_srun_learns_its_rank_and_a_batch_script_none():
    task = {
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "20",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
        "SLURM_STEP_NODELIST": "gpu[07-09]",
        "SLURM_JOB_ID": "1234567",
    }
    wanted = {"RANK": "9", "WORLD_SIZE": "20", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu07", "MASTER_PORT": "24567"}
    with mock.patch.dict(os.environ, task, clear=True):
        launch.take_ranks_from_slurm()
        assert {name: os.environ.get(name) for name in wanted} == wanted
    batch = {name: value for name, value in task.items() if not name.startswith("SLURM_STEP")}
    for given in (batch, {**task, "RANK": "0"}):
        with mock.patch.dict(os.environ, given, clear=True):
            launch.take_ranks_from_slurm()
            assert "MASTER_ADDR" not in os.environ


def test_only_the_loss_of_a_peer_is_told_as_one():
    gone = "[/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:5: Connection reset by peer. This is typically caused by…"
    for error in (RuntimeError(gone), dist.DistBackendError("NCCL communicator was aborted")):
        words = "lost another rank and ends .*(reset by peer|was aborted)\\); .* resume=true"
        with pytest.raises(RuntimeError, match=words), launch.loss_of_a_peer_in_words():
            raise error
    with pytest.raises(RuntimeError, match="^another$"), launch.loss_of_a_peer_in_words():
        raise RuntimeError("another")


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def weights(out: Path) -> torch.Tensor:
    tensors = checkpoint.read(checkpoint.latest(out / "ckpt"), checkpoint.MODEL)
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def host(number: int, folder: Path, port: int, arguments: list[str]) -> subprocess.Popen:
    """One of two hosts of one rank each, started there by hand as `deepspeed --no_ssh` wants it; in a process group of its own."""
    (folder / "hostfile").write_text("first slots=1\nsecond slots=1\n")
    command = ["deepspeed", f"--hostfile={folder / 'hostfile'}", "--no_ssh", f"--node_rank={number}", "--master_addr=127.0.0.1"]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    log = (folder / f"host{number}.log").open("w")
    command += [f"--master_port={port}", "--module", "fuseer.engine.train", *arguments]
    command[0] = str(Path(sys.executable).parent / "deepspeed")
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def until(reached, what: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"{what} took more than {seconds} s"
        time.sleep(0.02)


def members(group: int) -> list[int]:
    """Processes of a process group, zombies too."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[2]) == group:
                found.append(int(stat.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


@pytest.fixture(scope="module")
def one_process(small_images, tmp_path_factory):
    """The run that nothing disturbs, on one process, and as control the same with every batch turned round."""
    folder, plain = tmp_path_factory.mktemp("one"), SampleIndex.samples

    def turned(self, micro_step):
        epoch, places, asked = plain(self, micro_step)
        return epoch, places, np.ascontiguousarray(asked[::-1])

    for name, samples in (("run", plain), ("control", turned)):
        with mock.patch.object(SampleIndex, "samples", samples):
            options = dict(word.split("=", 1) for word in (*SMALL, f"data={small_images}"))
            train.train(cli._configure(options), folder / name)
    distributed.stop()
    return folder


def test_a_run_outlives_the_loss_of_a_host(one_process, small_images, tmp_path):
    """Two hosts; the second dies by SIGKILL, launcher and all; one process goes on, then two ranks of one host, to the same end."""
    wanted, control = one_process / "run", one_process / "control"
    assert (weights(control) - weights(wanted)).norm() <= 1e-6 * weights(wanted).norm()
    assert losses(control) != losses(wanted)
    out = tmp_path / "run"
    arguments = [*SMALL, f"data={small_images}", f"out={out}", "resume=auto"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = [host(number, tmp_path, port, arguments) for number in (0, 1)]
    try:
        until(lambda: (out / "ckpt").is_dir() and checkpoint.complete(out / "ckpt") or hosts[0].poll() is not None, "the first checkpoint")
        os.killpg(hosts[1].pid, signal.SIGKILL)
        until(lambda: hosts[0].poll() is not None, "the end of the other host", 60)
    finally:
        for one in hosts:
            if members(one.pid):
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()
    said = (tmp_path / "host0.log").read_text()
    assert hosts[0].returncode not in (0, EXIT_STATUS) and "fuseer: rank 0 lost another rank and ends" in said, said[-2000:]
    assert not members(hosts[0].pid), "the launcher leaves nobody behind"
    kept = checkpoint.read_meta(checkpoint.latest(out / "ckpt"))["step"]
    assert kept >= EVERY and max(losses(out)) - kept <= EVERY < STEPS

    follow = SwAV.after_step

    def after_step(self, step):
        follow(self, step)
        if step == kept + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with mock.patch.object(SwAV, "after_step", after_step):
        assert cli.main(["pretrain", *arguments]) == EXIT_STATUS
    assert checkpoint.read_meta(checkpoint.latest(out / "ckpt"))["step"] == kept + 2 < STEPS
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators=2", "--module", "fuseer.engine.train", *arguments]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert losses(out) == pytest.approx(losses(wanted), rel=1e-5) and max(losses(out)) == STEPS
    assert (weights(out) - weights(wanted)).norm() <= 1e-5 * weights(wanted).norm()
