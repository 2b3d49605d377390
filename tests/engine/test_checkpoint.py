"""Is a checkpoint whole or absent, and refused in words when it does not fit?"""

import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fuseer.engine import checkpoint, tensor_file
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
        with pytest.raises(ValueError, match="has format 1, this version reads 2; go on with the version that wrote it"):
            load()


def test_weights_are_loaded_by_name(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    checkpoint.load_weights(checkpoint.latest(tmp_path), body, prefix="body.")
    assert all(torch.equal(tensor, toy.body.state_dict()[name]) for name, tensor in body.state_dict().items())


def test_a_file_is_written_while_one_tensor_lives(tmp_path):
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in tensor_file.DTYPES}
    tensors |= {
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 3),
        "turned": torch.randn(4, 6).t(),
        "bits": torch.tensor([-0.0, torch.nan]),
    }
    living = weakref.WeakSet()

    def one_by_one():
        for tensor in tensors.values():
            assert not living
            made = tensor.clone()
            living.add(made)
            yield made
            del made

    entries = [tensor_file.Entry(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    tensor_file.write(tmp_path / "file.safetensors", entries, one_by_one())
    read = load_file(tmp_path / "file.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_a_tensor_unlike_its_entry_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"scalar was announced as torch.int64 \[\]; got torch.float32 \[2\]"):
        tensor_file.write(tmp_path / "x", [tensor_file.Entry("scalar", torch.int64, ())], iter([torch.zeros(2)]))
    with pytest.raises(TypeError, match="x is torch.complex64; a file holds"):
        tensor_file.write(tmp_path / "x", [tensor_file.Entry("x", torch.complex64, ())], iter([]))


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


def test_nothing_pickled_is_written(tmp_path):
    toy, optimizer = trained()
    write(tmp_path, toy, optimizer, 1)
    names = {path.name for path in checkpoint.latest(tmp_path).iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "meta.json"}
    assert json.loads((checkpoint.latest(tmp_path) / "meta.json").read_text())["format"] == checkpoint.FORMAT
