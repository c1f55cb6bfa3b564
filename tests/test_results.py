"""Missing, garbled and contradicting files: one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robustflow.errors import UserError
from robustflow.results import read_benchmark

FOLDER = Path("evaluations/digits-test")
REQUIRED = [
    "config.json",
    "models/hand/card.json",
    FOLDER / "evaluation.json",
    FOLDER / "hand.csv",
    FOLDER / "hand.json",
]


def message(out: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_benchmark(out)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", REQUIRED, ids=str)
def test_missing_file_is_named(hand_benchmark: Path, name: Path) -> None:
    (hand_benchmark / name).unlink()
    assert str(hand_benchmark / name) in message(hand_benchmark)
    assert "missing" in message(hand_benchmark)


@pytest.mark.parametrize("name", [*REQUIRED, "models/hand/train.jsonl", FOLDER / "hand.examples.safetensors"], ids=str)
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.9])
def test_truncated_file_is_named(hand_benchmark: Path, name: Path, keep: float) -> None:
    path = hand_benchmark / name
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert str(path) in message(hand_benchmark)


@pytest.mark.parametrize("name", [*REQUIRED, "models/hand/train.jsonl", FOLDER / "hand.examples.safetensors"], ids=str)
def test_garbage_is_named(hand_benchmark: Path, name: Path) -> None:
    (hand_benchmark / name).write_bytes(bytes(range(256)) * 8)
    assert str(hand_benchmark / name) in message(hand_benchmark)


def test_csv_that_ends_inside_its_last_number_is_named(hand_benchmark: Path) -> None:
    path = hand_benchmark / FOLDER / "hand.csv"
    path.write_text(path.read_text().rstrip("\n"))
    assert "cut off" in message(hand_benchmark)


def test_csv_without_its_last_row_is_named(hand_benchmark: Path) -> None:
    path = hand_benchmark / FOLDER / "hand.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert "7 rows" in message(hand_benchmark)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("6,1,1,0.7,inf,,inf,inf", "6,1,1,0.7,nan,,inf,inf", "NaN"),
        ("6,1,1,0.7,inf,,inf,inf", "6,1,1,,inf,,inf,inf", "not a table"),
        ("6,1,1,0.7,inf,,inf,inf", "6,1,1,0.7,inf,,inf,0.9", "not the smallest"),
        ("6,1,1,0.7,inf,,inf,inf", "6,1.5,1,0.7,inf,,inf,inf", "not a table"),
        ("6,1,1,0.7,inf,,inf,inf", "0,1,1,0.7,inf,,inf,inf", "twice"),
        ("norm_standard", "norm_other", "norm_standard"),
    ],
)
def test_impossible_rows_are_named(hand_benchmark: Path, old: str, new: str, said: str) -> None:
    path = hand_benchmark / FOLDER / "hand.csv"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    text = message(hand_benchmark)
    assert str(path) in text
    assert said in text


def test_other_images_or_labels_are_named(hand_benchmark: Path) -> None:
    path = hand_benchmark / FOLDER / "plain.csv"
    path.write_text(path.read_text().replace("6,1,1,", "6,2,2,"))
    assert f"{path}: its images or labels differ" in message(hand_benchmark)


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("models/hand/card.json", {"parameters": "many"}, "parameters"),
        ("models/hand/card.json", {"name": "other"}, "name"),
        ("models/hand/card.json", {"schema_version": 2}, "schema_version"),
        (FOLDER / "evaluation.json", {"epsilons": [0.5, 0.0]}, "epsilons"),
        (FOLDER / "evaluation.json", {"epsilons": [-0.5]}, "epsilons"),
        (FOLDER / "evaluation.json", {"n": 0}, "n"),
        (FOLDER / "hand.json", {"seconds": {"certify": 1.0}}, "seconds.attack"),
    ],
    ids=str,
)
def test_wrong_value_names_file_and_key(hand_benchmark: Path, name: Path, change: dict[str, Any], key: str) -> None:
    path = hand_benchmark / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message(hand_benchmark).startswith(f"{path}: {key}:")


@pytest.mark.parametrize("name", ["../hand", "a/b", "", "..", 3, None])
def test_a_name_that_leaves_the_directory_is_refused(hand_benchmark: Path, name: object) -> None:
    (hand_benchmark / "config.json").write_text(json.dumps({"models": [{"name": name}]}))
    assert "is not a model name" in message(hand_benchmark)


def test_nothing_to_report(tmp_path: Path) -> None:
    assert "no such directory" in message(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    assert "no model" in message(tmp_path)


def test_log_and_examples_may_be_absent(hand_benchmark: Path) -> None:
    (hand_benchmark / "models/hand/train.jsonl").unlink()
    (hand_benchmark / FOLDER / "hand.examples.safetensors").unlink()
    benchmark = read_benchmark(hand_benchmark)
    assert list(benchmark.logs) == ["plain"]
    assert benchmark.evaluations[0].models[0].examples is None
