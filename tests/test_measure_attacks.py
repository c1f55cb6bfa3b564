"""`robustflow measure attacks`: a small run of every part, and its counts against ones made by hand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import attacks
from robustflow import cli
from robustflow.measurements import attack_counts, attack_sets, attack_tables, attack_workers, plain_foolbox, targets
from robustflow.measurements.family import Request

CONFIG = """
title = "Tiny"
dataset = "digits"
[network]
channels = [8]
layers = 2
kernel = "patch"
lift = "patch"
[train]
epochs = 8
batch_size = 100
crop = 0
flip = false
[evaluate]
images = 30
epsilons = [0, "36/255", 0.2, 0.5]
attacks = ["paper", "standard"]
[[models]]
name = "sharp"
regime = "sharp"
[[models]]
name = "resnet"
regime = "resnet"
network = { kernel = "convolution", lift = "convolution", channels = [4] }
train = { optimizer = "nadam", loss = { kind = "cross-entropy" } }
"""
GRID = [36 / 255, 0.2, 0.5]


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "tiny.toml").write_text(CONFIG)
    assert run("bench", folder / "tiny.toml", "--out", folder / "out", "--device", "cpu") == 0
    return folder / "out"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attack_sets, "IMAGES", 20)
    monkeypatch.setattr(attack_sets, "DEAR", {"strong": 8})
    long = {name: attacks.ATTACKS[name] for name in ("deepfool-long", "fmn")}
    chosen = attacks.AttackSet("strong", tuple(long), "two of the set, to be quick")
    monkeypatch.setitem(attacks.SETS, "strong", chosen)
    monkeypatch.setattr(plain_foolbox, "IMAGES", 12)
    monkeypatch.setattr(plain_foolbox, "BATCH", 5)
    monkeypatch.setattr(attack_workers, "IMAGES", 12)
    monkeypatch.setattr(attack_workers, "SHARD", 4)
    monkeypatch.setattr(attack_workers, "ORDER", (1, 2))


# ------------------------------------------------------------------------------------------------------------ by hand
NORMS = {
    "standard": np.array([0.0, 0.1, 0.4, math.inf, 0.4]),
    "strong": np.array([0.0, 0.1, 0.3, 0.35, 0.4]),
}
RADII = np.array([0.9, 0.05, 0.2, 0.3, 0.36])


def test_counts_by_hand() -> None:
    """At ε = 0.35: image 0 is wrong, 1 broken by both, 2 and 3 by strong alone, 4 is certified."""
    found = attack_counts._undecided(NORMS, RADII, 0.35)
    assert found == {"epsilon": 0.35, "n": 5, "certified": 2, "undecided": 2, "broken_by_strong": 2}
    (row,) = attack_counts.differences(NORMS, "standard", "strong", [0.35])
    assert (row["n"], row["only_a"], row["only_b"], row["difference"]) == (5, 2, 0, pytest.approx(0.4))
    assert attack_tables.points(row).startswith("+40.0 (")
    assert [rate["k"] for rate in attack_counts.rates(NORMS["standard"], [0.1, 0.4, 1.0])] == [3, 1, 1]
    assert attack_counts.broken_by_one_alone(NORMS, 0.35)["strong"]["standard"] == 2
    assert attack_counts.broken_by_one_alone(NORMS, 0.35)["standard"]["strong"] == 0


def test_the_first_to_break_is_counted_once() -> None:
    norms = {"a": np.array([0.3, 0.1, 0.0, math.inf]), "b": np.array([0.1, 0.1, 0.0, 0.2])}
    found = attack_counts.first_to_break(norms, ["a", "b"], [0.2, 0.3])
    assert [row["counts"] for row in found] == [{"a": 1, "b": 2}, {"a": 2, "b": 1}]
    assert attack_counts.first_to_break(norms, ["b", "a"], [0.3])[0]["counts"] == {"b": 3, "a": 0}


def test_runs_of_different_length_meet_on_the_images_of_both() -> None:
    norms = NORMS | {"strong": NORMS["strong"][:3]}
    assert attack_counts._undecided(norms, RADII, 0.35)["broken_by_strong"] == 1
    assert attack_counts.differences(norms, "standard", "strong", [0.35])[0]["n"] == 3
    assert attack_counts.broken_by_one_alone(norms, 0.35)["strong"]["standard"] == 1


def test_a_certified_and_an_ordinary_model_are_chosen() -> None:
    def target(name: str, regime: str, radii: list[float]) -> Any:
        nothing = torch.zeros(0)
        return targets.Target(name, regime, nn.Identity(), nothing, nothing, np.array(radii), (), {}, {}, "", name)  # type: ignore[arg-type]

    models = [target("a", "naive", [0.1, 0.0]), target("r", "resnet", [0.0, 0.0]), target("b", "sharp", [0.3, 0.4])]
    assert [found.name for found in targets.certified_and_not(models, 0.2)] == ["b", "r"]
    assert [found.name for found in targets.certified_and_not(models[::2], 0.2)] == ["b", "a"]
    assert [found.name for found in targets.certified_and_not(models[:1], 0.2)] == ["a"]


def test_radii_that_the_benchmark_did_not_attack_are_not_read_from_its_rows() -> None:
    norms = {"paper": np.array([0.2, 0.0]), "standard": np.array([0.1, 0.0])}
    entry = {"epsilons": [0.1, 0.2], "norms": [0.3, 0.0], "found_by": ["a", "clean"], "forward_passes": {"clean": 2}}
    entry |= {"seconds": {}, "wall_seconds": 1.0, "cpu_seconds": 1.0, "warnings": []}
    nothing = torch.zeros(2)
    target = targets.Target("x", "sharp", nn.Identity(), nothing, nothing, np.zeros(2), (0.2,), norms, {}, "", "")  # type: ignore[arg-type]
    found = attack_counts.summary(target, {"paper": entry}, [0.1, 0.2], [])
    assert [row["epsilon"] for row in found["benchmark"]["paper"]["accuracy"]] == [0.0, 0.2]
    assert [(row["epsilon"], row["only_a"]) for row in found["weakness"]] == [(0.2, 0)]
    assert "verdicts_unlike_the_benchmark" not in found["runs"]["paper"]
    # One image, at both radii of the two, is robust now and was not before.
    entry["epsilons"] = [0.2]
    again = attack_counts.summary(target, {"paper": entry}, [0.2], [])
    assert again["runs"]["paper"]["verdicts_unlike_the_benchmark"] == 1
    runs = [{"name": "paper", "every_epsilon": True}]
    page = attack_tables.sets({"models": [again], "runs": runs, "compared_at": [0.2], "epsilons": [0.2], "n": 2,
                               "split": "test", "benchmark": "x"})  # fmt: skip
    assert "1 of 2 verdicts come out differently" in page


def test_masked_gradients_are_told() -> None:
    def model(name: str, *warnings: str) -> dict[str, Any]:
        return {"model": name, "runs": {"check": {"warnings": list(warnings)}}}

    part = {"runs": [{"name": "check"}], "models": [model("a"), model("b", "masked gradients: 3 of 9")]}
    assert attack_tables._masked(part) == " Gradients that `check` finds masked: b."
    assert attack_tables._masked(part | {"models": [model("a", "flat logits: x")]}).endswith("masked: none.")
    assert attack_tables._masked(part | {"runs": [{"name": "strong"}]}) == ""


# -------------------------------------------------------------------------------------------------------- plain foolbox
class Plane(nn.Module):
    """Two classes on either side of a hyperplane: the distance is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 4.0], [-3.0, -4.0]]) / 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.flatten(1) - 0.5) @ self.weight.T


def test_plain_calls_against_the_exact_distance() -> None:
    """Image = middle + t·normal: its distance is |t|; each call's passes follow from its number of steps."""
    distances = torch.tensor([0.05, 0.1, 0.2, 0.3])
    images = (0.5 + distances[:, None] * torch.tensor([0.6, 0.8])).view(4, 1, 1, 2)
    said, cost = plain_foolbox.plain(Plane().eval(), images, torch.zeros(4, dtype=torch.int64), [0.07, 0.15, 0.25])  # type: ignore[arg-type]
    assert said.tolist() == [[d < e for e in (0.07, 0.15, 0.25)] for d in distances.tolist()]
    assert cost["refused"] == 0
    # The first image is the only one within 0.07, and each of the four attacks finds it by itself.
    assert cost["wrong_or_broken"] == {name: [1, 2, 3] for name in attacks.SETS["standard"].attacks}
    passes = cost["forward_passes"]
    # A forward pass a step, and one of every image at every ε that says whether it is misclassified.
    assert passes["margin-pgd"] == 4 * 3 * (15 + 1)
    assert passes["targeted-pgd"] == 4 * 3 * (10 + 1)  # one other class, one target
    assert passes["ddn"] >= 4 * (40 + 3)


def test_successes_that_are_none_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.full((4, 1, 1, 2), 0.99), torch.tensor([0, 0, 0, 1])

    def boastful(model: Any, x: Any, criterion: Any, epsilons: list[float]) -> Any:
        far, nan, unchanged, outside = x[:1] - 0.8, x[1:2] * math.nan, x[2:3], x[3:] + 0.05
        return [], [torch.cat([far, nan, unchanged, outside])], torch.ones(1, 4, dtype=torch.bool)

    monkeypatch.setattr(plain_foolbox, "_calls", lambda *arguments: iter([("boastful", boastful, None)]))
    said, cost = plain_foolbox.plain(Plane().eval(), images, labels, [0.1])  # type: ignore[arg-type]
    assert said.all()
    assert cost["refused"] == 4


# ----------------------------------------------------------------------------------------------------------- all parts
def test_all_parts(
    small: None, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attacked: list[tuple[str, Any]] = []
    sweep = attacks.sweep

    def watched(model: Any, images: Any, labels: Any, epsilons: Any, chosen: str, **options: Any) -> Any:
        attacked.append((chosen, options["certified_radii"]))
        if len(attacked) == 4 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        return sweep(model, images, labels, epsilons, chosen, **options)

    monkeypatch.setattr(attack_sets.attacks, "sweep", watched)
    rows = (trained / "evaluations" / "digits-test").glob("*.csv")
    certified = [pd.read_csv(path)["certified_radius"].to_numpy() for path in rows]
    assert all(radii.any() for radii in certified)
    out = tmp_path / "attacks"
    measure = ("measure", "attacks", "--out", out, "--bench", trained)
    assert run(*measure, "--only", "sets") == 130
    assert run(*measure) == 0
    # 7 runs on 2 models and the 2 sweeps of the part foolbox; the third one finished is not lost.
    assert len(attacked) == 4 + (14 - 3) + 2
    assert not list(out.rglob("*.partial"))
    for chosen, radii in attacked[:-2]:  # of the part sets: whoever is certified is left out
        assert any(np.array_equal(radii, known[: len(radii)]) for known in certified), chosen
    check_sets(json.loads((out / "sets.json").read_text()), out, trained)
    check_foolbox(json.loads((out / "foolbox.json").read_text()))
    check_workers(json.loads((out / "workers.json").read_text()))
    table = (out / "table.md").read_text()
    assert capsys.readouterr().out.strip().endswith(table.strip())
    plots = {path.stem for path in (out / "plots").glob("*.png")}
    assert plots == {"sets-accuracy", "sets-matrix", "sets-cost", "foolbox", "workers"}
    for name in plots:
        assert f"plots/{name}.png" in table
    # What is there is not measured again; the page is made of the JSON alone.
    before = len(attacked)
    (out / "table.md").unlink()
    assert run(*measure) == 0
    assert len(attacked) == before
    assert (out / "table.md").read_text() == table


def check_sets(record: dict[str, Any], out: Path, trained: Path) -> None:
    assert record["epsilons"] == GRID
    assert record["environment"]["versions"]["torch"]
    assert record["seed"] == 0
    assert [run["name"] for run in record["runs"]] == ["paper", "standard", *attacks.SETS["standard"].attacks, "strong"]
    for model in record["models"]:
        rows = pd.read_csv(out / "rows" / f"{model['model']}.csv")
        committed = pd.read_csv(trained / "evaluations" / "digits-test" / f"{model['model']}.csv")
        radii = committed["certified_radius"].to_numpy()[:20]
        assert (rows["certified_radius"].to_numpy() == radii).all()
        # The benchmark's own rows are counted over all of its images, those of this run over the first.
        clean, _, middle, last = model["benchmark"]["standard"]["accuracy"]
        at = committed["norm_standard"]
        assert (clean["k"], clean["n"]) == (int((committed["label"] == committed["prediction"]).sum()), 30)
        assert (middle["epsilon"], last["epsilon"]) == (0.2, 0.5)
        assert middle["k"] == int(((at > 0) & (at > 0.2)).sum())
        assert [row["epsilon"] for row in model["weakness"]] == GRID
        assert model["benchmark"]["paper"]["forward_passes"] > 30
        for name, found in model["runs"].items():
            norms = rows[f"norm_{name}"].to_numpy()
            count = 8 if name == "strong" else 20
            assert found["n"] == count
            assert np.isnan(norms[count:]).all()
            for rate in found["accuracy"]:
                assert rate["k"] == int(((norms[:count] > 0) & (norms[:count] > rate["epsilon"])).sum())
            assert sum(found["forward_passes"].values()) == pytest.approx(found["passes_per_image"] * count)
            # Certified everywhere: never attacked, so nothing is known of it.
            everywhere = (radii[:count] > max(GRID)) & (norms[:count] > 0)
            assert np.isinf(norms[:count][everywhere]).all()
            for place, epsilon in enumerate(rate["epsilon"] for rate in found["accuracy"]):
                smallest = sum(counts[place] for counts in found["smallest_found_by"].values())
                assert smallest == int(((norms[:count] > 0) & (norms[:count] <= epsilon)).sum())
        assert model["runs"]["standard"]["verdicts_unlike_the_benchmark"] == 0
        assert model["runs"]["paper"]["verdicts_unlike_the_benchmark"] == 0
        assert "verdicts_unlike_the_benchmark" not in model["runs"]["ddn"]
        for entry in model["first_to_break"]:
            alone = [rows[f"norm_{name}"].to_numpy()[:20] for name in entry["counts"]]
            together = np.min(alone, axis=0)
            assert sum(entry["counts"].values()) == int(((together > 0) & (together <= entry["epsilon"])).sum())
    assert any(row["b"] == "strong" for row in record["models"][0]["differences"])


def check_foolbox(record: dict[str, Any]) -> None:
    assert [model["model"] for model in record["models"]] == ["sharp", "resnet"]
    for model in record["models"]:
        assert model["n"] == 12
        assert model["times_fewer_passes"] == model["plain"]["forward_passes"] / model["sweep"]["forward_passes"] > 1
        for row, plain in zip(model["sweep_minus_plain"], model["plain"]["accuracy"], strict=True):
            ours = next(rate for rate in model["sweep"]["accuracy"] if rate["epsilon"] == row["epsilon"])
            assert row["difference"] == pytest.approx(ours["value"] - plain["value"])
    assert [model["certified_left_out"] for model in record["models"]] == [True, False]


def check_workers(record: dict[str, Any]) -> None:
    assert record["same_norms"]
    assert record["ratio"] == pytest.approx(sum(record["wall_seconds"]["2"]) / sum(record["wall_seconds"]["1"]))
    assert len(record["load_before"]) == 2


def test_two_workers_are_timed_against_one(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = {None: 9.0, 1: 10.0, 2: 7.0}
    norms = {None: [0.1, math.inf], 1: [0.1, math.inf], 2: [0.1, math.inf]}
    monkeypatch.setattr(
        attack_workers, "_timed", lambda target, epsilons, seed, workers: (np.array(norms[workers]), spent[workers])
    )
    record = attack_workers.measure(Request(tmp_path, trained))
    assert (record["ratio"], record["same_norms"]) == (pytest.approx(0.7), True)
    assert "not met" in attack_tables.workers(record)
    spent[2], norms[2] = 5.0, [0.1, 0.2]
    record = attack_workers.measure(Request(tmp_path, trained))
    text = attack_tables.workers(record)
    assert not record["same_norms"]
    assert "NOT the same" in text
    assert "not met" not in text
    assert "one core" in attack_tables.workers(record | {"ratio": 0.9, "cores": 1})


def test_bad_input_in_one_line(
    small: None, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        assert run("measure", "attacks", "--out", tmp_path / "x", *arguments) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        return error

    assert "--bench DIR" in refused()
    assert "unknown part 'speed': choose from sets, foolbox, workers" in refused("--only", "speed", "--bench", trained)
    assert "is not a directory" in refused("--bench", tmp_path / "nowhere")
    stale = Path(shutil.copytree(trained, tmp_path / "stale"))
    record = stale / "evaluations" / "digits-test" / "resnet.json"
    record.write_text(record.read_text().replace('"certificate_identity": "', '"certificate_identity": "0'))
    assert "robustflow attack" in refused("--bench", stale)
    rows = trained / "evaluations" / "digits-test" / "sharp.csv"
    shutil.rmtree(stale)
    shutil.copytree(trained, stale)
    (stale / rows.relative_to(trained)).write_text(rows.read_text().replace("norm_paper", "norm_other"))
    assert "has no norms of paper" in refused("--bench", stale)
    monkeypatch.setattr(attack_sets, "runs", lambda: [attack_sets.Run("hammer", 3, True)])
    assert "unknown attack 'hammer'" in refused("--bench", trained)


def test_a_kept_record_is_bound_to_what_it_depends_on(tmp_path: Path) -> None:
    made: list[str] = []

    def make() -> dict[str, Any]:
        made.append("x")
        return {"value": len(made)}

    path = tmp_path / "a" / "b.json"
    assert targets.kept(path, ["weights", 1], make)["value"] == 1
    assert targets.kept(path, ["weights", 1], make)["value"] == 1
    assert targets.kept(path, ["weights", 2], make)["value"] == 2
