"""Comparisons: counted by hand, refused where the images differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from robustflow import cli, compare
from robustflow.errors import UserError
from robustflow.statistics import Rate

Make = Callable[..., Path]
RESULTS = Path(__file__).resolve().parent.parent / "results" / "cifar10"

# Eight images. A: radii and norms as in conftest's HAND; B: counted below, image by image.
B = """index,label,prediction,certified_radius,adversarial_norm,attack,norm_paper,norm_standard
0,0,0,0.2,0.6,ddn,0.6,inf
1,1,1,0.6,1.5,ddn,1.5,inf
2,0,0,0.4,0.45,ddn,inf,0.45
3,1,0,0.0,0.0,clean,0.0,0.0
4,0,0,0.55,inf,,inf,inf
5,0,0,0.0,0.2,ddn,0.2,0.3
6,1,1,0.5,0.5,ddn,0.5,inf
7,1,1,0.0,inf,,inf,inf
"""


@pytest.fixture
def pair(hand_benchmark: Path) -> tuple[Path, Path]:
    folder = hand_benchmark / "evaluations" / "digits-test"
    (folder / "plain.csv").write_text(B)
    return folder / "hand.csv", folder / "plain.csv"


def row_of(found: compare.Comparison, quantity: str, epsilon: float) -> tuple[dict[str, Any], dict[str, list[int]]]:
    at = found.table.index[(found.table["quantity"] == quantity) & (found.table["epsilon"] == epsilon)]
    assert len(at) == 1
    return found.table.loc[at[0]].to_dict(), found.disagreements[at[0]]


def test_counted_by_hand(pair: tuple[Path, Path]) -> None:
    found = compare.compare(*(compare.read(path) for path in pair))
    # (only A right, only B right), of images: A is wrong on 5 and 7, B on 3; and so on at ε = 0.5 and 1.
    expected = {
        ("clean", 0.0): ([3], [5, 7]),
        ("certified", 0.5): ([0, 2, 6], [1, 4]),  # A: 0, 2, 6 (1 has exactly 0.5, which is not above); B: 1, 4
        ("certified", 1.0): ([0], []),
        ("attacked", 0.5): ([2, 6], [4, 7]),  # A: 0, 1, 2, 6 (3 has exactly 0.5: broken); B: 0, 1, 4, 7
        ("attacked", 1.0): ([0, 6], [1, 4, 7]),  # A: 0, 6; B: 1, 4, 7
    }
    assert list(zip(found.table["quantity"], found.table["epsilon"], strict=True)) == list(expected)
    for (quantity, epsilon), (only_a, only_b) in expected.items():
        row, images = row_of(found, quantity, epsilon)
        assert images == {"only_a": only_a, "only_b": only_b}, (quantity, epsilon)
        assert (row["only_a"], row["only_b"], row["n"]) == (len(only_a), len(only_b), 8)
        assert row["difference"] == pytest.approx(row["a"] - row["b"])
        assert row["difference"] == (len(only_a) - len(only_b)) / 8
        assert row["low"] <= row["difference"] <= row["high"]
        assert row["p_value"] == pytest.approx(binomtest(len(only_a), len(only_a) + len(only_b), 0.5).pvalue)
        assert row["better"] == ""
    row, _ = row_of(found, "attacked", 0.5)
    assert (row["a"], row["b"]) == (4 / 8, 4 / 8)
    assert (row["a_low"], row["a_high"]) == (Rate(4, 8).low, Rate(4, 8).high)


def test_who_is_better(tmp_path: Path, make_benchmark: Make) -> None:
    out = make_benchmark(tmp_path / "out", names=["good", "poor"], n=60)
    folder = out / "evaluations" / "digits-test"
    rows = pd.read_csv(folder / "good.csv")
    good, poor = rows.assign(prediction=rows["label"], certified_radius=0.2), rows.assign(certified_radius=0.0)
    poor["prediction"] = np.where(np.arange(60) < 8, (rows["label"] + 1) % 10, rows["label"])
    for name, changed in (("good", good), ("poor", poor)):
        changed.assign(norm_paper=0.3, norm_standard=0.3, adversarial_norm=0.3).to_csv(folder / f"{name}.csv")
    for first, second in (("good", "poor"), ("poor", "good")):
        found = compare.compare(compare.read(folder / f"{first}.csv"), compare.read(folder / f"{second}.csv"))
        assert row_of(found, "clean", 0.0)[0]["better"] == "good"  # 8 to 0: p = 2/2⁸
        assert row_of(found, "clean", 0.0)[0]["p_value"] == pytest.approx(2 / 2**8)
        assert row_of(found, "certified", 8 / 255)[0]["better"] == "good"
        assert row_of(found, "certified", 0.3)[0]["better"] == ""
        assert row_of(found, "attacked", 0.5)[0]["better"] == ""


def test_a_model_against_itself_and_the_same_name(pair: tuple[Path, Path]) -> None:
    found = compare.compare(compare.read(pair[0]), compare.read(pair[0]))
    assert found.names == ("hand (A)", "hand (B)")
    assert (found.table["difference"] == 0).all()
    assert (found.table["p_value"] == 1).all()
    assert (found.table["better"] == "").all()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def other_split(folder: Path) -> None:
    edit(folder / "evaluation.json", '"split": "test"', '"split": "validation"')


def other_dataset(folder: Path) -> None:
    edit(folder / "evaluation.json", '"dataset": "digits"', '"dataset": "cifar10"')


def other_labels(folder: Path) -> None:
    edit(folder / "plain.csv", "\n4,0,0,", "\n4,1,0,")


def other_images(folder: Path) -> None:
    edit(folder / "plain.csv", "\n4,", "\n9,")


def fewer_images(folder: Path) -> None:
    edit(folder / "evaluation.json", '"n": 8', '"n": 7')
    edit(folder / "plain.csv", "7,1,1,0.0,inf,,inf,inf\n", "")


def other_radii(folder: Path) -> None:
    content = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps(content | {"epsilons": [0.1, 0.2]}))


def cut_off(folder: Path) -> None:
    (folder / "plain.csv").write_text(B[:-30])


def no_column(folder: Path) -> None:
    edit(folder / "plain.csv", "norm_standard", "norm_other")


def no_number(folder: Path) -> None:
    edit(folder / "plain.csv", "0.55", "much")


def no_card(folder: Path) -> None:
    (folder / "evaluation.json").unlink()


def odd_card(folder: Path) -> None:
    (folder / "evaluation.json").write_text("[]")


def not_a_number(folder: Path) -> None:
    edit(folder / "plain.csv", "0.2,0.3", "0.2,nan")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (other_split, "different images: split test and validation"),
        (other_dataset, "different images: dataset digits and cifar10"),
        (other_labels, "different images: label 0 and 1 in row 5"),
        (other_images, "different images: image 4 and 9 in row 5"),
        (fewer_images, "different images: 8 and 7 of them"),
        (other_radii, "no ε in common"),
        (cut_off, "not a table of per-image rows|damaged"),
        (no_column, "no column 'norm_standard'"),
        (no_number, "not a table of per-image rows: .*much"),
        (no_card, r"evaluation\.json is missing"),
        (odd_card, "does not tell what plain.csv is about"),
        (not_a_number, "damaged: .*no NaN"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    harm: Callable[[Path], None], message: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other" / "evaluations" / "digits-test"
    shutil.copytree(pair[0].parent, other)
    harm(other)
    with pytest.raises(UserError, match=message) as caught:
        compare.compare(compare.read(pair[0]), compare.read(other / "plain.csv"))
    assert "\n" not in str(caught.value)


def own(folder: Path, certified: bool, attacks: str = "standard") -> Path:
    """What `robustflow evaluate` writes of the same eight images."""
    folder.mkdir()
    rows = [line.split(",")[:6] for line in B.splitlines()]
    for row in rows[1:]:
        row[3] = row[3] if certified else ""
    (folder / "samples.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    told = {"config": {"dataset": "digits", "split": "test", "epsilons": [0.5, 2.0]}, "n": 8, "attacks": attacks}
    (folder / "summary.json").write_text(json.dumps(told))
    return folder


def test_a_model_of_one_s_own_is_compared_with_a_benchmark_s(pair: tuple[Path, Path], tmp_path: Path) -> None:
    ours = compare.read(pair[0])
    found = compare.compare(ours, compare.read(own(tmp_path / "mine", certified=True)))
    assert list(found.table["quantity"]) == ["clean", "certified", "attacked"]  # ε = 0.5 alone is common
    assert row_of(found, "certified", 0.5)[1] == {"only_a": [0, 2, 6], "only_b": [1, 4]}
    # A by `standard` alone, as B: image 4 of A has 0.4 there, image 3 0.5.
    assert row_of(found, "attacked", 0.5)[1] == {"only_a": [2, 6], "only_b": [4, 7]}
    assert found.notes == ["attacked by standard alone, which both have"]
    other = own(tmp_path / "other", certified=False, attacks="check") / "samples.csv"
    blank = compare.compare(ours, compare.read(other))
    assert list(blank.table["quantity"]) == ["clean"]
    assert len(blank.notes) == 2
    assert "no certificate in" in blank.notes[0]
    assert "A was attacked with paper, standard, B with check" in blank.notes[1]
    assert "note: certified accuracy left out" in str(blank)


def test_the_command_writes_table_json_and_picture(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "cmp"
    assert cli.main(["compare", *map(str, pair), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "A: hand; B: plain; on the same 8 images of digits, test" in printed
    table = pd.read_csv(out / "compare.csv", keep_default_na=False)
    content = json.loads((out / "compare.json").read_text())
    assert len(content["rows"]) == len(table) == 5
    for row, told in zip(table.to_dict("records"), content["rows"], strict=True):
        assert {key: told[key] for key in row} == pytest.approx(row)
        assert len(told["images"]["only_a"]) == row["only_a"]
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert cli.main(["compare", *map(str, pair), "--out", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    assert cli.main(["compare", str(pair[0]), str(tmp_path / "none")]) == 2


@pytest.mark.skipif(not RESULTS.is_dir(), reason="no committed results beside the tests (not a checkout)")
def test_the_committed_benchmark_compares_as_its_summary_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RESULTS.parent.parent)
    paired = json.loads((RESULTS / "summary.json").read_text())["evaluations"][0]["paired"]
    for other in paired["others"][:3]:
        found = compare.compare(compare.read(f"cifar10/{paired['best']}"), compare.read(f"cifar10/{other['name']}"))
        for quantity, epsilon in (("clean", 0.0), ("certified", paired["epsilon"]), ("attacked", paired["epsilon"])):
            row, _ = row_of(found, quantity, epsilon)
            assert {key: row[key] for key in other[quantity]} == other[quantity]
    with pytest.raises(UserError, match="was not evaluated on validation"):
        compare.read("cifar10/sharp", "validation")
