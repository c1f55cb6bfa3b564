"""Every figure against a benchmark of eight images that was counted by hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustflow.results import read_benchmark
from robustflow.summary import summarize, to_json
from robustflow.tables import to_csv, to_markdown


@pytest.fixture
def summary(hand_benchmark: Path) -> dict[str, Any]:
    return summarize(read_benchmark(hand_benchmark))


def counts(points: list[dict[str, Any]]) -> list[int]:
    return [point["k"] for point in points]


def test_counts_are_those_made_by_hand(summary: dict[str, Any]) -> None:
    evaluation = summary["evaluations"][0]
    row = evaluation["models"][0]
    assert [point["epsilon"] for point in row["certified"]] == evaluation["epsilons"] == [0.0, 0.5, 1.0]
    assert (row["clean"]["k"], row["clean"]["n"], row["clean"]["value"]) == (6, 8, 0.75)
    assert counts(row["certified"]) == [5, 3, 1]
    assert counts(row["attacked"]) == [6, 4, 2]
    assert counts(row["broken"]) == [2, 4, 6]
    assert counts(row["undecided"]) == [1, 1, 1]
    assert counts(row["attacked_by_set"]["paper"]) == [6, 5, 4]
    assert counts(row["attacked_by_set"]["standard"]) == [6, 4, 2]
    assert row["broken_by"] == [
        {"attack": "ddn", "images": 2, "at": [0, 0, 2]},
        {"attack": "l2pgd", "images": 1, "at": [0, 1, 1]},
        {"attack": "margin-pgd", "images": 1, "at": [0, 1, 1]},
    ]


def test_areas_and_radii_by_hand(summary: dict[str, Any]) -> None:
    row = summary["evaluations"][0]["models"][0]
    assert row["area"]["certified"] == pytest.approx(2.9 / 8)  # 1 + .5 + .6 + .1 + .7: radii cut at 1
    assert row["area"]["attacked"] == pytest.approx(4.6 / 8)  # 1 + 1 + .8 + .5 + .3 + 1
    assert row["certified_radius"]["median"] == pytest.approx(0.3)  # a wrong prediction's radius of 0.9 counts as 0
    assert row["certified_radius"]["mean"] == pytest.approx(3.1 / 8)


def test_pairs_by_hand(summary: dict[str, Any]) -> None:
    paired = summary["evaluations"][0]["paired"]
    assert (paired["best"], paired["epsilon"]) == ("hand", 0.5)
    certified = paired["others"][0]["certified"]
    assert (certified["only_a"], certified["only_b"], certified["p_value"]) == (3, 0, 0.25)


def test_models_and_costs(summary: dict[str, Any]) -> None:
    hand, plain = summary["models"]
    assert {"name", "regime", "parameters", "multiply_adds", "lipschitz_bound", "config", "seed", "seconds"} <= set(
        hand
    )
    assert (hand["lipschitz_bound"], plain["lipschitz_bound"]) == (0.98, None)
    assert hand["seconds"] == {"train": 754.25, "certify": 3.0, "attack": 120.5}  # certify and attack: two evaluations
    assert summary["schema_version"] == 1
    assert {"versions", "device", "revision"} <= set(summary["environment"])


def test_a_model_without_certificate_keeps_its_list(summary: dict[str, Any]) -> None:
    row = summary["evaluations"][0]["models"][1]
    assert row["lipschitz_bound"] is None
    assert counts(row["certified"]) == [0, 0, 0]
    assert row["certified"][0]["high"] > 0


def test_no_alarm_is_an_empty_list(summary: dict[str, Any]) -> None:
    for evaluation in summary["evaluations"]:
        assert [(row["alarms"], row["alarm_count"]) for row in evaluation["models"]] == [([], 0), ([], 0)]


def test_json_is_strict_and_infinity_is_null(hand_benchmark: Path) -> None:
    path = hand_benchmark / "evaluations" / "digits-test" / "plain.json"
    path.write_text(path.read_text().replace('"lipschitz_bound": null', '"lipschitz_bound": Infinity'))
    text = to_json(summarize(read_benchmark(hand_benchmark)))

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse)["models"][1]["lipschitz_bound"] is None


def test_an_unrecorded_crossing_is_an_alarm(hand_benchmark: Path) -> None:
    path = hand_benchmark / "evaluations" / "digits-test" / "hand.csv"
    old = "2,0,0,0.6,0.8,ddn,0.9,0.8\n"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, "2,0,0,0.6,0.6,ddn,0.9,0.6\n"))  # equal is a crossing too
    row = summarize(read_benchmark(hand_benchmark))["evaluations"][0]["models"][0]
    assert row["alarm_count"] == 1
    assert (row["alarms"][0]["index"], row["alarms"][0]["confirmed_in_float64"]) == (2, None)


def test_an_alarm_recorded_and_found_counts_once(hand_benchmark: Path, alarm: Callable[[Path, str], None]) -> None:
    alarm(hand_benchmark, "hand")
    row = summarize(read_benchmark(hand_benchmark))["evaluations"][0]["models"][0]
    assert row["alarm_count"] == 1
    assert row["alarms"][0]["confirmed_in_float64"] is True


def test_csv_has_the_same_numbers(summary: dict[str, Any]) -> None:
    table = list(csv.DictReader(io.StringIO(to_csv(summary))))
    assert [(line["dataset"], line["model"]) for line in table] == [
        ("digits", "hand"),
        ("digits", "plain"),
        ("far", "hand"),
        ("far", "plain"),
    ]
    row = summary["evaluations"][0]["models"][0]
    for key in ("certified", "attacked"):
        for point, label in zip(row[key], ("0", "0.5", "1"), strict=True):
            assert float(table[0][f"{key}@{label}"]) == point["value"]
            assert float(table[0][f"{key}@{label}_low"]) == point["low"]
    assert table[2]["certified@1"] == ""  # the second evaluation's grid ends at 0.5
    assert table[1]["lipschitz_bound"] == ""


def test_markdown_states_rates_n_and_keeps_names_harmless(summary: dict[str, Any]) -> None:
    row = summary["evaluations"][0]["models"][0]
    low, high = row["certified"][1]["low"], row["certified"][1]["high"]
    text = to_markdown(summary)
    assert f"37.5 ({100 * low:.1f}–{100 * high:.1f})" in text
    assert "n = 8" in text
    assert "| plain | – | – |" in text  # no certificate is not a measured 0 %
    summary["title"] = "<script>|x"
    assert "&lt;script&gt;\\|x" in to_markdown(summary)


def test_order_is_the_config_s_else_by_name(hand_benchmark: Path) -> None:
    config = hand_benchmark / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"models": [{"name": "plain"}, {"name": "hand"}]}))
    assert [model["name"] for model in summarize(read_benchmark(hand_benchmark))["models"]] == ["plain", "hand"]
    config.write_text(json.dumps({"name": "x"}))
    assert [model["name"] for model in summarize(read_benchmark(hand_benchmark))["models"]] == ["hand", "plain"]
