"""Two processes train what one trains, and a killed one costs no more than the steps since the last checkpoint."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from robustflow import bench, checkpoints, cli, config, data
from robustflow.distributed import ALONE, Group, joined
from robustflow.errors import UserError
from robustflow.training import LOG, STATE, WEIGHTS

CPU = torch.device("cpu")
DIGITS = data.load("digits")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
README = Path(__file__).resolve().parent.parent / "README.md"
CONFIG = """
title = "t"
dataset = "digits"
[network]
channels = [4]
layers = 2
[train]
epochs = 2
batch_size = 150
crop = 1
validate_images = 50
{more}
[evaluate]
epsilons = [0.1]
[[models]]
name = "sharp"
regime = "sharp"
network = {{kernel = "patch", lift = "patch"}}
[[models]]
name = "flexible"
regime = "flexible"
train = {{optimizer = "nadam", loss = {{kind = "certified"}}}}
[[models]]
name = "convolutions"  # plain steps: they feel the length of a gradient, not only its direction
regime = "nonexpansive"
network = {{lift = "patch"}}  # not a nearly isometric convolution: power iteration on it enlarges rounding
train = {{optimizer = "sgd", learning_rate = 0.05, schedule = "constant", loss = {{kind = "hinge", margin = 0.3}}}}
"""
NAMES = ("sharp", "flexible", "convolutions")


# robustflow.cli, but step 10 of one training is held until somebody ends it.
HARMED = """
import os, runpy, time
from robustflow.training import Training

step = Training.step
def harmed(self, batch):
    if (self.directory.name, self.progress.step) == ("flexible", 10):
        if os.environ["HARM"] == "hold":
            time.sleep(250)
    step(self, batch)
Training.step = harmed
runpy.run_module("robustflow.cli", run_name="__main__")
"""


def command(folder: Path, out: Path, more: str = "", *options: str, harmed: bool = False) -> list[str]:
    (folder / "c.toml").write_text(CONFIG.format(more=more))
    (folder / "harmed.py").write_text(HARMED)
    program = [str(folder / "harmed.py")] if harmed else ["-m", "robustflow.cli"]
    arguments = ["train", str(folder / "c.toml"), "--out", str(out), "--device", "cpu"]
    return [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *options, *program, *arguments]


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    return checkpoints.read_tensors(out / "models" / name / WEIGHTS)[0]


def log(out: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "models" / name / LOG).read_text().splitlines()]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of the config."""
    folder = tmp_path_factory.mktemp("pair")
    ended = subprocess.run(command(folder, folder / "out"), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return folder / "out"


def test_two_processes_end_with_the_weights_of_one(pair: Path, tmp_path: Path) -> None:
    experiment = config.from_dict(raw())
    bench.train(experiment, tmp_path, DIGITS, device=CPU)
    start = bench.build_model(experiment.models[0], DIGITS).state_dict()
    assert (weights(pair, "sharp")["head.weight"] - start["head.weight"]).abs().max() > 1e-2, "it has trained"
    for name in NAMES:
        one, two = weights(tmp_path, name), weights(pair, name)
        assert one.keys() == two.keys()
        for key in one:  # found: at most 1.3e-6; rounding, which training makes larger step by step
            torch.testing.assert_close(two[key], one[key], atol=1e-4, rtol=0)
        assert len(log(pair, name)) == 2, "one process writes"
        for alone, together in zip(log(tmp_path, name), log(pair, name), strict=True):
            assert together.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-4)
            assert together.pop("seconds") > 0 < alone.pop("seconds")
            # 1,200 and 197 images: a difference of rounding may turn one of them
            for key in ("train_accuracy", "validation_accuracy"):
                assert together.pop(key) == pytest.approx(alone.pop(key), abs=0.021)
            assert together == alone
        card, card_alone = (bench.read_card(out / "models" / name) for out in (pair, tmp_path))
        assert card["identity"] == card_alone["identity"], "how many processes is no part of what was trained"
        assert (card["processes"], card_alone["processes"]) == (2, 1)
        assert {path.name for path in (pair / "models" / name).iterdir()} == {WEIGHTS, LOG, bench.CARD}


def raw() -> dict[str, Any]:
    return tomllib.loads(CONFIG.format(more=""))


def processes_of(launcher: int) -> dict[int, int]:
    """rank -> process id, of the processes that torchrun has started."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        ranks = [int(variable[5:]) for variable in variables if variable.startswith(b"RANK=")]
        found |= dict.fromkeys(ranks, int(child))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks at processes as Linux shows them")
def test_a_killed_process_ends_all_and_the_same_command_goes_on(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    parts = command(tmp_path, out, "checkpoint_seconds = 1e-9", harmed=True)
    state = out / "models" / "flexible" / STATE
    with (
        (tmp_path / "errors").open("w") as errors,
        subprocess.Popen(parts, stderr=errors, env=os.environ | {"HARM": "hold"}) as launcher,
    ):
        while not state.exists():
            assert launcher.poll() is None
            time.sleep(0.002)
        ranks = processes_of(launcher.pid)
        os.kill(ranks[1], signal.SIGKILL)
        assert launcher.wait(timeout=200) != 0
    for process in ranks.values():
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert not (state.parent / WEIGHTS).exists()
    tensors, metadata = checkpoints.read_tensors(state)
    assert 0 < metadata["progress"]["step"] <= 10
    metadata["progress"]["seconds"] += 1000  # a mark: a training from the start would not know of it
    checkpoints.write_tensors(state, tensors, metadata)
    ended = subprocess.run(parts, capture_output=True, text=True, check=False, env=os.environ | {"HARM": "none"})
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert bench.read_card(state.parent)["seconds"]["train"] > 1000
    all_as(pair, out)


def all_as(pair: Path, out: Path) -> None:
    for name in NAMES:
        assert (out / "models" / name / WEIGHTS).read_bytes() == (pair / "models" / name / WEIGHTS).read_bytes()
        assert [line["step"] for line in log(out, name)] == [8, 16]


@pytest.mark.skipif(not README.exists(), reason="no README beside the tests (not a checkout)")
def test_the_command_of_the_readme(tmp_path: Path) -> None:
    lines = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("torchrun ")]
    (line,) = lines
    (tmp_path / "CONFIG").write_text(CONFIG.format(more="").replace("epochs = 2", "epochs = 1"))
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    words = shlex.split(line)
    assert shutil.which(words[0], path=beside) == str(Path(sys.executable).parent / "torchrun")
    ended = subprocess.run(
        line, shell=True, cwd=tmp_path, env=os.environ | {"PATH": beside}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert all(bench.read_card(tmp_path / "OUT" / "models" / name)["processes"] == 2 for name in NAMES)


MEMBER = """
import sys
import time
from pathlib import Path

import torch
from robustflow.distributed import joined
from robustflow.errors import UserError

with joined(torch.device("cpu")) as group:
    mine = group.rank + 1.0
    assert group.total(mine, 10) == [3.0, 20.0]
    one, two = torch.full((2, 3), mine), torch.full((4, 2, 3, 3), 2 * mine).to(memory_format=torch.channels_last)
    two[:, 1] = group.rank
    group.average_([one, two])
    assert one.eq(1.5).all() and two[:, 0].eq(3).all() and two[:, 1].eq(0.5).all()
    kept, strided = torch.full((3,), mine), torch.full((3, 2), mine, requires_grad=True)
    group.spread_([kept, strided.T])
    assert kept.eq(1).all() and strided.eq(1).all()
    group.agree(7, "this")
    first = Path(sys.argv[1])
    with group.leader_first():
        if group.leads:
            time.sleep(0.2)
            first.touch()
        else:
            assert first.exists()
    try:
        group.agree(7 + group.rank, "that")
    except UserError as error:
        print(error)
"""


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    # As torchrun does: the meeting place is its own, so that its port is free and stays so.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(tmp_path / "first")],
            env=shared | {"RANK": str(rank), "TORCHELASTIC_RUN_ID": "test"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for member in members:
        output, errors = member.communicate(timeout=120)
        assert member.returncode == 0, errors
        assert output == "the processes do not see the same of that: put --out where every machine sees it\n"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"batch_size": 151}, r"^batch_size 151 does not divide by 2 processes: [^\n]*$"),
        ({"regime": "resnet"}, r"^batch normalisation is [^\n]* in one process[^\n]*--model$"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_cannot_be_shared_out_is_one_line_before_any_training(
    change: dict[str, Any], line: str, rank: int, tmp_path: Path
) -> None:
    plain = raw()
    last = {"name": "last", "regime": "sharp", **change, "train": {}}
    if "batch_size" in change:
        last["train"] = {"batch_size": last.pop("batch_size")}
    plain["models"].append(last)
    experiment = config.from_dict(plain)
    with pytest.raises(UserError, match=line):
        bench.train(experiment, tmp_path / "out", DIGITS, device=CPU, group=Group(rank, 2))
    assert not (tmp_path / "out").exists()


def test_parts_are_the_batch() -> None:
    model, batch = torch.nn.Linear(1, 1), torch.arange(12)
    assert torch.equal(torch.cat([batch[Group(rank, 3).part(model, 12)] for rank in range(3)]), batch)
    assert ALONE.part(torch.nn.BatchNorm2d(1), 7) == slice(0, 7)


def test_commands_that_cannot_share_out_their_work_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    assert cli.main(["bench", "quickstart", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("robustflow: under torchrun only `robustflow train` works")
    assert cli.main(["train", "quickstart", "--out", str(tmp_path / "out"), "--seeds", "0,1"]) == 2
    error = capsys.readouterr().err
    assert error == "robustflow: --seeds and --executor start processes of their own: leave torchrun out\n"
    assert not (tmp_path / "out").exists()


def test_more_processes_than_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "9", "RANK": "8", "LOCAL_RANK": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(UserError, match="more than the 8 GPUs"), joined(torch.device("cuda")):
        pass
