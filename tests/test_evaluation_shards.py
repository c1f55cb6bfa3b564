"""The attack stage of a benchmark in shards: killed, it goes on; where it runs is told on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import attacks
from robustflow import bench, cli, data, environment, evaluation, networks
from robustflow.evaluate_config import EvaluateConfig

CPU = torch.device("cpu")
CONFIG = EvaluateConfig.model_validate({"epsilons": (0.0, 0.1, 0.3), "attacks": ("paper", "standard"), "audit": True})


@pytest.fixture
def subject(tmp_path: Path) -> evaluation.Subject:
    """An untrained network on digits, certified."""
    images = data.load("digits", None)
    torch.manual_seed(0)
    model = networks.create_model(
        "sharp", input_shape=images.input_shape, classes=10, mean=images.mean, std=(1.0,), channels=(8,), layers=2,
        lift="patch", kernel="patch",
    ).eval()
    made = evaluation.Subject("toy", model, "0" * 64, images.splits["test"].head(30), tmp_path)
    evaluation.certify_subject(made)
    return made


def attack(subject: evaluation.Subject, config: EvaluateConfig = CONFIG, **options: Any) -> dict[str, Any]:
    return evaluation.attack_subject(subject, config, seed=0, device=CPU, show_progress=False, **options)


def test_an_interrupted_attack_goes_on_and_leaves_no_shards(
    subject: evaluation.Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "SHARD_SIZE", 8)
    certified = {path: path.read_bytes() for path in subject.folder.iterdir()}
    whole = attack(subject)
    rows = subject.rows_file.read_bytes()
    assert not (subject.folder / "shards").exists()
    assert whole["attack_environment"]["threads"] == 1
    assert whole["seconds"]["attack"] > 0

    for path, content in certified.items():
        path.write_bytes(content)
    write = attacks.shards.write_shard
    written: list[Path] = []

    def interrupted(path: Path, *arguments: Any) -> None:
        if len(written) == 6:
            raise KeyboardInterrupt
        write(path, *arguments)
        written.append(path)

    monkeypatch.setattr(attacks.shards, "write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attack(subject)
    assert [path.parent.name for path in written] == ["paper"] * 4 + ["standard"] * 2
    assert all(path.is_relative_to(subject.folder / "shards" / "toy") for path in written)
    assert subject.rows_file.read_bytes() == certified[subject.rows_file]
    monkeypatch.setattr(attacks.shards, "write_shard", write)
    times = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(evaluation.shutil, "rmtree", lambda folder: None)
    resumed = attack(subject)
    assert {path: path.stat().st_mtime_ns for path in written} == times, "a finished shard was done again"
    assert subject.rows_file.read_bytes() == rows
    assert resumed["forward_passes"] == whole["forward_passes"]
    assert resumed["attack_identity"] == whole["attack_identity"]


def test_eight_bit_adversarials_are_another_attack(subject: evaluation.Subject) -> None:
    coarse = CONFIG.model_copy(update={"eight_bit": True})
    assert not CONFIG.eight_bit
    exact = attack(subject)["attack_identity"]
    assert attack(subject, coarse)["attack_identity"] != exact
    examples = load_file(subject.folder / "toy.examples.safetensors")
    levels = examples["adversarials"] * 255
    assert len(levels) > 0
    assert float((levels - levels.round()).abs().max()) < 1e-4


def test_the_executor_is_passed_on(subject: evaluation.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(attacks.AttackInputError, match="workers must be a positive integer, got 0"):
        attack(subject, executor="workers", workers=0)
    seen: list[dict[str, Any]] = []

    def no_attack(*arguments: Any, **options: Any) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr(bench, "read_directory", lambda out: (cli.config.read("quickstart"), "quickstart"))
    monkeypatch.setattr(bench, "load_data", lambda *arguments: None)
    monkeypatch.setattr(bench, "attack", no_attack)
    monkeypatch.setattr(environment, "choose_device", lambda name: CPU)
    assert cli.main(["attack", "out"]) == 0
    assert cli.main(["attack", "out", "--executor", "ray", "--workers", "3"]) == 0
    assert [(options["executor"], options["workers"]) for options in seen] == [("serial", None), ("ray", 3)]
    with pytest.raises(SystemExit):
        cli.main(["attack", "out", "--executor", "cloud"])
