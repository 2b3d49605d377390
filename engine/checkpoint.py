"""How does a run survive: when is what it saved complete, who says so, and which of its checkpoints is taken back?

A checkpoint is a folder `ckpt/step_00001200/` of safetensors that every rank writes for itself, keyed by parameter name, so that any ZeRO
stage and number of ranks can load them, and of `meta.json`, their manifest. Loading never executes code.
"""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fuseer.engine import shards, state
from fuseer.engine.distributed import Ranks
from fuseer.engine.log import say
from fuseer.engine.shards import Part, Shards
from fuseer.engine.state import MODEL, OPTIMIZER, RNG, TEACHER
from fuseer.engine.tensor_file import damage, flush_folder, lack, write_text

FORMAT = 3
# format 2: whole tensors that the first rank had gathered, SHA-256
READABLE = (2, FORMAT)
PART, OLD = ".part_", ".old_"


class Writer:
    """Writes checkpoints, `background=True` in a thread of its own while training goes on; a context that ends when all are complete.

    The protocol, over all ranks: the first one makes a folder `.part_…` beside the place; every rank writes its own files there, has
    them on the disk and tells their sizes, checksums and pieces; the first one checks that the pieces are the tensors, writes meta.json
    last, has the folder on the disk, renames it to its place, points `latest` at it, and only then deletes older complete ones. Whoever
    dies in between leaves the checkpoint before as it was. Errors are told to all ranks, which raise RuntimeError.

    In the background only the copy to the host's memory holds training up, as many bytes as this rank writes; the rest talks over a
    gloo group of its own. One checkpoint is in flight at most: the next one waits for it. `seconds` is how long the last one took,
    from the call to its completion.
    """

    def __init__(self, ranks: Ranks, *, background: bool = False):
        self._ranks, self._background = ranks, background
        self._group = dist.new_group(backend="gloo") if background and ranks.group is not None else ranks.group
        self._thread: threading.Thread | None = None
        self._error: RuntimeError | None = None
        self.seconds: float | None = None

    def save(self, folder: Path, step: int, *, method: nn.Module, optimizer, meta: dict, keep: int, teachers=None) -> Path:
        """Writes checkpoint `step` below `folder`; every rank must call. `keep` are left, `meta` is any JSON to be read back.

        Raises RuntimeError on all ranks where a rank cannot write or the ranks' pieces of a parameter are not the parameter; in the
        background that comes with the next `check`, `save` or `finish`.
        """
        self.finish()
        began = time.perf_counter()
        parts = state.parts(method, optimizer, teachers, self._ranks)
        facts = {"format": FORMAT, "step": step, "world_size": self._ranks.world_size, "counters": method.counters(), **meta}
        if self._background:
            parts = {kind: [part.kept() for part in own] for kind, own in parts.items()}
            facts = json.loads(json.dumps(facts))

        def write() -> None:
            _write(folder, facts, parts, keep, self._ranks, self._group)
            self.seconds = time.perf_counter() - began

        if self._background:
            self._thread = threading.Thread(target=self._caught, args=(write,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            write()
        return folder / _name(step)

    def check(self) -> None:
        """Raises what the checkpoint in flight has met, if anything; costs nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Returns when no checkpoint is in flight. Raises what the last one met."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.finish()
        except RuntimeError:
            # what ended the run is told, and not what it brought down with it
            if kind is None:
                raise

    def _caught(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, RuntimeError) as error:
            self._error = RuntimeError(f"checkpoint: it was not completed in the background: {error}; the checkpoints before stand")


def save(folder: Path, step: int, *, method: nn.Module, optimizer, ranks: Ranks, meta: dict, keep: int, teachers=None) -> Path:
    """`Writer.save`, complete when it returns."""
    return Writer(ranks).save(folder, step, method=method, optimizer=optimizer, meta=meta, keep=keep, teachers=teachers)


def _write(folder: Path, facts: dict, parts: dict[str, list[Part]], keep: int, ranks: Ranks, group: dist.ProcessGroup | None) -> None:
    place, part = folder / _name(facts["step"]), folder / f"{PART}{facts['step']:08d}"
    words = _outcome(lambda: _prepare(folder, part), folder, ranks) if ranks.is_first else None
    _agree(words, ranks, group)
    own: dict[str, dict] = {}

    def write() -> None:
        for kind, mine in parts.items():
            if mine:
                name, file = shards.write(part, kind, ranks.rank, ranks.world_size, mine)
                own[name] = file

    words = _outcome(write, part, ranks)
    rows = {kind: [(row.name, row.shape, row.offset, row.numel) for row in mine] for kind, mine in parts.items()}
    every = [(words, own, rows)]
    if group is not None:
        every = [None] * ranks.world_size if ranks.is_first else None
        dist.gather_object((words, own, rows), every, dst=0, group=group)
    words = _outcome(lambda: _complete(place, part, facts, every, keep), folder, ranks) if ranks.is_first else None
    _agree(words, ranks, group)


def _outcome(deed: Callable[[], None], where: Path, ranks: Ranks) -> str | None:
    """What went wrong, in words, so that a rank can tell the others before it raises."""
    try:
        deed()
    except OSError as error:
        shared = "; all ranks must see this folder" if ranks.world_size > 1 and isinstance(error, FileNotFoundError) else ""
        return f"rank {ranks.rank} could not write to {where}: {error.strerror or error}{shared}"
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return None


def _agree(words: str | None, ranks: Ranks, group: dist.ProcessGroup | None) -> None:
    """Raises on all ranks what the first one has to say; nobody goes on before it has said so."""
    told = [words]
    if group is not None:
        dist.broadcast_object_list(told, src=0, group=group, device=torch.device("cpu"))
    if told[0]:
        raise RuntimeError(f"checkpoint: {told[0]}; nothing was saved, the checkpoints before stand")


def _prepare(folder: Path, part: Path) -> None:
    """An empty `part`, and nothing left of runs that died while they wrote."""
    if folder.is_dir():
        _put_back(folder)
        for stale in folder.glob(f"{PART}*"):
            shutil.rmtree(stale)
    part.mkdir(parents=True)


def _put_back(folder: Path) -> None:
    """Deletes what was to be deleted, but for a whole checkpoint that was moved out of the way of one that never came."""
    for old in folder.glob(f"{OLD}*"):
        place = folder / old.name.replace(OLD, "step_")
        if _lacks(old) is None and not place.exists():
            old.rename(place)
        else:
            shutil.rmtree(old)


def _complete(place: Path, part: Path, facts: dict, every: list[tuple], keep: int) -> None:
    """The first rank's deed: manifest, rename, pointer, retention; `every` is what all ranks have to tell."""
    complaints = [words for words, _, _ in every if words]
    files = {name: file for _, own, _ in every for name, file in own.items()}
    try:
        if complaints:
            raise RuntimeError(complaints[0])
        kinds = {kind: [(rank, rows[kind]) for rank, (_, _, rows) in enumerate(every)] for kind in every[0][2]}
        tables = {kind: shards.table(rows) for kind, rows in kinds.items()}
        # files of a process alone hold whole tensors and tell all that there is to know
        tables = {"tensors": tables} if len(every) > 1 else {}
        write_text(part / "meta.json", _json({**facts, "files": dict(sorted(files.items())), **tables}))
        flush_folder(part)
    except (OSError, RuntimeError):
        shutil.rmtree(part, ignore_errors=True)
        raise
    folder, old = place.parent, place.parent / place.name.replace("step_", OLD)
    if place.exists():
        place.rename(old)
    part.rename(place)
    flush_folder(folder)
    try:
        write_text(folder / ".latest", place.name + "\n")
        os.replace(folder / ".latest", folder / "latest")
        _forget(place, keep)
    except OSError as error:
        say(f"checkpoint: {place} is complete, but an older one could not be deleted: {error}")


def _forget(place: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints. What is newer than `place` was left behind by going back, and does not count."""
    before = [path for path in complete(place.parent) if path.name < place.name]
    for path in before[: max(0, len(before) - (keep - 1))]:
        path.rename(path.parent / path.name.replace("step_", OLD))
    for path in place.parent.glob(f"{OLD}*"):
        shutil.rmtree(path)


def complete(folder: Path) -> list[Path]:
    """Checkpoints below `folder` whose files all have the recorded size, oldest first."""
    return sorted(path for path in folder.glob("step_*") if _lacks(path) is None)


def latest(folder: Path) -> Path:
    """The newest complete checkpoint. Raises ValueError when there is none: a run asked to resume never starts afresh in silence."""
    found = complete(folder)
    if not found:
        raise ValueError(f"checkpoint: {folder} holds no complete one, so there is nothing to go on from; start anew in another folder")
    return found[-1]


def newest_sound(folder: Path, ranks: Ranks) -> Path:
    """The newest checkpoint whose files are all there and have their checksums; every rank must call, and all get the same one.

    What is passed over is said, with the reason. The files are read once over all ranks. Raises ValueError where there is none.
    """
    names = [None]
    if ranks.is_first and folder.is_dir():
        _put_back(folder)
        names = [sorted((path.name for path in folder.glob("step_*")), reverse=True)]
    if ranks.group is not None:
        dist.broadcast_object_list(names, src=0, device=torch.device("cpu"))
    passed = []
    for name in names[0] or []:
        reason = _damage(folder / name, ranks)
        if reason is None:
            for words in passed if ranks.is_first else []:
                say(f"checkpoint: passed over {words}; going on from {name}")
            return folder / name
        passed.append(f"{name}: {reason}")
    lost = f" ({'; '.join(passed)})" if passed else ""
    raise ValueError(f"checkpoint: {folder} holds no complete one{lost}, so there is nothing to go on from; start anew in another folder")


def load(place: Path, *, method: nn.Module, optimizer, ranks: Ranks, teachers=None, checked: bool = False) -> dict:
    """Takes weights, buffers, teachers, optimizer state, counters and (with as many ranks as before) the generators back.

    Every rank must call, and reads of the files what it needs, whatever stage and number of ranks wrote them. `checked=True` after
    `newest_sound`, which has read the checksums. Returns the meta data. Raises ValueError when a file is damaged or its names and shapes
    are not those of this model.
    """
    meta = read_meta(place)
    if not checked and (reason := _damage(place, ranks)):
        raise ValueError(f"checkpoint: {place}: {reason}; remove this folder to go back to the one before")
    kept = state.kept_modules(method, optimizer, teachers)
    files = {kind: Shards(place, meta, kind) for kind in (MODEL, OPTIMIZER, TEACHER) if _has(meta, kind)}
    taught = files[TEACHER].shapes() if TEACHER in files else None
    state.compare(files[MODEL].shapes(), kept[MODEL], place, ranks)
    state.compare_teachers(taught, kept.get(TEACHER), place, ranks)
    state.compare_optimizer(files[OPTIMIZER].shapes() if OPTIMIZER in files else {}, optimizer, place)
    same_world = meta["world_size"] == ranks.world_size
    own = Shards(place, meta, RNG) if same_world else None
    for kind, part in kept.items():
        state.take_module(files[kind], kind, part, ranks, own)
    if OPTIMIZER in files:
        state.take_optimizer(files[OPTIMIZER], method, optimizer)
    method.load_counters(meta["counters"], same_world)
    if own is not None:
        state.take_generators(own, ranks)
    return meta


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], facts: dict) -> Path:
    """Writes checkpoint 0 below `folder` of weights alone, which were not trained here: for `load_weights`, not for `load`."""
    place, part = folder / _name(0), folder / f"{PART}{0:08d}"
    _prepare(folder, part)
    _, file = shards.write(part, MODEL, 0, 1, [shards.whole(name, value) for name, value in tensors.items()])
    write_text(part / "meta.json", _json({"format": FORMAT, "step": 0, "files": {MODEL: file}, **facts}))
    flush_folder(part)
    part.rename(place)
    flush_folder(folder)
    return place


def load_weights(place: Path, module: nn.Module, prefix: str) -> None:
    """Loads the part of a checkpoint's model whose names begin with `prefix`, strictly, into `module`; no ranks needed."""
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in read(place, MODEL, prefix).items()})


def read(place: Path, kind: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """{name: whole tensor} of a kind of a checkpoint, whoever wrote it, where names begin with `prefix`. Raises ValueError for damage."""
    meta = read_meta(place)
    for name, facts in meta["files"].items():
        if re.sub(r"\.\d+\.", ".", name) == kind and (reason := damage(place / name, facts)):
            raise ValueError(f"checkpoint: {place}: {reason}; remove this folder to go back to the one before")
    files = Shards(place, meta, kind)
    return {name: files.whole(name) for name in files.shapes() if name.startswith(prefix)}


def read_meta(place: Path) -> dict:
    meta = json.loads((place / "meta.json").read_text())
    if meta["format"] not in READABLE:
        raise ValueError(
            f"checkpoint: {place} has format {meta['format']}, this version reads {' and '.join(map(str, READABLE))}; "
            "go on with the version that wrote it"
        )
    return meta


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _has(meta: dict, kind: str) -> bool:
    return bool(meta.get("tensors", {}).get(kind)) or kind in meta["files"]


def _lacks(place: Path) -> str | None:
    """Why a checkpoint is not complete, by what its manifest says of presence and sizes; None where it is."""
    try:
        files = json.loads((place / "meta.json").read_text())["files"]
        return next((words for name, facts in files.items() if (words := lack(place / name, facts))), None)
    except FileNotFoundError:
        return "meta.json is not there"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "meta.json is damaged"


def _damage(place: Path, ranks: Ranks) -> str | None:
    """Why a checkpoint cannot be read; None where it can. Every rank must call: each reads its share of the files, all hear the same."""
    reason = _lacks(place)
    if reason is None:
        files = sorted(json.loads((place / "meta.json").read_text())["files"].items())
        mine = files[ranks.rank :: ranks.world_size]
        reason = next((words for name, facts in mine if (words := damage(place / name, facts))), None)
    every = [reason]
    if ranks.group is not None:
        every *= ranks.world_size
        dist.all_gather_object(every, reason)
    return next((words for words in every if words), None)


def _json(facts: dict) -> str:
    """Indented, with a list of numbers on one line: a large run has thousands of pieces."""
    return re.sub(r"\[[\s\d,]+\]", lambda found: re.sub(r"\s+", "", found[0]).replace(",", ", "), json.dumps(facts, indent=2))
