from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from robustflow.errors import UserError
from robustflow.plots import draw_training
from robustflow.report import build_report
from robustflow.results import read_benchmark

HOSTILE = "<script>alert(1)<b>&'\""


class Cells(HTMLParser):
    """Rows of the tables: data-model of the row or table → list of (data-sort, text) of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[tuple[str | None, list[tuple[str, str]]]] = []
        self.cell: list[str] | None = None
        self.table: str | None = None
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        if tag == "table":
            self.table = values.get("data-model")
        elif tag == "tr":
            self.rows.append((values.get("data-model") or self.table, []))
        elif tag == "td":
            self.cell = [values.get("data-sort") or "", ""]

    def handle_endtag(self, tag: str) -> None:
        if tag == "td" and self.cell is not None:
            self.rows[-1][1].append((self.cell[0], self.cell[1].strip()))
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell[1] += data


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the page and of the writing, which need no pictures and are many."""
    monkeypatch.setattr("robustflow.report.draw", lambda benchmark, summary: [])


def contents(out: Path) -> dict[str, bytes]:
    made = (
        "summary.json",
        "table.md",
        "table.csv",
        "report.html",
        *(f"plots/{p.name}" for p in (out / "plots").iterdir()),
    )
    return {name: (out / name).read_bytes() for name in made}


def test_everything_is_written(make_benchmark: Callable[..., Path], tmp_path: Path) -> None:
    out = make_benchmark(tmp_path / "out")
    assert build_report(out) == out / "report.html"
    kinds = ("overview", "curves", "area", "examples", "radii", "sets")
    plots = {f"{kind}-digits-test.png" for kind in kinds} | {"training.png"}
    assert {path.name for path in (out / "plots").iterdir()} == plots
    assert not list(out.glob(".report-*"))


def test_rebuilding_gives_the_same_bytes(make_benchmark: Callable[..., Path], tmp_path: Path) -> None:
    out = make_benchmark(tmp_path / "out", n=60)
    build_report(out)
    copy = tmp_path / "elsewhere"
    shutil.copytree(out, copy)
    for name in ("summary.json", "table.md", "table.csv", "report.html"):
        (copy / name).unlink()
    # Another process with another hash seed: no set's order may reach a file.
    code = "import sys; from robustflow.report import build_report; build_report(sys.argv[1])"
    here = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code, str(copy)], check=True, env=environment)
    assert contents(copy) == contents(out)


@pytest.mark.usefixtures("no_plots")
def test_html_numbers_are_the_summary_s(hand_benchmark: Path) -> None:
    page = Cells(build_report(hand_benchmark).read_text(encoding="utf-8"))
    summary = json.loads((hand_benchmark / "summary.json").read_text())
    rows = [row for row in page.rows if row[0] is not None]
    leaderboards = [row for row in rows if row[1] and row[1][0][1] == row[0]]
    evaluated = [row for evaluation in summary["evaluations"] for row in evaluation["models"]]
    assert [name for name, _ in leaderboards] == [row["name"] for row in evaluated]
    assert len(evaluated) == 4
    for (_, cells), row in zip(leaderboards, evaluated, strict=True):
        assert float(cells[1][0]) == row["clean"]["value"]
        positive = [i for i, point in enumerate(row["attacked"]) if point["epsilon"] > 0]
        if row["lipschitz_bound"] is not None:
            certified = [float(cell[0]) for cell in cells[2 : 2 + len(positive)]]
            assert certified == [row["certified"][i]["value"] for i in positive]
        attacked = [float(cell[0]) for cell in cells[2 + len(positive) : 2 + 2 * len(positive)]]
        assert attacked == [row["attacked"][i]["value"] for i in positive]
    grid = [row for row in rows if row[0] == "hand" and len(row[1]) == 7]
    points = evaluated[0]["certified"]
    for (_, cells), point in zip(grid, points, strict=False):
        shown = f"{100 * point['value']:.1f}{100 * point['low']:.1f}–{100 * point['high']:.1f}"
        assert cells[1] == (repr(point["value"]), shown)
    assert len(grid) == 5  # three ε and two


def attributes(page: Cells, tag: str, name: str) -> list[str]:
    return [value for found, values in page.tags if found == tag and (value := values.get(name)) is not None]


def test_page_reaches_for_nothing_outside(make_benchmark: Callable[..., Path], tmp_path: Path) -> None:
    text = build_report(make_benchmark(tmp_path / "out", n=40)).read_text(encoding="utf-8")
    page = Cells(text)
    assert all(source.startswith("data:image/png;base64,") for source in attributes(page, "img", "src"))
    assert len(attributes(page, "img", "src")) == len(attributes(page, "img", "alt")) == 7
    assert all(target.startswith("#") for target in attributes(page, "a", "href"))
    assert not {"link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not attributes(page, "script", "src")
    assert not re.search(r"url\(|@import|https?:", text)
    anchors = {target[1:] for target in attributes(page, "a", "href")}
    assert anchors <= {values["id"] for _, values in page.tags if "id" in values}


@pytest.mark.usefixtures("no_plots")
def test_hostile_text_is_escaped(make_benchmark: Callable[..., Path], tmp_path: Path) -> None:
    out = make_benchmark(tmp_path / "out", names=["fine", HOSTILE], n=40)
    config = json.loads((out / "config.json").read_text())
    payload = HOSTILE + "</script></title></style>"
    (out / "config.json").write_text(json.dumps(config | {"title": payload, "command": payload}))
    for path in (out / "models" / "fine" / "card.json", out / "evaluations" / "digits-test" / "fine.json"):
        card = json.loads(path.read_text())
        changes = {"description": payload, "regime": payload, "config": {payload: payload}, "warnings": [payload]}
        path.write_text(json.dumps(card | changes | {"certified_object": payload, "environment": {payload: payload}}))
    text = build_report(out).read_text(encoding="utf-8")
    page = Cells(text)
    assert "<script>alert" not in text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "b" not in {tag for tag, _ in page.tags}
    assert any(cells and cells[0][1] == HOSTILE for _, cells in page.rows)  # shown as it is, not lost
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    policy = next(v["content"] for tag, v in page.tags if tag == "meta" and "http-equiv" in v)
    assert f"'sha256-{digest}'" in str(policy)


@pytest.mark.usefixtures("no_plots")
def test_alarms_are_shown(hand_benchmark: Path, alarm: Callable[[Path, str], None]) -> None:
    quiet = build_report(hand_benchmark).read_text(encoding="utf-8")
    assert "No alarms" in quiet
    assert 'class="notice alarm"' not in quiet
    alarm(hand_benchmark, "hand")
    loud = build_report(hand_benchmark).read_text(encoding="utf-8")
    assert 'class="notice alarm" role="alert"' in loud
    assert "1 alarm." in loud
    assert "alarms/hand-2.safetensors" in loud
    assert "No alarms:</strong>" not in loud


@pytest.mark.usefixtures("no_plots")
def test_warnings_alike_are_said_once(hand_benchmark: Path) -> None:
    for name, gap in (("hand", "0.3"), ("plain", "0.25")):
        path = hand_benchmark / "evaluations" / "digits-test" / f"{name}.json"
        said = [f"paper: flat logits of l2pgd (gap {gap})", f"only {name} says this"]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": said}))
    text = build_report(hand_benchmark).read_text(encoding="utf-8")
    above = text.split('id="models"')[0]
    assert "hand, plain: paper: flat logits of l2pgd (gap 0.25 to 0.3)" in above
    assert above.count("flat logits") == 1
    assert "hand: only hand says this" in above
    assert "plain: only plain says this" in above


@pytest.mark.usefixtures("no_plots")
def test_attacks_are_named_under_their_set_and_counted_at_each_radius(hand_benchmark: Path) -> None:
    path = hand_benchmark / "evaluations" / "digits-test" / "hand.json"
    passes = {"paper: clean": 8, "paper: l2pgd": 80, "standard: clean": 8, "standard: ddn": 9}
    passes["standard: margin-pgd"] = 7
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forward_passes": passes}))
    text = build_report(hand_benchmark).read_text(encoding="utf-8")
    assert "paper (l2pgd); standard (ddn, margin-pgd)" in text
    table = text.split('<table class="attacks-at">')[1].split("</table>")[0]
    # By hand from the rows: ddn at 1.0 and 0.8, margin-pgd at 0.5, l2pgd at 0.3; columns 0.5 and 1.
    assert [cells[1:] for _, cells in Cells(table).rows if cells][:3] == [
        [("", "ddn"), ("", "0"), ("", "2")],
        [("", "l2pgd"), ("", "1"), ("", "1")],
        [("", "margin-pgd"), ("", "1"), ("", "1")],
    ]


@pytest.mark.usefixtures("no_plots")
def test_costs_and_settings_are_the_cards_(hand_benchmark: Path) -> None:
    text = build_report(hand_benchmark).read_text(encoding="utf-8")
    costs = [cells for _, cells in Cells(text.split('id="cost"')[1].split("</table>")[0]).rows if cells]
    assert [cell[1] for cell in costs[0]] == ["hand", "unconstrained", "889 k", "350 M", "12.6 min", "3.0 s", "2.0 min"]
    for line in ("width = 32", "optimizer.name = &#34;sgd&#34;", "optimizer.lr = 0.01"):
        assert f"<code>{line}</code>" in text


@pytest.mark.usefixtures("no_plots")
def test_warnings_are_shown(hand_benchmark: Path) -> None:
    path = hand_benchmark / "evaluations" / "digits-test" / "hand.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"warnings": ["flat logits under cross-entropy"]}))
    assert "hand: flat logits under cross-entropy" in build_report(hand_benchmark).read_text(encoding="utf-8")


def break_csv(out: Path) -> None:
    path = out / "evaluations" / "digits-test" / "hand.csv"
    path.write_bytes(path.read_bytes()[:-20])


def block_report(out: Path) -> None:
    (out / "report.html").unlink()
    (out / "report.html").mkdir()


def block_plots(out: Path) -> None:
    shutil.rmtree(out / "plots")
    (out / "plots").write_text("not a directory")


@pytest.mark.usefixtures("no_plots")
@pytest.mark.parametrize("harm", [break_csv, block_report, block_plots])
def test_a_failed_report_leaves_the_earlier_one(hand_benchmark: Path, harm: Callable[[Path], None]) -> None:
    build_report(hand_benchmark)
    harm(hand_benchmark)
    card = hand_benchmark / "models" / "hand" / "card.json"
    card.write_text(card.read_text().replace("888575", "12345"))  # a rebuilt summary would differ
    before = {path: path.read_bytes() for path in hand_benchmark.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        build_report(hand_benchmark)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in hand_benchmark.rglob("*") if path.is_file()} == before


def test_plots_of_a_vanished_evaluation_go_and_others_stay(hand_benchmark: Path) -> None:
    build_report(hand_benchmark)
    (hand_benchmark / "plots" / "mine.png").write_bytes(b"the user's own")
    shutil.rmtree(hand_benchmark / "evaluations" / "far-test")
    build_report(hand_benchmark)
    names = {path.name for path in (hand_benchmark / "plots").iterdir()}
    assert "mine.png" in names
    assert not any("far-test" in name for name in names)


def test_one_model_one_set_no_log_no_examples(make_benchmark: Callable[..., Path], tmp_path: Path) -> None:
    out = make_benchmark(tmp_path / "out", names=["only"], n=20, sets=("standard",), null_bound=("only",))
    (out / "models" / "only" / "train.jsonl").unlink()
    (out / "evaluations" / "digits-test" / "only.examples.safetensors").unlink()
    evaluation = out / "evaluations" / "digits-test" / "evaluation.json"
    content: dict[str, Any] = json.loads(evaluation.read_text())
    evaluation.write_text(json.dumps(content | {"epsilons": [0.25]}))
    text = build_report(out).read_text(encoding="utf-8")
    assert "no train.jsonl" in text
    assert "no examples" in text
    row = json.loads((out / "summary.json").read_text())["evaluations"][0]["models"][0]
    assert row["area"]["certified"] <= row["area"]["attacked"] <= 0.25


def test_trainings_of_one_epoch_have_no_curve(make_benchmark: Callable[..., Path], tmp_path: Path) -> None:
    out = make_benchmark(tmp_path / "out")
    build_report(out)
    assert (out / "plots" / "training.png").exists()
    for path in (out / "models").glob("*/train.jsonl"):
        path.write_text(path.read_text().splitlines()[0] + "\n")
    text = build_report(out).read_text(encoding="utf-8")
    assert not (out / "plots" / "training.png").exists()
    assert "against the epoch" not in text


def test_an_epoch_that_saw_other_validation_images_is_not_on_the_line(
    make_benchmark: Callable[..., Path], tmp_path: Path
) -> None:
    out = make_benchmark(tmp_path / "out")
    for path in (out / "models").glob("*/train.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1] |= {"validation_n": 1000, "validation_accuracy": 0.5}
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    benchmark = read_benchmark(out)
    figure = draw_training(benchmark, {card.name: place for place, card in enumerate(benchmark.cards)})
    assert figure is not None
    axes = figure.axes[2]
    assert axes.get_title() == "validation (%), n = 200, ◆ 1,000"
    epochs = len(lines)
    marks = [line for line in axes.lines if line.get_marker() == "D"]
    assert len(marks) == len(benchmark.cards)
    assert {tuple(mark.get_xydata()[0]) for mark in marks} == {(epochs, 50.0)}
    curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(curves) == len(marks)
    assert all(max(line.get_xdata()) < epochs for line in curves)
    half = 1.96 / (2 * math.sqrt(1000 + 1.96**2))  # Wilson's interval at one half
    bars = [line for line in axes.lines if len(line.get_xdata()) == 2]
    expected = pytest.approx([50 - 100 * half, 50 + 100 * half], abs=1e-3)
    assert bars
    assert all(line.get_ydata() == expected for line in bars)
