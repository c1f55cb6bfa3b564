"""SIGKILL at random moments, 20 times in a row, and the table is that of an undisturbed run.

The moments are told by progress, not by the clock: so many further files, then a few milliseconds. A process that is
too quick for that is held a few files later, so that every kill meets unfinished work on any machine.
"""

from __future__ import annotations

import multiprocessing
import random
import runpy
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

SHARDS = 72
SCRIPT = """
import os, signal, time
from pathlib import Path

import torch
from torch import nn

from attacks import shard_files, sharded_sweep

folder = Path(os.environ["KILL_TEST_FOLDER"])
moment, hold = os.environ["KILL_TEST_MOMENT"], int(os.environ["KILL_TEST_HOLD"])
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
images = torch.rand(144, 1, 8, 8)
labels = model(images).argmax(dim=1)

honest, written = shard_files.os.replace, 0
def replace(source, target):
    global written
    if moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if written == hold:
        time.sleep(250)  # until it is killed
        os._exit(1)
    honest(source, target)
    written += 1
    if moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)
shard_files.os.replace = replace

how = {"executor": os.environ["KILL_TEST_EXECUTOR"], "workers": 2}
result = sharded_sweep(model, images, labels, [0.03, 0.06, 0.1], folder=folder / "shards", shard_size=2, **how)
rows = result.samples.to_csv(index=False)
(folder / "rows.csv").write_text(rows)
torch.save(result.adversarials, folder / "adversarials.pt")
(folder / "passes.txt").write_text(repr(result.forward_passes))
"""


def start(folder: Path, executor: str = "serial", *, moment: str = "", hold: int = -1) -> Any:
    """A process of its own, forked from one that has done the slow imports; held before file number ``hold``."""
    # The environment is handed over by a line on top: the process that forks has kept the one of its own start.
    folder.mkdir(exist_ok=True)
    own = folder / f"run{moment}.py"
    values = {"FOLDER": str(folder), "MOMENT": moment, "HOLD": str(hold), "EXECUTOR": executor}
    variables = {f"KILL_TEST_{key}": value for key, value in values.items()}
    own.write_text(f"import os\nos.environ.update({variables!r})\n" + SCRIPT)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["attacks"])
    process = server.Process(target=runpy.run_path, args=(str(own),))
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder)
    process.join()
    assert process.exitcode == 0
    return folder


@pytest.mark.parametrize(("executor", "kills"), [("serial", 20), ("workers", 2)])
def test_killed_again_and_again_it_ends_with_the_same_table(
    executor: str, kills: int, undisturbed: Path, tmp_path: Path
) -> None:
    folder, chance, done = tmp_path / "killed", random.Random(0), 0

    def count() -> int:
        return len(list((folder / "shards").glob("*.safetensors")))

    for number in range(kills):
        further = chance.randint(0, 3)
        moment = {3: "before", 7: "after"}.get(number, "") if executor == "serial" else ""
        process = start(folder, executor, moment=moment, hold=further + 2)
        if not moment:  # those two kill themselves around the replacing of a file
            while count() < done + further and process.is_alive():
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        before, done = done, count()
        least, most = {"": (further, further + 2), "before": (0, 0), "after": (1, 1)}[moment]
        assert before + least <= done <= before + most
        assert not (folder / "rows.csv").exists()
        if moment == "before":
            assert len(list((folder / "shards").glob(".*.partial"))) == 1
    assert 0 < done < SHARDS
    last = start(folder, executor)
    last.join()
    assert last.exitcode == 0
    assert len(list((folder / "shards").iterdir())) == SHARDS, "nothing half written is left"
    for name in ("rows.csv", "adversarials.pt", "passes.txt"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    rows = pd.read_csv(folder / "rows.csv", keep_default_na=False)
    assert rows["index"].tolist() == list(range(2 * SHARDS))
    assert rows["attack"].nunique() > 1
