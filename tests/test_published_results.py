"""The committed results can be derived again: reports from rows, and radii from checkpoints (where the data is)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from robustflow import bench, certify, checkpoints, data
from robustflow.evaluation import read_rows
from robustflow.report import build_report
from robustflow.structured import measured_files, overview
from robustflow.structured.bench import read_directory
from robustflow.structured.report import build_report as build_system_report

RESULTS = Path(__file__).resolve().parent.parent / "results"
DIRECTORIES = sorted(path.parent for path in RESULTS.glob("*/summary.json"))
STRUCTURED = RESULTS / "structured"
SYSTEMS = sorted(path.parent for path in STRUCTURED.glob("*/summary.json"))
WEIGHTS = [path for path in RESULTS.glob("**/models/*/model.safetensors") if STRUCTURED not in path.parents]
WITH_WEIGHTS = sorted({path.parents[2] for path in WEIGHTS})
HAS_CIFAR = (Path(os.environ.get(data.ENVIRONMENT_VARIABLE) or "nowhere") / "cifar10.npz").exists()

pytestmark = pytest.mark.skipif(not DIRECTORIES, reason="no committed results beside the tests (not a checkout)")


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
def test_report_rebuilds_every_table_byte_for_byte(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / directory.name
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("table.*", "summary.json", "report.html", "plots"))
    build_report(copy)
    for name in ("summary.json", "table.md", "table.csv"):
        assert (copy / name).read_bytes() == (directory / name).read_bytes(), name
    assert {path.name for path in (copy / "plots").iterdir()} == {path.name for path in (directory / "plots").iterdir()}


@pytest.mark.parametrize("directory", SYSTEMS, ids=lambda path: path.name)
def test_report_of_a_system_is_rebuilt_from_what_was_measured(directory: Path, tmp_path: Path) -> None:
    copy = tmp_path / directory.name
    ignored = shutil.ignore_patterns("table.*", "summary.json", "report.html", "plots", "model.safetensors")
    shutil.copytree(directory, copy, ignore=ignored)
    build_system_report(copy)
    for name in ("summary.json", "table.md", "table.csv"):
        assert (copy / name).read_bytes() == (directory / name).read_bytes(), name
    assert {path.name for path in (copy / "plots").iterdir()} == {path.name for path in (directory / "plots").iterdir()}


@pytest.mark.skipif(not SYSTEMS, reason="no committed results of systems beside the tests")
def test_the_page_over_the_systems_is_of_their_summaries(tmp_path: Path) -> None:
    reports = [(path.name, checkpoints.read_json(path / "summary.json")) for path in
               overview.system_directories(STRUCTURED)]  # fmt: skip
    rows = [row for name, summary in reports for row in overview.headline_rows(name, summary)]
    assert overview.to_markdown(rows) == (STRUCTURED / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("directory", SYSTEMS, ids=lambda path: path.name)
def test_weights_of_a_system_give_the_committed_figures(directory: Path) -> None:
    """The first model of the first seed, measured again: the same figures up to what another processor rounds."""
    found, _ = read_directory(directory)
    config, seed = found.experiment.models[0], found.experiment.seeds[0]
    again = found.system.measure(found.load(config, seed).requires_grad_(False), found.test)
    committed = measured_files.read_record(found.measured(seed), config.name).figures
    assert set(again.figures) == set(committed)
    figure, _ = found.system.headlines[0]
    assert again.figures[figure] == pytest.approx(committed[figure], rel=1e-3), figure


@pytest.mark.parametrize("directory", WITH_WEIGHTS, ids=lambda path: str(path.relative_to(RESULTS)))
def test_checkpoints_give_the_committed_radii(directory: Path) -> None:
    experiment, _ = bench.read_directory(directory)
    if experiment.dataset != "digits" and not HAS_CIFAR:
        pytest.skip("CIFAR-10 is not here: set ROBUSTFLOW_DATA to a directory with cifar10.npz")
    images = bench.load_data(experiment, None)
    count = 40
    for config in experiment.models:
        if not (directory / "models" / config.name / "model.safetensors").exists():
            continue  # of several seeds not every model's weights are committed
        model = bench.load_model(config, images, directory / "models" / config.name)
        for split_name in experiment.evaluate.splits:
            split = images.splits[split_name].head(count)
            rows = read_rows(directory / "evaluations" / f"{images.name}-{split_name}" / f"{config.name}.csv")
            certificate = certify(model, split.images(), split.labels)
            committed = rows["certified_radius"].to_numpy()[:count]
            assert np.allclose(certificate.radii, committed, rtol=0, atol=1e-6), config.name
            assert rows["label"].tolist()[:count] == split.labels.tolist()
