"""Does docs/gpu.md tell what the card printed, and does the table choose its programs as it says?"""

import shutil

from benchmarks import card, measure


def between(page, marker):
    return page.partition(f"<!-- {marker} -->\n")[2].partition(f"\n<!-- end {marker} -->")[0]


def test_page_has_the_tables_of_the_printed_lines():
    page = (measure.ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert between(page, "card") == card.table() and between(page, "tiles") == card.tiles()


def test_the_fastest_of_each_kind_stands_in_a_line_and_ours_against_the_faster_of_two(tmp_path):
    results = tmp_path / "benchmarks" / "results"
    shutil.copytree(measure.RESULTS, results)
    tail = "p20 1 p80 1 ms ×1 50.0% of the memory floor"
    times = {"official": 9, "official graph": 6, "compile": 8, "lightly graph": 7, "triton": 5, "triton graph": 2, "reference graph": 1}
    lines = [f"sinkhorn made_up {name} p50 {ms} {tail}" for name, ms in times.items()]
    (results / "h100.txt").write_text("\n".join(["# a comment", *lines]), encoding="utf-8")
    (line,) = card.table(tmp_path).splitlines()[2:]
    told = "| 2 (triton graph) | 6 (official graph) | 8 (compile) | 7 (lightly graph) | **3×** | 50%, memory |"
    assert line == f"| `sinkhorn` | made_up {told}"
