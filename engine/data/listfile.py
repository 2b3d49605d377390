"""Which images, with which labels, does a list file name?"""

import os
from collections.abc import Callable

import numpy as np

from fuseer.engine.data.images import IMAGE_SUFFIXES, Paths, Source

MAX_LABEL = 10**6
_SUFFIXES = tuple(suffix.encode() for suffix in IMAGE_SUFFIXES)
_LOOKED_AT = 20


def read_list(file: str) -> Source:
    """The images that a text file names, in its order: one `path` or `path label` a line, paths relative to the folder of the file.

    The label follows a tab, or a blank where it is a whole number; either all labels are whole numbers, which are then the classes, or all
    are names of classes, sorted by bytes; a line without one has label -1. Empty lines and lines that begin with # are passed
    over. Lines may hold any bytes. Raises ValueError, with the number of the line, for a path without a known image suffix, a path named
    twice and a label that does not fit the others; and where not one of 20 paths, spread over the list, is there.
    """
    with open(file, "rb") as opened:
        text = opened.read()
    if b"\0" in text:
        raise ValueError(f"data.path: {file} is neither a folder, a .tar nor a text file with one image path a line")
    names, labels, bad, lines = [], [], [], {}
    for number, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        line = line.rstrip(b"\r")
        if not line.strip() or line.startswith(b"#"):
            continue
        name, label = _split(line)
        if not name.lower().endswith(_SUFFIXES):
            bad.append(f"line {number} is no image path, for {_shown(name)} has no known suffix (a class name follows a tab)")
        elif name in lines:
            bad.append(f"line {number} repeats {_shown(name)} of line {lines[name]}")
        lines[name] = number
        names.append(name)
        labels.append(label)
    if bad:
        more = f"; and {len(bad) - 3} more such lines" if len(bad) > 3 else ""
        raise ValueError(f"data.path: {file}: {'; '.join(bad[:3])}{more}; mend the list")
    if not names:
        raise ValueError(f"data.path: {file} names no images; write one path a line")
    numbers, classes = numbered(labels, lambda i: f"{file}: line {lines[names[i]]}")
    root, block = _below(os.path.dirname(os.path.abspath(file)), names)
    source = Source(root, Paths.of_block(root, block), numbers, classes)
    looked_at = range(0, len(names), -(-len(names) // _LOOKED_AT))
    if not any(os.path.lexists(source.paths[i]) for i in looked_at):
        raise ValueError(f"data.path: {file}: {source.paths[0]} and others do not exist; paths are relative to the list's own folder")
    return source


def numbered(labels: list[bytes | None], place: Callable[[int], str], *, as_names: bool = False) -> tuple[np.ndarray, list[str]]:
    """Labels as int64 [len], -1 for None, and the classes: whole numbers stand for themselves unless `as_names`, names are sorted by bytes.

    `place(i)` says where label i stands. Raises ValueError for names among numbers, and for numbers of a million or more.
    """
    given = {label for label in labels if label is not None}
    whole = set() if as_names else {label for label in given if label.isdigit()}
    if whole and whole != given:
        odd = min(given - whole)
        where = place(labels.index(odd))
        raise ValueError(f"data.path: {where} has the label {_shown(odd)}, and others are whole numbers; use one of the two throughout")
    if whole:
        number = {label: int(label) for label in whole}
        largest = max(whole, key=int)
        if int(largest) >= MAX_LABEL:
            raise ValueError(f"data.path: {place(labels.index(largest))} has the label {_shown(largest)}; labels lie below {MAX_LABEL:,}")
        classes = [str(i) for i in range(int(largest) + 1)]
    else:
        ordered = sorted(given)
        number = {label: i for i, label in enumerate(ordered)}
        classes = [os.fsdecode(label) for label in ordered]
    return np.array([-1 if label is None else number[label] for label in labels], np.int64), classes


def _split(line: bytes) -> tuple[bytes, bytes | None]:
    name, tab, label = line.partition(b"\t")
    if tab:
        return name, label.strip() or None
    name, blank, label = line.rstrip(b" ").rpartition(b" ")
    if blank and label.isdigit():
        return name.rstrip(b" "), label
    return line.rstrip(b" "), None


def _below(folder: str, names: list[bytes]) -> tuple[str, bytes]:
    """The folder that all names are below, and the block of them: the list's own, or "/" where a path leads elsewhere."""
    own = os.fsencode(folder).rstrip(b"/") + b"/"
    relative = [name.removeprefix(own) for name in names]
    if any(name.startswith(b"/") for name in relative):
        relative = [(name if name.startswith(b"/") else own + name)[1:] for name in names]
        folder = ""
    return folder.rstrip("/"), b"".join(b"/%s\0" % name for name in relative)


def _shown(name: bytes) -> str:
    return ascii(os.fsdecode(name))
