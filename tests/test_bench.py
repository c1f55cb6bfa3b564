"""The whole path through the command line on digits, small: trained, certified, attacked, reported, resumed."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from robustflow import bench, certificates, checkpoints, cli, evaluation, falsifier, trained
from robustflow.networks import parameter_count

CONFIG = """
title = "Tiny"
dataset = "digits"
[network]
channels = [8]
layers = 2
kernel = "patch"
lift = "patch"
[train]
epochs = 3
batch_size = 100
crop = 0
flip = false
[evaluate]
images = 24
epsilons = [0, 0.1, 0.4, 1.0, 2.0]
attacks = ["paper", "standard"]
[[models]]
name = "sharp"
regime = "sharp"
[[models]]
name = "free"
regime = "unconstrained"
network = { kernel = "convolution", lift = "convolution" }
train = { optimizer = "nadam", loss = { kind = "cross-entropy" } }
"""
GRID = [0.0, 0.1, 0.4, 1.0, 2.0]


def snapshot(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "out"
    assert run("bench", config, "--out", out, "--device", "cpu") == 0
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def rows_of(out: Path, name: str) -> list[dict[str, str]]:
    with (out / "evaluations" / "digits-test" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_everything_is_there(finished: Path) -> None:
    files = snapshot(finished)
    for name in ("sharp", "free"):
        assert {f"models/{name}/{part}" for part in ("model.safetensors", "card.json", "train.jsonl")} <= files.keys()
        assert {
            f"evaluations/digits-test/{name}.{part}" for part in ("csv", "json", "examples.safetensors")
        } <= files.keys()
    assert {"config.json", "summary.json", "table.md", "table.csv", "report.html"} <= files.keys()
    assert sum(name.startswith("plots/") and name.endswith(".png") for name in files) >= 3
    assert not any("partial" in name or "training.safetensors" in name for name in files)


def check_rate(rate: dict[str, Any], k: int) -> None:
    assert type(rate["k"]) is int
    assert type(rate["n"]) is int
    assert (rate["k"], rate["n"], rate["value"]) == (k, 24, pytest.approx(k / 24))
    assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1


def test_summary_has_the_issue_s_schema_and_counts_the_rows(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["schema_version"] == 1
    assert [model["name"] for model in summary["models"]] == ["sharp", "free"]
    for model, regime in zip(summary["models"], ("sharp", "unconstrained"), strict=True):
        assert model["regime"] == regime
        assert type(model["parameters"]) is int
        assert type(model["multiply_adds"]) is int
        assert model["lipschitz_bound"] is None or model["lipschitz_bound"] > 0
        assert isinstance(model["config"], dict)
        assert model["seed"] == 0
        assert all(type(model["seconds"][stage]) is float for stage in ("train", "certify", "attack"))
    assert summary["models"][0]["lipschitz_bound"] <= 1 + 1e-5
    assert {"versions", "device", "revision"} <= summary["environment"].keys()
    (block,) = summary["evaluations"]
    assert (block["dataset"], block["split"], block["n"], block["epsilons"]) == ("digits", "test", 24, GRID)
    for entry in block["models"]:
        rows = rows_of(finished, entry["name"])
        right = [row for row in rows if row["label"] == row["prediction"]]
        check_rate(entry["clean"], len(right))
        assert entry["alarms"] == []
        for i, epsilon in enumerate(GRID):
            certified, attacked = entry["certified"][i], entry["attacked"][i]
            assert certified["epsilon"] == attacked["epsilon"] == epsilon
            check_rate(certified, sum(float(row["certified_radius"]) > epsilon for row in right))
            check_rate(attacked, sum(float(row["adversarial_norm"]) > epsilon for row in right))
            assert certified["k"] <= attacked["k"]


def test_rows_are_a_bracket_for_every_image(finished: Path) -> None:
    decided = 0
    for name in ("sharp", "free"):
        rows = rows_of(finished, name)
        assert [int(row["index"]) for row in rows] == list(range(24))
        for row in rows:
            radius, norm = float(row["certified_radius"]), float(row["adversarial_norm"])
            assert norm == min(float(row["norm_paper"]), float(row["norm_standard"]))
            if row["label"] != row["prediction"]:
                assert (radius, norm, row["attack"]) == (0, 0, "clean")
            else:
                assert 0 <= radius < norm
                assert bool(row["attack"]) == math.isfinite(norm)
                decided += math.isfinite(norm)
    assert decided > 10


def test_examples_are_adversarials_of_the_stored_model(finished: Path) -> None:
    experiment, _ = bench.read_directory(finished)
    images = bench.load_data(experiment, None)
    tensors, _ = checkpoints.read_tensors(finished / "evaluations" / "digits-test" / "sharp.examples.safetensors")
    assert 0 < len(tensors["index"]) <= 8
    model = bench.load_model(experiment.model("sharp"), images, finished / "models" / "sharp")
    clean = images.splits["test"].images()[tensors["index"]]
    assert torch.equal(tensors["images"].float() / 255, clean)
    with torch.no_grad():
        assert torch.equal(model(clean).argmax(1), tensors["prediction"])
        assert torch.equal(model(tensors["adversarials"]).argmax(1), tensors["adversarial_prediction"])
    assert (tensors["adversarial_prediction"] != tensors["label"]).all()
    distances = (tensors["adversarials"].double() - clean.double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(distances, tensors["norm"], rtol=1e-5, atol=1e-7)
    assert 0 <= tensors["adversarials"].min() <= tensors["adversarials"].max() <= 1


def test_card_counts_the_model(finished: Path) -> None:
    experiment, name = bench.read_directory(finished)
    assert name.endswith("tiny.toml")
    images = bench.load_data(experiment, None)
    card = bench.read_card(finished / "models" / "free")
    model = bench.build_model(experiment.model("free"), images)
    assert card["parameters"] == parameter_count(model)
    assert card["data"]["sha256"] == bench.fingerprint(images)
    torch.testing.assert_close(model.features[0].mean, torch.tensor(images.mean))
    torch.testing.assert_close(model.features[0].std, torch.ones(1))  # centred, not divided


def test_a_second_run_does_nothing_again(config: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(copied)
    for module, name in ((trained, "Training"), (evaluation, "certify"), (evaluation.attacks, "sharded_sweep")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("done a second time"))
    assert run("bench", config, "--out", copied, "--device", "cpu") == 0
    assert snapshot(copied) == before


def test_the_report_is_rebuilt_byte_for_byte(copied: Path) -> None:
    before = snapshot(copied)
    for name in ("summary.json", "table.md", "table.csv", "report.html"):
        (copied / name).unlink()
    shutil.rmtree(copied / "plots")
    assert run("report", copied) == 0
    assert snapshot(copied) == before


@pytest.mark.parametrize("gone", [("csv", "json", "examples.safetensors"), ("csv",), ("json",)])
def test_only_what_is_missing_is_done_again(gone: tuple[str, ...], config: Path, copied: Path) -> None:
    before = snapshot(copied)
    folder = copied / "evaluations" / "digits-test"
    times = {path: path.stat().st_mtime_ns for path in [*folder.glob("free.*"), *copied.glob("models/*/*")]}
    for suffix in gone:
        (folder / f"sharp.{suffix}").unlink()
    assert run("bench", config, "--out", copied, "--device", "cpu") == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    after = snapshot(copied)
    assert after.keys() == before.keys()
    for suffix in ("csv", "examples.safetensors"):
        assert after[f"evaluations/digits-test/sharp.{suffix}"] == before[f"evaluations/digits-test/sharp.{suffix}"]


def test_a_radius_too_large_raises_an_alarm(
    copied: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Lipschitz bound that is 20 times too small: the audit attacks inside the balls and says so everywhere."""
    config = copied.parent / "audit.toml"
    config.write_text(CONFIG.replace("[evaluate]\n", "[evaluate]\naudit = true\n"))

    def inflated(*arguments: Any, **options: Any) -> certificates.Certificate:
        honest = certificates.certify(*arguments, **options)
        return dataclasses.replace(honest, radii=honest.radii * 20, lipschitz=honest.lipschitz / 20)

    monkeypatch.setattr(evaluation, "certify", inflated)
    folder = copied / "evaluations" / "digits-test"
    for name in ("sharp", "free"):
        (folder / f"{name}.json").unlink()
    assert run("bench", config, "--out", copied, "--device", "cpu") == 1
    assert "ALARM" in capsys.readouterr().err
    found = json.loads((folder / "sharp.json").read_text())["alarms"]
    assert len(found) > 5
    experiment, _ = bench.read_directory(copied)
    images = bench.load_data(experiment, None)
    model = bench.load_model(experiment.model("sharp"), images, copied / "models" / "sharp")
    for alarm in found:
        pair, metadata = checkpoints.read_tensors(folder / alarm["file"])
        assert metadata == {"index": alarm["index"]}
        assert torch.equal(pair["image"], images.splits["test"].images()[alarm["index"]])
        distance = float((pair["image"].double() - pair["adversarial"].double()).norm())
        assert distance == pytest.approx(alarm["adversarial_norm"], rel=1e-6)
        assert distance <= alarm["certified_radius"]
        assert alarm["confirmed_in_float64"] is True
        with torch.no_grad():
            assert int(model(pair["adversarial"][None]).argmax()) != int(images.splits["test"].labels[alarm["index"]])
    page = (copied / "report.html").read_text()
    assert "alarm" in page.lower()
    assert found[0]["file"] in page or f"{found[0]['adversarial_norm']:.3g}"[:4] in page
    counted = json.loads((copied / "summary.json").read_text())["evaluations"][0]["models"][0]
    assert len(counted["alarms"]) == len(found)
    assert run("bench", config, "--out", copied, "--device", "cpu") == 1, "an alarm stays one"


def test_a_refuted_bound_stops_with_the_pair(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = falsifier.lipschitz_of
    monkeypatch.setattr(falsifier, "lipschitz_of", lambda *arguments: honest(*arguments) / 3)
    folder = copied / "evaluations" / "digits-test"
    (folder / "sharp.json").unlink()
    assert run("certify", copied, "--model", "sharp") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "refuted" in error
    pair, _ = checkpoints.read_tensors(folder / "sharp.falsified.safetensors")
    assert pair.keys() == {"x", "y"}
    assert not (folder / "sharp.json").exists()


def test_one_model_of_several_gives_no_report_yet(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("bench", config, "--out", out, "--device", "cpu", "--model", "sharp") == 0
    assert "no report before free" in capsys.readouterr().out
    assert (out / "evaluations" / "digits-test" / "sharp.csv").exists()
    assert not (out / "report.html").exists()
