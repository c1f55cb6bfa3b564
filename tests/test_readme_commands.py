"""Every robustflow command of the README runs, in its order and as it stands, on networks and data in miniature."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file
from torch import nn

from robustflow import cli, config
from robustflow.config import Experiment

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="no README beside the tests (not a checkout)")

FACTORY = """
from torch import nn

def factory():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
"""


def shell_lines() -> list[list[str]]:
    """The words of every robustflow command in the README's sh blocks; torchrun has tests of its own."""
    text = README.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words for words in commands if words and words[0].rsplit("/", 1)[-1] == "robustflow"]


def small(experiment: Experiment) -> Experiment:
    """The same models and stages with few channels, one epoch and a few images."""
    raw = experiment.model_dump(mode="json")
    raw["models"] = raw["models"][:2]
    for model in raw["models"]:
        model["network"] |= {"channels": [4, 8], "layers": 2, "dense": min(8, model["network"]["dense"])}
        model["train"] |= {"epochs": 1, "batch_size": 16}
    raw["evaluate"] |= {"images": 4, "attacks": ["paper"]}
    return Experiment.model_validate(raw, strict=False)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the reader stands: the committed results, a small CIFAR-10, a module of their own."""
    (tmp_path / "results").symlink_to(ROOT / "results")
    (tmp_path / "DIR").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (110, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(110) % 10
    np.savez(tmp_path / "DIR" / "cifar10.npz", x_train=pixels[:100], y_train=labels[:100], x_test=pixels[100:],
             y_test=labels[100:])  # fmt: skip
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "module.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("ROBUSTFLOW_DATA", str(tmp_path / "DIR"))
    read = config.read
    monkeypatch.setattr(config, "read", lambda path: small(read(path)))
    return tmp_path


def test_every_command_runs(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)).state_dict(), directory / "FILE.safetensors")
    seen: set[str] = set()
    for words in shell_lines():
        command = words[1]
        # Commands of one block share OUT: what `train` wrote is certified, attacked and reported.
        out = {"compare": "compared", "evaluate": "evaluated"}.get(command, f"OUT-{'--seeds' in words}")
        out = "system" if "structured/NAME" in words else out
        named = {"CONFIG": "cifar10/cpu", "OUT": out, "structured/NAME": "structured/talk-mass"}
        arguments = [named.get(word, word) for word in words[1:]]
        if "--workers" in arguments:
            arguments[arguments.index("--workers") + 1] = "2"
        assert cli.main(arguments) == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"
        seen.add(command)
    commands = {"bench", "train", "certify", "attack", "report", "evaluate", "compare", "describe", "export", "list"}
    assert seen >= commands, f"the README shows no {commands - seen}"
    assert (directory / "OUT-False" / "report.html").exists()
    assert (directory / "sharp.onnx").exists()
