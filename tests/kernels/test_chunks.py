"""Does the table of tensors send every number to one program, aligned where it says so, and is it the right one for these tensors?"""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fuseer.kernels import _chunks

BLOCK = 32
DTYPES = {1: torch.float32, 2: torch.bfloat16, 3: torch.float16, 4: torch.float64}
FIELDS = ("start", "stop", "origin", "each", "layer", "adapted", "kind")


def placed(numel, dtype, offset):
    """Numbers that begin `offset` of them behind an address aligned to 64 bytes."""
    return torch.empty(offset + numel + 64, dtype=dtype)[offset : offset + numel]


def rows(table):
    """The rows of a table, as dictionaries."""
    return [{"memory": row[:3], **dict(zip(FIELDS, row[3:], strict=True))} for row in table.rows.tolist()]


def visits(table, block):
    """(program, row, block, first number, number after the last, whether the block is full) of each block that a kernel would visit."""
    for program, owner in enumerate(table.owners.tolist()):
        row = rows(table)[owner]
        first = row["origin"] + program * row["each"]
        blocks = range(first, min(first + row["each"], -(-row["stop"] // block)))
        assert len(blocks) > 0, "a program without work"
        for number in blocks:
            begin, end = max(number * block, row["start"]), min((number + 1) * block, row["stop"])
            assert begin < end, "a block without numbers"
            yield program, row, number, begin, end, end - begin == block


def touched(table, block, place, itemsize):
    """Addresses of the numbers of one list, in the order of programs."""
    return [row["memory"][place] + n * itemsize for _, row, _, begin, end, _ in visits(table, block) for n in range(begin, end)]


def owned(tensors):
    return [x.data_ptr() + n * x.itemsize for x in tensors for n in range(x.numel())]


PLACE = st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(0, 9))
LISTS = st.lists(st.tuples(st.integers(0, 150), PLACE, PLACE, PLACE), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(LISTS, st.sampled_from([None, 1, 2, 100]), st.booleans())
def test_every_number_is_visited_once_and_aligned_where_it_is_said(drawn, most, shadowed):
    lists = [[placed(numel, DTYPES[code], offset) for numel, *places in drawn for code, offset in places[i : i + 1]] for i in range(3)]
    lists = lists if shadowed else [*lists[:2], []]
    table = _chunks.table(lists, block=BLOCK, most=most)
    for place, tensors in enumerate(lists):
        found = [row["memory"][place] + n * DTYPES[row["kind"] >> 4 * place & 15].itemsize for _, row, _, a, b, _ in visits(table, BLOCK)
                 for n in range(a, b)] if tensors else []  # fmt: skip
        assert sorted(found) == sorted(owned(tensors)) and len(set(found)) == len(found)
    for _, row, number, _, _, full in visits(table, BLOCK):
        sizes = [DTYPES[code].itemsize for code in (row["kind"] >> 4 * place & 15 for place in range(3)) if code]
        at_sixteen = all((memory + number * BLOCK * size) % 16 == 0 for memory, size in zip(row["memory"], sizes, strict=False))
        assert not full or at_sixteen == (row["kind"] >= 0x1000)
    assert table.kinds == tuple(sorted({row["kind"] for row in rows(table)}))
    assert all(not row["memory"][2] for row in rows(table)) or shadowed


def test_kinds_say_dtypes_and_alignment():
    teacher, student = placed(5, torch.float32, 0), placed(5, torch.bfloat16, 0)
    assert _chunks.table([[teacher], [student], [placed(5, torch.float16, 0)]], block=BLOCK).kinds == (0x1321,)
    assert _chunks.table([[teacher], [student], []], block=BLOCK).kinds == (0x1021,)
    # no number of elements is 4 bytes of one and 16 of the other
    assert _chunks.table([[teacher], [placed(5, torch.float32, 1)], []], block=BLOCK).kinds == (0x0011,)
    assert _chunks.table([[placed(5, torch.float64, 0)], [student], []], block=BLOCK).kinds == (0x1024,)
    mixed = [[teacher, placed(9, torch.float16, 1)], [student, placed(9, torch.float32, 0)], []]
    assert _chunks.table(mixed, block=BLOCK).kinds == (0x0013, 0x1021)


def test_views_at_one_offset_are_aligned_together():
    """Flat buffers hold parameters one behind the other: what is off by the same few numbers everywhere needs no mask but at its ends."""
    lists = [[placed(100, dtype, 5)] for dtype in (torch.float32, torch.bfloat16)]
    table = _chunks.table([*lists, []], block=BLOCK)
    (row,) = rows(table)
    assert (row["start"], row["stop"], row["kind"]) == (5, 105, 0x1021)
    assert row["memory"][:2] == [x.data_ptr() - 5 * x.itemsize for (x,) in lists]
    assert [(begin, end) for *_, begin, end, _ in visits(table, BLOCK)] == [(5, 32), (32, 64), (64, 96), (96, 105)]
    # a shift of 1 fits both though the offsets differ: 16 bytes are 4 numbers of the one and 8 of the other
    (row,) = rows(_chunks.table([[placed(100, torch.float32, 5)], [placed(100, torch.bfloat16, 9)], []], block=BLOCK))
    assert (row["start"], row["kind"]) == (1, 0x1021)


def test_a_piece_has_at_most_so_many_programs():
    lists = [[placed(numel, torch.float32, 0) for numel in (10 * BLOCK + 1, BLOCK, 3 * BLOCK)] for _ in range(3)]
    table = _chunks.table(lists, block=BLOCK, most=4)
    assert table.owners.tolist() == [0, 0, 0, 0, 1, 2, 2, 2]
    assert [row["each"] for row in rows(table)] == [3, 1, 1]
    assert _chunks.table(lists, block=BLOCK).programs == 11 + 1 + 3


def test_programs_of_a_layer_lie_together():
    lists = [[placed(numel, torch.float32, 0) for numel in (100, 200)] for _ in range(3)]
    segments = torch.tensor([[1, 50, 70, 2], [0, 10, 20, 1], [1, 3, 40, 1], [0, 0, 0, 0], [0, 64, 36, 2]])
    table = _chunks.table(lists, block=BLOCK, most=2, segments=segments, adapt=[True, False, True, True])
    assert table.layers.tolist() == [0, 0, 3, 7, 7]
    assert [(row["layer"], row["adapted"], row["start"], row["stop"]) for row in rows(table)] == [
        (1, 0, 10, 30), (1, 0, 3, 43), (2, 1, 50, 120), (2, 1, 64, 100)
    ]  # fmt: skip
    for place, tensors in enumerate(lists):
        wanted = [tensors[t].data_ptr() + 4 * n for t, start, numel, _ in segments.tolist() for n in range(start, start + numel)]
        assert sorted(touched(table, BLOCK, place, 4)) == sorted(wanted)
    # segments begin anywhere, blocks where the tensor's do
    full = [(row["start"], number) for _, row, number, _, _, full in visits(table, BLOCK) if full]
    assert full == [(50, 2), (64, 2)]


def test_nothing_needs_no_program():
    for lists in ([[torch.empty(0)]] * 2 + [[]], [[torch.empty(0, 3), torch.empty(2, 0)]] * 3):
        table = _chunks.table(lists, block=BLOCK)
        assert (table.programs, table.kinds, table.layers.tolist()) == (0, (), [0] * (1 + len(lists[0])))


def test_a_table_is_made_once():
    lists = [[placed(40, torch.float32, 0)], [placed(40, torch.bfloat16, 0)], []]
    table = _chunks.table(lists, block=BLOCK)
    assert _chunks.table([list(x) for x in lists], block=BLOCK).memory is table.memory
    segments = torch.tensor([[0, 0, 40, 0]])
    cut = _chunks.table(lists, block=BLOCK, segments=segments, adapt=[True])
    assert _chunks.table(lists, block=BLOCK, segments=segments.clone(), adapt=[True]).memory is cut.memory
    others = {"block": 64}, {"most": 1}, {"adapt": [False]}, {"segments": torch.tensor([[0, 0, 39, 0]]), "adapt": [True]}
    made = [_chunks.table(lists, **{"block": BLOCK, **other}) for other in others]
    assert len({id(x.memory) for x in (table, *made)}) == 5
    segments[0, 2] = 3
    assert rows(_chunks.table(lists, block=BLOCK, segments=segments, adapt=[True]))[0]["stop"] == 3


def test_other_tensors_in_the_same_memory_get_their_own_table():
    memory = torch.empty(256, dtype=torch.float32)
    seen = []
    for x in (memory[:40], memory[:41], memory.view(torch.bfloat16)[:40], memory[:40].view(5, 8), memory[1:41]):
        table = _chunks.table([[x], [placed(x.numel(), x.dtype, 0)], []], block=BLOCK)
        assert touched(table, BLOCK, 0, x.itemsize) == owned([x])
        seen.append(table)
    student = placed(40, torch.float32, 0)
    one, shaped = (_chunks.table([[x], [student.view(x.shape)], []], block=BLOCK) for x in (memory[:40], memory[:40].view(5, 8)))
    assert one.memory is shaped.memory


def test_tables_are_few():
    for numel in range(_chunks.TABLES + 20):
        _chunks.table([[placed(numel, torch.float32, 0)], [], []], block=BLOCK)
    gc.collect()
    assert _chunks._built.cache_info().currsize <= _chunks.TABLES
    assert not _chunks._captured


def test_a_capture_needs_the_table_to_be_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    key = (torch.device("cuda"), (4,), ((64,), (), ()), ((torch.float32,), (), ()), None, None, BLOCK, None)
    with pytest.raises(RuntimeError, match="call the op once on these very tensors before the capture"):
        _chunks._built(*key)


class Layouts:
    """Tensors [2, 3, 4, 5] that lie in memory in different ways."""

    def __init__(self):
        x = torch.arange(120, dtype=torch.float32).view(2, 3, 4, 5)
        self.dense, self.last = x.clone(), x.contiguous(memory_format=torch.channels_last)
        self.transposed = x.mT.contiguous().mT
        self.gaps = torch.zeros(2, 3, 4, 10)[..., ::2].copy_(x)
        self.inside = torch.zeros(3, 4, 5, 6)[1:, 1:, 1:, 1:].copy_(x)


def test_what_lies_alike_without_gaps_is_walked_as_it_lies():
    lay = Layouts()
    assert _chunks.walkable([lay.dense, lay.dense]) and _chunks.walkable([lay.last, lay.last.half()])
    assert _chunks.walkable([lay.transposed, lay.transposed.clone()])
    for unlike in ([lay.dense, lay.last], [lay.last, lay.dense], [lay.last, lay.last, lay.transposed], [lay.gaps] * 2, [lay.inside] * 2):
        assert not _chunks.walkable(unlike)
    # the stride of an axis of length 1 says nothing, nor do those of a tensor without numbers
    assert _chunks.walkable([torch.empty(4, 1), torch.empty(4, 8)[:, :1].contiguous().as_strided((4, 1), (1, 9))])
    assert _chunks.walkable([torch.empty(0, 4), torch.empty(4, 0).t()])
    assert _chunks.walkable([torch.tensor(1.0)] * 2)
    assert not _chunks.walkable([torch.empty(9)[::2], torch.empty(9)[::2]])


def test_other_layouts_go_through_copies():
    lay = Layouts()
    first, second, third = [lay.dense, lay.last, lay.gaps], [lay.dense + 1, lay.dense + 1, lay.dense + 1], [lay.inside, lay.last, lay.gaps]
    before = [x.clone() for x in second]
    with _chunks.flat(first, second, third, written=(0, 2)) as (a, b, c):
        assert all(_chunks.walkable(place) for place in zip(a, b, c, strict=True))
        assert a[0] is first[0] and a[1] is not first[1] and c[0] is not third[0] and b[1] is second[1]
        for x in (*a, *b, *c):
            x.neg_()
    for x in (*first, third[0]):
        assert torch.equal(x, -torch.arange(120.0).view(2, 3, 4, 5)) or x is lay.last or x is lay.gaps
    assert torch.equal(second[0], -before[0]) and lay.gaps._base.view(2, 3, 4, 10)[..., 1::2].eq(0).all()


def test_what_is_read_alone_is_not_copied_back():
    lay = Layouts()
    before = lay.gaps.clone()
    with _chunks.flat([lay.dense], [lay.gaps], [], written=(0, 2)) as (a, b, c):
        assert c == [] and a[0] is lay.dense and b[0].is_contiguous()
        b[0].zero_()
    assert torch.equal(lay.gaps, before)
