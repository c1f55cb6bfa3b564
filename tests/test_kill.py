"""SIGKILL at random moments, 20 times in a row, and the table is that of an undisturbed run."""

from __future__ import annotations

import multiprocessing
import random
import runpy
import signal
import time
from pathlib import Path
from typing import Any

import pandas as pd

SCRIPT = """
import os, signal, sys
from pathlib import Path

import torch
from torch import nn

from attacks import shard_files, sharded_sweep

folder = Path(os.environ["KILL_TEST_FOLDER"])
moment = os.environ.get("KILL_TEST_MOMENT", "")
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
images = torch.rand(180, 1, 8, 8)
labels = model(images).argmax(dim=1)

honest = shard_files.os.replace
def replace(source, target):
    if moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    honest(source, target)
    if moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)
shard_files.os.replace = replace

result = sharded_sweep(model, images, labels, [0.03, 0.06, 0.1], folder=folder / "shards", shard_size=3)
rows = result.samples.to_csv(index=False)
(folder / "rows.csv").write_text(rows)
torch.save(result.adversarials, folder / "adversarials.pt")
(folder / "passes.txt").write_text(repr(result.forward_passes))
"""


def start(script: Path, folder: Path, moment: str = "") -> Any:
    """A process of its own, forked from one that has done the slow imports."""
    # The environment is handed over by a line on top: the process that forks has kept the one of its own start.
    folder.mkdir(exist_ok=True)
    own = folder / f"run{moment}.py"
    variables = {"KILL_TEST_FOLDER": str(folder), "KILL_TEST_MOMENT": moment}
    own.write_text(f"import os\nos.environ.update({variables!r})\n" + script.read_text())
    process = context().Process(target=runpy.run_path, args=(str(own),))
    process.start()
    return process


def context() -> Any:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["attacks"])
    return server


def test_killed_twenty_times_it_ends_with_the_same_table(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    started = time.monotonic()
    undisturbed = start(script, tmp_path / "undisturbed")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    whole = time.monotonic() - started
    shards = tmp_path / "killed" / "shards"
    chance = random.Random(0)
    done = [0]
    for number in range(20):
        process = start(script, tmp_path / "killed", {3: "before", 7: "after"}.get(number, ""))
        if number not in (3, 7):  # those two kill themselves around the replacing of a file
            process.join(chance.uniform(0, whole / 12))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "all was done before the last kill: the test is too slow to tell"
        done.append(len(list(shards.glob("*.safetensors"))) if shards.exists() else 0)
        assert done[-1] >= done[-2]
        if number == 3:
            assert len(list(shards.glob(".*.partial"))) == 1
    assert 0 < done[-1] < 60
    assert len(set(done)) > 4
    last = start(script, tmp_path / "killed")
    last.join()
    assert last.exitcode == 0
    assert len(list(shards.iterdir())) == 60, "nothing half written is left"
    for name in ("rows.csv", "adversarials.pt", "passes.txt"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes(), name
    rows = pd.read_csv(tmp_path / "killed" / "rows.csv", keep_default_na=False)
    assert rows["index"].tolist() == list(range(180))
    assert rows["attack"].nunique() > 1
