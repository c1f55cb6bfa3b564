"""The page over several systems: on the planted one, twice, with figures that are known."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from robustflow import cli
from robustflow.structured import overview
from robustflow.structured.systems import System


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def both(config: Path, tmp_path: Path, planted: System, monkeypatch: pytest.MonkeyPatch) -> Path:
    """results/decay and results/second; "matrix" plays the control."""
    monkeypatch.setattr(overview, "CONTROLS", ("matrix",))
    monkeypatch.setattr(type(planted), "headlines", (("error of e^−δt", "scale"), ("time to blow up", "scale")))
    monkeypatch.setattr(type(planted), "defect", ("error of e^−δt", ("scale", "exact")))
    for name in ("second", "decay"):
        assert run("bench", config, "--out", tmp_path / "results" / name, "--device", "cpu") == 0
    (tmp_path / "results" / "notes").mkdir()
    return tmp_path / "results"


def test_figures_are_those_of_the_systems(both: Path) -> None:
    before = (both / "decay" / "summary.json").read_bytes()
    assert run("report", both) == 0
    assert (both / "decay" / "summary.json").read_bytes() == before
    summary = json.loads(before)
    scale, matrix = (model["figures"] for model in summary["models"][:2])
    rows = list(csv.DictReader((both / "table.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["system"], row["figure"], row["model"]) for row in rows] == [
        (name, figure, "scale") for name in ("decay", "second") for figure in ("error of e^−δt", "time to blow up")
    ]
    error, time = rows[:2]
    assert float(error["structured_mean"]) == scale["error of e^−δt"]["mean"]
    assert float(error["control_deviation"]) == matrix["error of e^−δt"]["deviation"]
    assert error["by_others"] == "0.5"
    assert (time["structured_mean"], time["control_mean"], time["control_n"]) == ("", "", "3"), "never, and not finite"
    table = (both / "table.md").read_text(encoding="utf-8")
    assert "| decay | time to blow up | scale | – | not finite in 3 of 3 | – |" in table
    assert "| 0.5 (another δt) |" in table


def test_defects_with_the_structure_and_without(both: Path) -> None:
    summary = json.loads((both / "decay" / "summary.json").read_text(encoding="utf-8"))
    means = {model["name"]: model["figures"]["error of e^−δt"]["mean"] for model in summary["models"]}
    [(name, figure, kept, control)] = overview.defects([("decay", summary)])
    assert (name, figure) == ("decay", "error of e^−δt")
    assert kept == {"scale": means["scale"], "exact": 0.0}
    assert control == means["matrix"]
    ax = overview.draw_properties([("a", "b", {"x": 0.0}, None), (name, figure, kept, control)]).axes[0]
    drawn = [float(x) for line in ax.lines for x in line.get_xdata()]
    assert min(drawn) == overview.FLOOR, "a defect of 0 has a place on a logarithmic axis"
    assert all(math.isfinite(x) for x in drawn)


def test_it_is_rebuilt_to_the_byte_and_links_the_reports(both: Path) -> None:
    assert run("report", both) == 0
    names = ("table.md", "table.csv", "report.html", "plots/properties.png")
    before = {name: (both / name).read_bytes() for name in names}
    for name in names:
        (both / name).unlink()
    assert run("report", both) == 0
    assert {name: (both / name).read_bytes() for name in names} == before
    page = before["report.html"].decode()
    assert 'href="decay/report.html"' in page
    assert 'href="second/report.html"' in page


def test_systems_are_neither_certified_nor_attacked(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("certify", "attack"):
        assert run(stage, both) == 2
        assert "certify and attack are for classifiers" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[1]", "{bad", '"text"'])
def test_a_directory_of_something_else_is_one_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "config.json").write_text(content)
    for stage in ("report", "certify", "attack"):
        assert run(stage, tmp_path / "out") == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "config.json" in line
