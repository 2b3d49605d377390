"""Does the report say what the run's files say, whatever state they are in, and does a browser show it?"""

import html
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from fuseer.engine.chart import line_chart, thinned
from fuseer.engine.report import read_run, troubles, write_report

K = 100


def train(step, **changes):
    values = {"loss": 4.6 - 0.005 * step, "lr": 0.1, "images_per_second": 800.0 + step, "data_wait_share": 0.03, "seconds": 0.2 * step}
    usage = [(K - rank) / (K * (K + 1) / 2) for rank in range(K)]
    swav = {"prototype_entropy": 4.2, "prototypes_used": 88, "prototype_usage": usage}
    return {"kind": "train", "step": step, "epoch": step / 80, **values, **swav, **changes}


def knn(step, accuracy):
    return {"kind": "knn", "step": step, "accuracy": accuracy}


RECORDS = [
    *(train(step) for step in range(10, 401, 10)), knn(200, 0.7012), knn(400, 0.7534),
    {"kind": "broken", "step": 3, "file": "a/<b>.jpg", "reason": "truncated & torn"},
]
LINEAR = [("raw pixels", 0.843, 0.991), ("initialisation, BatchNorm calibrated", 0.617, 0.9), ("pretrained", 0.866, 0.998)]
ROWS = [("raw pixels", 0.811), ("initialisation", 0.70), ("initialisation, BatchNorm calibrated", 0.6), ("pretrained", 0.7987)]


def run_folder(path, records=RECORDS, tail="", **config):
    """A finished SwAV run's folder, `records` and settings changed as asked."""
    (path / "eval").mkdir(parents=True)
    method = {"prototypes": K, "epsilon": 0.05, "views": [{"size": 28, "count": 2, "scale": [0.5, 1.0]}]}
    settings = {"recipe": "tiny_swav", "method": method, "batch_size": 128, "steps": 400, "epochs": 0.0, "log_every_steps": 10, **config}
    (path / "config.json").write_text(json.dumps(settings))
    env = {"started": "2026-11-21T22:54:03+00:00", "packages": {"torch": "2.14.1"}, "command": "fuseer pretrain a='<c>'"}
    (path / "env.json").write_text(json.dumps(env))
    rows = [{"name": name, "accuracy": accuracy} for name, accuracy in ROWS]
    tested = {"k": 20, "temperature": 0.07, "train_images": 10000, "test_images": 2000, "rows": rows}
    (path / "eval" / "knn.json").write_text(json.dumps(tested))
    rows = [{"name": name, "accuracy": accuracy, "top5": top5, "loss": 0.4} for name, accuracy, top5 in LINEAR]
    tested = {"words": "protocol tiny (our own): SGD, <30> epochs", "train_images": 9000, "test_images": 2000, "rows": rows}
    (path / "eval" / "linear.json").write_text(json.dumps(tested))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    Image.new("RGB", (640, 300), (200, 120, 40)).save(path / "crops.png")
    return path


def page_of(path):
    return write_report(path).read_text("utf-8")


def words(page):
    """What is read on the page: its text without tags, entities resolved."""
    text = re.sub(r"<(style|script).*?</\1>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def chart_points(page):
    """{title: [[x, y], …]} as the pointer reads them out."""
    found = re.findall(r'aria-label="([^"]*) by \w+" data-at="\w+" data-points="([^"]*)"', page)
    return {html.unescape(title): json.loads(html.unescape(points)) for title, points in found}


def test_the_numbers_of_the_run_are_on_the_page(tmp_path):
    page = page_of(run_folder(tmp_path / "run"))
    text = words(page)
    for said in (
        "tiny_swav", "2026-11-21 22:54", "finished: 400 steps", "Loss, last record 2.6 chance: ln 100 = 4.605", "Images a second 1,005",
        "data wait 3.0%", "Time 1 min 20 s 80.0 seconds", "kNN 79.9% +9.9 points on the better initialisation", "Prototypes used 88 of 100",
        "Broken files 1", "a/<b>.jpg truncated & torn", "raw pixels 81.1%", "pretrained 79.9%", "k = 20, T = 0.07, 10,000 training images",
        "method.epsilon 0.05", "method.views.0.scale [0.5, 1.0]", "packages.torch 2.14.1", "fuseer pretrain a='<c>'",
        "chance, ln 100: 4.605", "Linear classifier 86.6% +24.9 points on the initialisation", "raw pixels 84.3% top-5 99.1%",
        "pretrained 86.6% top-5 99.8%", "protocol tiny (our own): SGD, <30> epochs; 9,000 training images, 2,000 test images",
    ):
        assert said in text, said
    points = chart_points(page)
    assert points["Loss"] == [[step, pytest.approx(4.6 - 0.005 * step, abs=1e-4)] for step in range(10, 401, 10)]
    assert points["Accuracy of kNN, %"] == [[200, 70.12], [400, 75.34]]
    assert points["Entropy of the mean softmax, of ln 100, %"][-1] == [400, pytest.approx(100 * 4.2 / math.log(K), abs=1e-2)]
    assert points["Prototypes used"][0] == [10, 88]
    assert len(points["Share of each prototype, %"]) == K
    assert points["Time spent waiting for data, %"][3] == [40, 3]
    assert not troubles(read_run(tmp_path / "run")) and 'role="alert"' not in page


def test_the_page_is_one_file_that_asks_for_nothing_else(tmp_path):
    page = page_of(run_folder(tmp_path / "run"))
    assert not re.search(r"(?:https?:)?//[\w.]", re.sub(r"base64,[\w+/=]+", "", page)), "an address"
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page) + re.findall(r"url\(([^)]*)", page)
    assert len(sources) == 2 and all(source.startswith("data:") for source in sources)
    assert "@import" not in page and "default-src 'none'" in page
    assert sorted(path.name for path in (tmp_path / "run").glob("report*")) == ["report.html"]


def test_odd_names_are_shown_as_they_are_and_never_become_markup(tmp_path):
    names = ["<script>alert(1)</script>.jpg", '"><img src=x>.png', "{{ 7 * 7 }}.jpg", "naïve 图.jpg", "not-utf8-\udcff.jpg"]
    broken = [{"kind": "broken", "step": 1, "file": name, "reason": "<i>no</i>"} for name in names]
    odd_key = train(20, **{"<u>odd</u>": 1.5})
    page = page_of(run_folder(tmp_path / "run", [*broken, *broken, train(10), odd_key], recipe="</title><b>x"))
    assert page.count("<script>") == 1 and "<img src=x" not in page and "<i>no" not in page and "<u>odd" not in page and "<b>x" not in page
    for name in [*names[:4], "not-utf8-\\udcff.jpg", "</title><b>x"]:
        assert name in words(page) if "<" not in name else html.escape(name, quote=False) in page.replace("&#34;", '"')
    assert "Broken files 5" in words(page), "each file once"


def test_a_resume_replaces_what_was_logged_after_it(tmp_path):
    first = [train(step, loss=4.0) for step in range(10, 200, 10)] + [knn(100, 0.1), knn(150, 0.2)]
    later = [{"kind": "resume", "step": 120}, train(120, loss=3.0), train(135, loss=2.5, seconds=2.0), knn(150, 0.6)]
    run = read_run(run_folder(tmp_path / "run", [*first, *later]))
    assert run.series("loss") == [*((step, 4.0) for step in range(10, 120, 10)), (120, 3.0), (135, 2.5)]
    assert run.series("accuracy", kind="knn") == [(100, 0.1), (150, 0.6)]
    text = words(page_of(tmp_path / "run"))
    assert "resumed at step 120" in text and "step 135, 34% of 400 steps" in text
    assert "26.0 seconds" in text, "24 until step 120, and 2 on a clock that began again"
    slower = run_folder(tmp_path / "slower", [train(10), {"kind": "resume", "step": 10}, train(20, seconds=5.0)])
    assert "7.0 seconds" in words(page_of(slower)), "a clock that began again, and is already past where it was"


@pytest.mark.parametrize(
    "tail", ['{"kind":"train","step":41', '{"kind":"train","step":410}{"ki', '"text"', '{"step":1}', '{"kind":"train"}', "\x00\xff"]
)
def test_a_line_that_is_cut_off_is_skipped_and_named(tmp_path, tail):
    run = read_run(run_folder(tmp_path / "run", tail=tail))
    assert [record["step"] for record in run.records["train"]] == list(range(10, 401, 10))
    assert "metrics.jsonl: 1 line skipped" in words(page_of(tmp_path / "run"))


def test_only_settings_and_metrics_are_needed(tmp_path):
    folder = run_folder(tmp_path / "run", [])
    for name in ("env.json", "eval/knn.json", "eval/linear.json", "crops.png"):
        (folder / name).unlink()
    assert "Linear classifier" not in words(page_of(folder)) and "Nearest neighbours" not in words(page_of(folder))
    assert "no training record yet" in words(page_of(folder))
    (folder / "metrics.jsonl").write_text(json.dumps(train(10)) + "\n")
    text = words(page_of(folder))
    assert "Loss, last record 4.55" in text and "going on, or stopped: step 10, 2% of 400 steps" in text
    (folder / "env.json").write_text('{"torch": ')
    (folder / "eval" / "knn.json").write_text('{"k": 20, "rows": [{"na')
    (folder / "eval" / "linear.json").write_text('{"rows": [{"name": "pretr')
    (folder / "crops.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00")
    text = words(page_of(folder))
    torn = ("env.json", "eval/knn.json", "eval/linear.json")
    assert f"left out: {'; '.join(f'{name} is not a JSON object' for name in torn)}; crops.png is cut off" in text


def test_a_method_without_prototypes_gets_a_chart_for_each_of_its_numbers(tmp_path):
    swav_only = ("prototype_entropy", "prototypes_used", "prototype_usage")
    logged = [train(step, temperature_of_it=step / 7) for step in (5, 9)]
    records = [{key: value for key, value in record.items() if key not in swav_only} for record in logged]
    page = page_of(run_folder(tmp_path / "run", records, method={"mask_ratio": 0.75}, steps=0, epochs=0.2))
    points = chart_points(page)
    assert points["temperature of it"] == [[5, 0.71429], [9, 1.2857]]
    assert not any("rototype" in title or "ntropy" in title for title in points)
    assert "chance" not in words(page) and "finished: 0.2 epochs" in words(page)


@pytest.mark.parametrize(
    ("records", "config", "said"),
    [
        ([train(step, loss=math.log(K) * 0.985) for step in range(10, 210, 10)], {}, "At chance: likely collapse.*lower epsilon"),
        ([train(10), train(20, prototypes_used=9)], {}, "Only 9 of 100 prototypes"),
        ([train(10), train(20, loss=math.nan), train(30)], {}, "not finite in 1 of 3 records, first at step 20"),
        ([train(10, data_wait_share=0.45)], {}, "waits for images during 45%"),
        ([train(step, loss=math.log(K) * 0.985) for step in range(10, 190, 10)], {}, None),
        ([train(step, loss=math.log(K) * 0.975) for step in range(10, 410, 10)], {}, None),
        ([train(10, prototypes_used=2)], {"batch_size": 16}, None),
        ([train(10, prototypes_used=10, data_wait_share=0.3)], {}, None),
    ],
)
def test_trouble_is_said_in_words_and_only_then(tmp_path, records, config, said):
    page = page_of(run_folder(tmp_path / "run", records, **config))
    assert ('role="alert"' in page) == (said is not None)
    assert said is None or re.search(said, words(page))


def test_pretraining_that_does_not_beat_the_initialisation_is_said(tmp_path):
    folder = run_folder(tmp_path / "run")
    (folder / "eval" / "knn.json").write_text((folder / "eval" / "knn.json").read_text().replace("0.7987", "0.65"))
    assert "kNN is 65.0%, and 70.0% with the network as initialised" in words(page_of(folder))


def sign(step, name, text, over=False):
    return {"kind": "monitor", "step": step, "sign": name, "text": text, "over": over}


def test_what_the_monitor_said_stands_until_it_says_that_it_is_over(tmp_path):
    told = [
        sign(100, "chance", "the loss <has> stayed at chance"), sign(100, "collapse", "embeddings have collapsed"),
        sign(150, "collapse", "embeddings spread again", True), sign(300, "prototypes", "too few"), {"kind": "resume", "step": 250},
    ]
    page = page_of(run_folder(tmp_path / "run", [*RECORDS, *told]))
    assert 'role="alert"' in page and "Since step 100: the loss <has> stayed at chance." in words(page)
    assert "collapsed" not in page and "spread again" not in page, "it passed"
    assert "too few" not in page, "the resume took it back"
    # the report's own words on the same sign have the remedies, and are not said twice
    flat = [train(step, loss=math.log(K) * 0.985) for step in range(10, 410, 10)]
    (text,) = troubles(read_run(run_folder(tmp_path / "flat", [*flat, sign(200, "chance", "stayed at chance")])))
    assert text.startswith("At chance: likely collapse")


def test_the_chance_loss_of_a_method_without_prototypes_is_drawn(tmp_path):
    folder = run_folder(tmp_path / "run", [train(10, loss=9.0), train(20, loss=8.0)], method={"temperature": 0.1})
    (folder / "env.json").write_text(json.dumps({"chance_loss": 10.7037}))
    text = words(page_of(folder))
    assert "Loss, last record 8 chance = 10.704" in text and "chance: 10.7" in text.replace("chance = 10.704", "")


def test_pictures_are_shown_with_their_words_and_torn_ones_are_named(tmp_path):
    folder = run_folder(tmp_path / "run")
    for name, colour in (("one", (9, 9, 9)), ("two", (99, 9, 9))):
        Image.new("RGB", (64, 30), colour).save(folder / "eval" / f"{name}.png")
    names = ("one", "two", "gone")
    told = [{"file": f"eval/{name}.png", "title": f"<{name}>", "seen": "seen", "words": f"of step {name}"} for name in names]
    (folder / "eval" / "pictures.json").write_text(json.dumps({"step": 3, "pictures": told}))
    (folder / "eval" / "two.png").write_bytes((folder / "eval" / "two.png").read_bytes()[:-4])
    page = page_of(folder)
    assert "<one> of step one" in words(page) and "of step two" not in page and "of step gone" not in page
    assert "eval/two.png is cut off" in words(page) and len(re.findall(r"<img ", page)) == 2


def test_fine_tuning_is_shown_beside_the_linear_classifier(tmp_path):
    folder = run_folder(tmp_path / "run")
    rows = [{"name": "initialisation", "accuracy": 0.8512, "top5": 0.99}, {"name": "pretrained", "accuracy": 0.9034, "top5": 0.995}]
    tested = {"words": "protocol tiny", "train_images": 10000, "test_images": 2000, "rows": rows}
    (folder / "eval" / "finetune.json").write_text(json.dumps(tested))
    text = words(page_of(folder))
    assert "Fine-tuned 90.3% +5.2 points on the initialisation" in text and "initialisation 85.1% top-5 99.0%" in text
    assert "All weights trained with the labels: protocol tiny; 10,000 training images, 2,000 test images" in text
    assert "On frozen features: protocol tiny (our own)" in text


def test_a_linear_classifier_alone_is_shown(tmp_path):
    folder = run_folder(tmp_path / "run")
    (folder / "eval" / "knn.json").unlink()
    text = words(page_of(folder))
    assert "Linear classifier raw pixels 84.3%" in text and "Nearest neighbours" not in text


@pytest.mark.parametrize("missing", [["config.json"], ["metrics.jsonl"], ["config.json", "metrics.jsonl"]])
def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path, missing):
    folder = run_folder(tmp_path / "run")
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(ValueError, match=" and no ".join(missing)):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_settings_that_are_cut_off_are_refused(tmp_path):
    folder = run_folder(tmp_path / "run")
    (folder / "config.json").write_text('{"recipe": ')
    with pytest.raises(ValueError, match="config.json is not a JSON object"):
        write_report(folder)


def test_long_runs_are_thinned_without_losing_a_spike_or_a_gap():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(20000, generator=generator).tolist()
    values[777], values[12345], values[15001] = 9.0, -9.0, math.nan
    points, means = thinned(list(enumerate(values)))
    assert 400 <= len(points) <= 610 and points == sorted(points)
    assert (777, 9.0) in points and (12345, -9.0) in points and any(step == 15001 for step, _ in points)
    assert (points[0][0], points[-1][0]) == (0, 19999)
    assert len(means) == 200 and means[0][1] == pytest.approx(sum(values[:100]) / 100)
    assert thinned(points[:600]) == (points[:600], [])


@pytest.mark.parametrize(
    ("low", "high"),
    [(2.2, 4.6), (0, 1e-5), (0, 0.6), (-3e-4, 2e-3), (0, 16e3), (0, 123456), (1e6, 4e6), (4.6049, 4.6051), (1e5, 1e5 + 1), (12e3, 13e3)],
)
def test_axes_have_a_few_round_distinct_ticks_inside_the_frame(low, high):
    axis = line_chart("any", [(0, low), (1, high)])["y"]
    values, labels = zip(*axis["ticks"], strict=True)
    assert 3 <= len(values) <= 8 and len(set(labels)) == len(labels)
    assert axis["low"] <= values[0] and values[-1] <= axis["high"] and axis["low"] <= low and high <= axis["high"]
    step = values[1] - values[0]
    for value, label in axis["ticks"]:
        shown = float(label.rstrip("kM")) * {"k": 1e3, "M": 1e6}.get(label[-1], 1)
        assert shown == pytest.approx(value, abs=1e-6 * step)


def test_shares_of_the_most_used_prototypes_alone_are_held_against_all(tmp_path):
    page = page_of(run_folder(tmp_path / "run", [train(400, prototype_usage=[0.1, 0.05, 0.02])]))
    assert chart_points(page)["Share of the 3 most used prototypes, %"] == [[1, 10], [2, 5], [3, 2]]
    assert "even, 1/100: 1" in words(page)


def test_large_numbers_are_written_out(tmp_path):
    large = {"loss": 9.1, "images_per_second": 16364.2, "prototypes_used": 9000, "prototype_usage": [1 / 16000] * 16000}
    page = page_of(run_folder(tmp_path / "run", [train(400, **large)], method={"prototypes": 16000}))
    text = words(page)
    assert "Images a second 16,364" in text and "Prototypes used 9,000 of 16,000" in text and "all: 16,000" in text
    assert "e+" not in text and len(chart_points(page)["Share of each prototype, %"]) == 200


def test_an_axis_starts_at_its_floor_unless_a_value_lies_below():
    assert [line_chart("any", [(0, low), (1, 2.0)], floor=0)["y"]["low"] for low in (0.0, 0.1, 1.9)] == [0, 0, 0]
    assert line_chart("any", [(0, -1.0), (1, 2.0)], floor=0)["y"]["low"] <= -1
    assert line_chart("any", [(0, 1.9), (1, 2.0)])["y"]["low"] > 1.8


PROBE = """<script>
const shown = [...document.querySelectorAll("svg.chart")].map((svg) => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map((text) => text.getBoundingClientRect());
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
  return {
    title: svg.getAttribute("aria-label"), width: frame.width, height: frame.height,
    drawn: Math.max(...[...svg.querySelectorAll(".line, .bars, .dot")].map((part) => part.getBoundingClientRect().width)),
    overlaps: texts.some((a, i) => texts.some((b, j) => i < j && meet(a, b))),
    said: svg.parentNode.querySelector("output").textContent,
  };
});
const chart = document.querySelector("svg.chart"), box = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width * 0.5, clientY: box.top + 20 }));
const found = { shown, wide: document.documentElement.scrollWidth, window: innerWidth, ink: getComputedStyle(document.body).color,
  hover: chart.parentNode.querySelector("output").textContent,
  tables: [...document.querySelectorAll("table.knn")].map((table) => [...table.querySelectorAll("tr")].map((row) => ({
    name: row.cells[0].textContent, value: row.cells[1].textContent, bar: row.querySelector("i").getBoundingClientRect().width,
    full: row.cells[2].clientWidth, height: row.getBoundingClientRect().height }))),
  sheet: document.querySelector("img").getBoundingClientRect().width };
document.documentElement.setAttribute("data-found", JSON.stringify(found));
</script></body>"""


def browse(page: Path, profile: Path, *options):
    """(DOM after the page's scripts, stderr) of a headless chromium without network."""
    quiet = "--disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
    fixed = f"--headless --no-sandbox --disable-gpu {quiet} --enable-logging=stderr --proxy-server=127.0.0.1:9 --dump-dom".split()
    command = ["chromium", *fixed, f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed: the report was not opened in a browser")
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (400, True)])
def test_a_browser_shows_every_chart_and_complains_of_nothing(tmp_path, width, dark):
    folder = run_folder(tmp_path / "run", [*RECORDS, train(401, gradient_norm=1.0)])
    page = page_of(folder)
    (folder / "probed.html").write_text(page.replace("</body>", PROBE))
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    dom, log = browse(folder / "probed.html", tmp_path / "profile", f"--window-size={width},900", *scheme)
    assert "CONSOLE" not in log, log
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    assert len(found["shown"]) == len(chart_points(page)) == 9
    for chart in found["shown"]:
        assert chart["width"] > 0.8 * min(found["window"], 500) and chart["height"] > 120, chart
        assert chart["drawn"] > 0 and not chart["overlaps"], chart
    assert found["wide"] <= found["window"], "the page scrolls sideways"
    assert (min(map(int, re.findall(r"\d+", found["ink"]))) > 200) == dark
    assert found["shown"][0]["said"] == f"step 401: {4.6 - 0.005 * 401:.3f}"
    assert re.fullmatch(r"step (19|20|21|22)0: 3\.\d+", found["hover"]), found["hover"]
    assert found["sheet"] > 300
    knn, linear = found["tables"]
    assert [row["value"] for row in knn] == ["81.1%", "70.0%", "60.0%", "79.9%"]
    assert [(row["name"], row["value"]) for row in linear] == [(name, f"{accuracy:.1%}") for name, accuracy, _ in LINEAR]
    for row in linear:
        assert row["bar"] > 20 and row["bar"] == pytest.approx(row["full"] * float(row["value"][:-1]) / 100, abs=14), row
    os.remove(folder / "probed.html")
