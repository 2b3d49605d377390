"""Is a checkpoint whole or absent, and refused in words when it does not fit?"""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fuseer.engine import checkpoint
from fuseer.engine.config import OptimConfig
from fuseer.engine.distributed import Ranks
from fuseer.engine.optim import build_optimizer
from fuseer.engine.partitions import layout
from fuseer.engine.teacher import Teachers

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


class Toy(nn.Module):
    sharded = {"queue": 0}

    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.register_buffer("queue", torch.zeros(6, 2))
        self.rows = 0

    def counters(self):
        return {"rows": self.rows}

    def load_counters(self, counters, same_world):
        self.rows = counters["rows"]


@pytest.fixture(scope="module", autouse=True)
def world():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def made(width=4, name="adamw"):
    toy = Toy(width)
    optimizer = build_optimizer(toy, OptimConfig(name=name, lr=0.1))
    optimizer.bind(layout(toy, None), None, partitioned=False)
    return toy, optimizer


def trained(steps=3):
    torch.manual_seed(1)
    toy, optimizer = made()
    for _ in range(steps):
        toy.body(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    toy.queue.copy_(torch.randn(6, 2))
    toy.rows = 5
    return toy, optimizer


class Student(nn.Module):
    teacher_of = {"key": "body"}

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))

    def teacher_momentum(self, step):
        return 0.9


def taught(width=4, name="key"):
    torch.manual_seed(2)
    student = Student(width)
    student.teacher_of = {name: "body"}
    teachers = Teachers(student)
    getattr(student, name)(torch.randn(8, 3))
    return teachers


def write(folder, toy, optimizer, *steps, keep=2):
    for step in steps:
        checkpoint.save(folder, step, method=toy, optimizer=optimizer, ranks=ALONE, meta={"source": "x"}, keep=keep)


def test_everything_comes_back(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 3)
    expected = torch.randn(4)
    torch.manual_seed(99)
    other, other_optimizer = made()
    meta = checkpoint.load(checkpoint.latest(tmp_path), method=other, optimizer=other_optimizer, ranks=ALONE)
    assert meta["step"] == 3 and meta["source"] == "x" and other.rows == 5
    for name, tensor in toy.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    for p, q in zip(toy.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(other_optimizer.state[q][key], value), key
    assert torch.equal(torch.randn(4), expected), "the generator goes on where it was"


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1, 2)
    (tmp_path / ".part_00000003").mkdir()
    (tmp_path / ".part_00000003" / "model.safetensors").write_bytes(b"half")
    short = tmp_path / "step_00000002" / "model.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    assert checkpoint.latest(tmp_path).name == "step_00000001"
    (tmp_path / "step_00000001" / "meta.json").write_text('{"files": {')
    with pytest.raises(ValueError, match="holds no complete one"):
        checkpoint.latest(tmp_path)


def test_damage_and_other_models_are_refused(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1)
    place = checkpoint.latest(tmp_path)
    wide, wide_optimizer = made(width=5)
    with pytest.raises(ValueError, match=r"body.0.bias is \[4\] .* and \[5\]"):
        checkpoint.load(place, method=wide, optimizer=wide_optimizer, ranks=ALONE)
    toy.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="another model; it lacks .*extra"):
        checkpoint.load(place, method=toy, optimizer=optimizer, ranks=ALONE)
    weights = place / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    other, other_optimizer = made()
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(place, method=other, optimizer=other_optimizer, ranks=ALONE)


def test_another_optimizer_is_refused(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1)
    other, other_optimizer = made(name="sgd")
    with pytest.raises(ValueError, match="optimizer"):
        checkpoint.load(checkpoint.latest(tmp_path), method=other, optimizer=other_optimizer, ranks=ALONE)


def test_teachers_come_back_from_a_file_of_their_own(tmp_path):
    toy, optimizer = trained()
    teachers = taught()
    checkpoint.save(tmp_path, 1, method=toy, teachers=teachers, optimizer=optimizer, ranks=ALONE, meta={}, keep=2)
    place = checkpoint.latest(tmp_path)
    assert (place / "teacher.safetensors").is_file()
    again = taught()
    for tensor in again.state_dict().values():
        tensor.zero_()
    checkpoint.load(place, method=toy, teachers=again, optimizer=optimizer, ranks=ALONE)
    for name, tensor in teachers.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.key[0].weight.any() and again.key[1].running_mean.any()


def test_strange_or_missing_teachers_are_refused(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1)
    checkpoint.save(tmp_path, 2, method=toy, teachers=taught(), optimizer=optimizer, ranks=ALONE, meta={}, keep=2)
    without, place = checkpoint.complete(tmp_path)
    given = {"method": toy, "optimizer": optimizer, "ranks": ALONE}
    with pytest.raises(ValueError, match=r"holds no teacher and this method has one \(key\)"):
        checkpoint.load(without, teachers=taught(), **given)
    with pytest.raises(ValueError, match=r"holds a teacher and this method has none \(key\)"):
        checkpoint.load(place, **given)
    with pytest.raises(ValueError, match=r"another model; it lacks \['teacher.0.bias'"):
        checkpoint.load(place, teachers=taught(name="teacher"), **given)
    with pytest.raises(ValueError, match=r"key.0.bias is \[4\] .* and \[5\]"):
        checkpoint.load(place, teachers=taught(5), **given)
    (place / "teacher.safetensors").unlink()
    assert checkpoint.latest(tmp_path) == without, "a checkpoint without its teacher is not complete"


def test_another_format_is_refused(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1)
    place = checkpoint.latest(tmp_path)
    (place / "meta.json").write_text((place / "meta.json").read_text().replace(f'"format": {checkpoint.FORMAT}', '"format": 1'))
    for load in (
        lambda: checkpoint.load(place, method=toy, optimizer=optimizer, ranks=ALONE),
        lambda: checkpoint.load_weights(place, toy.body, prefix="body."),
    ):
        with pytest.raises(ValueError, match="has format 1, this version reads 2 and 3; go on with the version that wrote it"):
            load()


def test_weights_are_loaded_by_name(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    checkpoint.load_weights(checkpoint.latest(tmp_path), body, prefix="body.")
    assert all(torch.equal(tensor, toy.body.state_dict()[name]) for name, tensor in body.state_dict().items())


def test_pieces_that_are_not_the_parameter_are_refused(tmp_path):
    toy, optimizer = trained()
    optimizer.partitioned = True
    first = optimizer.pieces_of["body.0.weight"][0]
    for pieces, words in (
        ([first._replace(numel=5)], r"of body.0.weight the ranks hold 5 elements and it has 12; nothing was saved"),
        ([first, first._replace(offset=3, numel=9)], r"of body.0.weight element 3 is held by no rank or by several"),
        ([first._replace(offset=4, numel=8)], r"of body.0.weight element 0 is held by no rank or by several"),
    ):
        optimizer.pieces_of["body.0.weight"] = pieces
        with pytest.raises(RuntimeError, match=words):
            write(tmp_path, toy, optimizer, 1)
    assert not list(tmp_path.iterdir())


def test_only_the_newest_are_kept(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1, 2, 3)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_00000002", "step_00000003"]


def test_what_going_back_has_left_is_not_what_is_kept(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1, 2, 9, keep=4)
    assert len(checkpoint.complete(tmp_path)) == 3, "fewer than are kept"
    write(tmp_path, toy, optimizer, 3, keep=1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_00000003", "step_00000009"]
    assert (tmp_path / "latest").read_text() == "step_00000003\n"


def test_resuming_walks_back_to_the_newest_undamaged_one_and_says_so(tmp_path, capsys):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1, 2, 3, 4, 5, keep=9)
    (tmp_path / "latest").write_text("step_00000009\n")
    places = checkpoint.complete(tmp_path)
    (places[4] / "meta.json").unlink()
    (places[3] / "meta.json").write_text("[]")
    flip(places[2] / "optimizer.safetensors")
    short = places[1] / "rng.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    assert checkpoint.newest_sound(tmp_path, ALONE) == places[0]
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "step_00000005: meta.json is not there; going on from step_00000001",
        "step_00000004: meta.json is damaged",
        "step_00000003: optimizer.safetensors is damaged (its CRC-32 is not the recorded one)",
        "step_00000002: rng.safetensors has 5,",
    ):
        assert f"passed over {words}" in said, said
    flip(places[0] / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no complete one \(step_00000005: .*step_00000001: model.safetensors is damaged"):
        checkpoint.newest_sound(tmp_path, ALONE)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        checkpoint.load_weights(places[0], toy.body, prefix="body.")
    with pytest.raises(ValueError, match="absent holds no complete one, so there is nothing to go on from"):
        checkpoint.newest_sound(tmp_path / "absent", ALONE)


def flip(path):
    """One bit of the last byte."""
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)


def test_a_checkpoint_of_the_version_before_is_read(tmp_path):
    """Format 2: whole tensors, also of several ranks, SHA-256, states of what is not trained, other keys for generators of no rank here."""
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 3)
    place = checkpoint.latest(tmp_path)
    meta = json.loads((place / "meta.json").read_text())
    states = load_file(place / checkpoint.OPTIMIZER) | {"exp_avg/untrained": torch.zeros(2)}
    save_file(states, place / checkpoint.OPTIMIZER)
    meta |= {"format": 2, "world_size": 2, "segments": {}}
    for name in meta["files"]:
        data = (place / name).read_bytes()
        meta["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (place / "meta.json").write_text(json.dumps(meta))
    other, other_optimizer = made()
    assert checkpoint.newest_sound(tmp_path, ALONE) == place
    checkpoint.load(place, method=other, optimizer=other_optimizer, ranks=ALONE)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in toy.state_dict().items())
    for p, q in zip(toy.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(other_optimizer.state[q][key], value) for key, value in optimizer.state[p].items())
    flip(place / checkpoint.MODEL)
    with pytest.raises(ValueError, match="its SHA-256 is not the recorded one"):
        checkpoint.load(place, method=other, optimizer=other_optimizer, ranks=ALONE)


def test_what_was_frozen_stays_frozen(tmp_path):
    toy, optimizer = made()
    del optimizer.pieces_of["body.0.bias"]
    write(tmp_path, toy, optimizer, 1)
    other, other_optimizer = made()
    with pytest.raises(ValueError, match=r"other parameters frozen; it lacks \['exp_avg/body.0.bias'"):
        checkpoint.load(checkpoint.latest(tmp_path), method=other, optimizer=other_optimizer, ranks=ALONE)


def test_weights_in_another_memory_layout_are_saved_as_they_read(tmp_path):
    def made_conv():
        toy = Toy()
        toy.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = build_optimizer(toy, OptimConfig(name="sgd", lr=0.1))
        optimizer.bind(layout(toy, None), None, partitioned=False)
        return toy, optimizer

    toy, optimizer = made_conv()
    optimizer.state[toy.conv.weight]["momentum_buffer"].copy_(torch.randn(4, 3, 3, 3))
    write(tmp_path, toy, optimizer, 1)
    assert torch.equal(checkpoint.read(checkpoint.latest(tmp_path), checkpoint.MODEL)["conv.weight"], toy.conv.weight)
    other, other_optimizer = made_conv()
    checkpoint.load(checkpoint.latest(tmp_path), method=other, optimizer=other_optimizer, ranks=ALONE)
    assert torch.equal(other.conv.weight, toy.conv.weight)
    momenta = (opt.state[of.conv.weight]["momentum_buffer"] for of, opt in ((toy, optimizer), (other, other_optimizer)))
    assert torch.equal(*momenta)


def test_a_background_writer_tells_of_its_failure_once_and_the_run_may_end(tmp_path, monkeypatch):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1)

    def full(*given):
        raise OSError(28, "No space left on device")

    given = {"method": toy, "optimizer": optimizer, "meta": {}, "keep": 2}
    with checkpoint.Writer(ALONE, background=True) as writer:
        writer.save(tmp_path, 2, **given)
        writer.finish()
        assert writer.seconds > 0 and checkpoint.latest(tmp_path).name == "step_00000002"
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.shards, "write", full)
            writer.save(tmp_path, 3, **given)
            with pytest.raises(RuntimeError, match="rank 0 could not write to .*No space left on device; nothing was saved"):
                writer.save(tmp_path, 4, **given)
        writer.save(tmp_path, 4, **given)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_00000002", "step_00000004"]


def test_nothing_pickled_is_written(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1)
    names = {path.name for path in checkpoint.latest(tmp_path).iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "meta.json"}
    assert json.loads((checkpoint.latest(tmp_path) / "meta.json").read_text())["format"] == checkpoint.FORMAT
