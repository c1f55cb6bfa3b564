"""A mistake on the command line or a file that is no data costs one line, which says where help is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from robustflow import cli, data
from robustflow.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "command", "what"),
    [
        ([], "robustflow", "COMMAND"),
        (["trian"], "robustflow", "invalid choice: 'trian'"),
        (["train"], "robustflow train", "CONFIG"),
        (["train", "quickstart", "--seed", "x"], "robustflow train", "--seed: a seed is a whole number"),
        (["bench", "quickstart", "--seeds", "0,0"], "robustflow bench", "every seed once"),
        (["bench", "quickstart", "--seed", "1", "--seeds", "2"], "robustflow bench", "not allowed with"),
        (["attack", "out", "--executor", "cloud"], "robustflow attack", "invalid choice: 'cloud'"),
        (["evaluate"], "robustflow evaluate", "--model"),
        (["evaluate", "--model", "a:b", "--images", "many\nlines"], "robustflow evaluate", "invalid int value"),
        (["measure", "speed", "--out", "out"], "robustflow measure", "invalid choice: 'speed'"),
        (["list", "--all"], "robustflow", "unrecognized arguments: --all"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], command: str, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"{command}: error: ")
    assert line.endswith(f"; see `{command} --help`")
    assert what in line
    assert printed.out == ""


def test_help_is_still_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    assert "usage: robustflow train" in capsys.readouterr().out


def objects() -> np.ndarray:
    made = np.empty(20, dtype=object)
    made[:] = 1
    return made


@pytest.mark.parametrize("kind", ["garbage", "empty", "array", "objects"])
def test_a_file_that_is_no_data_is_told_in_our_words(kind: str, tmp_path: Path) -> None:
    """numpy's own line advises to load what it cannot read "unsafely using allow_pickle"."""
    path = tmp_path / "cifar10.npz"
    if kind == "objects":
        np.savez(path, x_train=objects(), y_train=objects(), x_test=objects(), y_test=objects())
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes(b"garbage" * 100 if kind == "garbage" else b"")
    with pytest.raises(UserError, match=r"cifar10\.npz cannot be read as an array file[^\n]*numpy\.savez") as caught:
        data.load("cifar10", tmp_path)
    for word in ("pickle", "unsafe", "trust", "attribute", "\n"):
        assert word not in str(caught.value)
