"""Models × seeds, side by side: the same weights wherever they are trained and whoever dies meanwhile."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from robustflow import bench, cli, data
from robustflow.config import Experiment, from_dict
from robustflow.errors import UserError
from robustflow.training import LOG, STATE, WEIGHTS
from robustflow.training_grid import train_grid

CPU = torch.device("cpu")
DIGITS = data.load("digits")
NAMES = ("a", "b")
SEEDS = (0, 1)


def experiment(seed: int = 0, **train: Any) -> Experiment:
    return from_dict(
        {
            "title": "t", "dataset": "digits", "seed": seed,
            "network": {"channels": [4], "layers": 2, "kernel": "patch", "lift": "patch"},
            "train": {"epochs": 2, "batch_size": 150, "crop": 1, "validate_images": 50} | train,
            "evaluate": {"epsilons": [0.1]},
            "models": [{"name": "a", "regime": "sharp"}, {"name": "b", "regime": "flexible"}],
        }
    )  # fmt: skip


def folders(out: Path) -> dict[int, Path]:
    return {seed: out / f"seed-{seed}" for seed in SEEDS}


def weights(out: Path) -> dict[tuple[int, str], bytes]:
    return {
        (seed, name): (folder / "models" / name / WEIGHTS).read_bytes()
        for seed, folder in folders(out).items()
        for name in NAMES
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], bytes]:
    """Each seed trained on its own, without any grid."""
    out, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed, folder in folders(out).items():
            bench.train(experiment(seed), folder, DIGITS, device=CPU)
    finally:
        torch.set_num_threads(threads)
    found = weights(out)
    assert len(set(found.values())) == 4
    return found


def test_in_this_process_each_seed_is_what_it_is_alone(expected: dict[tuple[int, str], bytes], tmp_path: Path) -> None:
    heard: dict[str, list[int]] = {}
    threads = torch.get_num_threads()
    train_grid(
        experiment(), folders(tmp_path), DIGITS, device=CPU,
        listener=lambda name, step, text: heard.setdefault(name, []).append(step),
    )  # fmt: skip
    assert torch.get_num_threads() == threads
    assert weights(tmp_path) == expected
    assert set(heard) == {"a, seed 0", "b, seed 0", "a, seed 1", "b, seed 1"}
    assert all(steps == sorted(steps) and steps[-1] == 16 for steps in heard.values())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    train_grid(experiment(), folders(tmp_path), DIGITS, device=CPU)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "what is done is left alone"


# What a worker does, but one training kills it once, before its ninth step: a module, as workers must import it.
MORTAL = """
import os, signal
from pathlib import Path
from robustflow import training_grid
from robustflow.training import Training

FLAG, honest, step = Path(__file__).with_name("died"), training_grid._train, Training.step

def train(shared, piece, tick):
    def mortal(self, batch):
        if (piece.name, self.progress.step) == ("a, seed 0", 8) and not FLAG.exists():
            FLAG.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, batch)
    Training.step = mortal
    return honest(shared, piece, tick)
"""


@pytest.fixture
def mortal(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of the module, in which it notes that a worker has died."""
    folder = tmp_path_factory.mktemp("mortal")
    (folder / "mortal_for_test.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("mortal_for_test", None)


def test_a_worker_killed_in_the_middle_changes_nothing(
    expected: dict[tuple[int, str], bytes], mortal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustflow.training_grid._train", importlib.import_module("mortal_for_test").train)
    heard: list[tuple[str, int, str]] = []
    train_grid(
        experiment(checkpoint_seconds=1e-9), folders(tmp_path), DIGITS, device=CPU, executor="workers", workers=2,
        listener=lambda *news: heard.append(news),
    )  # fmt: skip
    assert (mortal / "died").exists()
    assert weights(tmp_path) == expected
    assert [(name, text) for name, _, text in heard if text] == [("a, seed 0", "again, after a worker died")]
    steps = [step if not text else None for name, step, text in heard if name == "a, seed 0"]
    assert steps[steps.index(None) + 1] == 9, "it goes on from its checkpoint"
    assert steps[-1] == 16
    assert len(list(tmp_path.rglob(LOG))) == 4
    assert not list(tmp_path.rglob(STATE))


def test_a_training_goes_on_from_its_checkpoint_in_another_worker(tmp_path: Path) -> None:
    """Of a training that this process began and stopped, a worker does only the rest."""

    class Stopped(BaseException):
        pass

    def stop(name: str, step: int, text: str) -> None:
        raise Stopped

    one = {0: tmp_path}
    chosen = experiment(epochs=4, checkpoint_seconds=1e-9)
    with pytest.raises(Stopped):  # at its first message, which is after its first step
        train_grid(chosen, one, DIGITS, device=CPU, only="a", listener=stop)
    folder = tmp_path / "models" / "a"
    assert not (folder / STATE).exists()
    steps: list[int] = []

    def stop_later(name: str, step: int, text: str) -> None:
        steps.append(step)
        if step > 1:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robustflow.training_grid.EVERY", 0.0)
        with pytest.raises(Stopped):
            train_grid(chosen, one, DIGITS, device=CPU, only="a", listener=stop_later)
    assert steps == [1, 2]
    assert (folder / STATE).exists()
    train_grid(
        chosen, one, DIGITS, device=CPU, only="a", executor="workers", workers=1,
        listener=lambda name, step, text: steps.append(step),
    )  # fmt: skip
    assert steps[2] == 2, "one step was in the checkpoint: the next is the second"
    assert steps[-1] == 32


def test_a_training_that_fails_is_named_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_model = bench.train_model

    def diverging(config: Any, folder: Path, images: Any, *, seed: int, **rest: Any) -> None:
        if (config.name, seed) == ("a", 0):
            raise UserError("training of a diverged")
        train_model(config, folder, images, seed=seed, **rest)

    monkeypatch.setattr(bench, "train_model", diverging)
    with pytest.raises(UserError, match=r"^1 of 4 trainings failed: a, seed 0: training of a diverged$"):
        train_grid(experiment(epochs=1), folders(tmp_path), DIGITS, device=CPU)
    assert len(list(tmp_path.rglob(WEIGHTS))) == 3


def test_weights_left_on_another_machine_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "train_model", lambda *_, **__: None)
    with pytest.raises(UserError, match=r"another machine: put --out where every machine sees it") as caught:
        train_grid(experiment(), {0: tmp_path}, DIGITS, device=CPU, only="a")
    assert "\n" not in str(caught.value)


def test_a_training_that_kills_its_workers_is_named(tmp_path: Path) -> None:
    def kill(name: str, step: int, text: str) -> None:
        for process in multiprocessing.active_children() if not text else ():
            os.kill(process.pid or 0, signal.SIGKILL)

    with pytest.raises(UserError, match=r"^2 worker processes died on piece 0[^\n]* \(piece 0 is b, seed 5\)$"):
        train_grid(
            experiment(epochs=400), {5: tmp_path}, DIGITS, device=CPU, only="b", executor="workers", workers=1,
            listener=kill,
        )  # fmt: skip


def test_the_command_writes_a_directory_a_seed(
    tmp_path: Path, expected: dict[tuple[int, str], bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    text = """
        title = "t"
        dataset = "digits"
        network = {channels = [4], layers = 2, kernel = "patch", lift = "patch"}
        train = {epochs = 2, batch_size = 150, crop = 1, validate_images = 50}
        evaluate = {epsilons = [0.1]}
        models = [{name = "a", regime = "sharp"}, {name = "b", regime = "flexible"}]
    """
    (tmp_path / "c.toml").write_text(text)
    out = tmp_path / "out"
    command = ["train", str(tmp_path / "c.toml"), "--device", "cpu", "--out", str(out)]
    assert cli.main([*command, "--seeds", "0,1"]) == 0
    assert weights(out) == expected
    for seed, folder in folders(out).items():
        assert bench.read_directory(folder)[0].seed == seed
        assert cli.main(["certify", str(folder), "--model", "a"]) == 0
    assert cli.main([*command, "--seeds", "0,1,7", "--model", "none"]) == 2
    assert "no model 'none'" in capsys.readouterr().err
    assert not (out / "seed-7").exists()
    for seeds, line in (("0,0", "every seed once"), ("0,-1", "a whole number"), ("", "a whole number")):
        with pytest.raises(SystemExit) as caught:
            cli.main([*command, f"--seeds={seeds}"])
        assert caught.value.code == 2
        assert line in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--seeds", "0", "--seed", "1"])
    assert "not allowed with" in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'robustflow[ray]'")
    from ray.cluster_utils import Cluster

    both = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        both.add_node(num_cpus=1)
        ray.init(address=both.address, logging_level="error", log_to_driver=False)
        yield both
    finally:
        ray.shutdown()
        both.shutdown()


def test_on_two_ray_nodes_they_come_out_the_same(
    cluster: Any, expected: dict[tuple[int, str], bytes], tmp_path: Path
) -> None:
    train_grid(experiment(), folders(tmp_path), DIGITS, device=CPU, executor="ray")
    assert weights(tmp_path) == expected


def test_a_ray_worker_killed_in_the_middle_changes_nothing(
    cluster: Any, expected: dict[tuple[int, str], bytes], mortal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = str(mortal)

    def train(shared: Any, piece: Any, tick: Any) -> Any:  # sent by value: it finds the module on every node
        import sys

        sys.path.insert(0, there)
        import mortal_for_test  # type: ignore[import-not-found]

        return mortal_for_test.train(shared, piece, tick)

    monkeypatch.setattr("robustflow.training_grid._train", train)
    train_grid(experiment(checkpoint_seconds=1e-9), folders(tmp_path), DIGITS, device=CPU, executor="ray")
    assert (mortal / "died").exists()
    assert weights(tmp_path) == expected
