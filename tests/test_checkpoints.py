"""Files that are whole or not there, and that nobody unpickles."""

from __future__ import annotations

import builtins
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustflow import checkpoints, create_model
from robustflow.errors import UserError


def network(**options: Any) -> nn.Module:
    return create_model("sharp", **({"input_shape": (1, 8, 8), "channels": (4,), "layers": 2} | options))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    checkpoints.write_tensors(path, network().state_dict())
    return path


def refused(path: Path, message: str, **options: Any) -> None:
    """One line, and the model is as it was."""
    torch.manual_seed(1)
    model = network(**options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        checkpoints.load_weights(model, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated(saved: Path, kept: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: kept if isinstance(kept, int) else int(len(whole) * kept)])
    refused(saved, "not a whole safetensors file")


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "missing")


class Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return builtins.open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_pickle_is_refused_and_not_run(saved: Path, tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "executed"
    if kind == "pickle":
        saved.write_bytes(pickle.dumps(Planted(trace)))
    else:
        torch.save({"weight": Planted(trace)}, saved)
    refused(saved, "not a whole safetensors file")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": (8,)}, r"another architecture: .* is \(.*\), not \("),
        ({"channels": (4, 4)}, "another architecture: the checkpoint has no tensor"),
        ({"layers": 0}, "another architecture: this model has no tensor"),
        ({"kernel_size": 5}, "another architecture"),
    ],
)
def test_another_architecture(saved: Path, options: dict[str, Any], message: str) -> None:
    refused(saved, message, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers(saved: Path, value: float) -> None:
    tensors, _ = checkpoints.read_tensors(saved)
    tensors["head.weight"][1, 2] = value
    checkpoints.write_tensors(saved, tensors)
    refused(saved, "NaN or infinite values in head.weight")


def test_tensors_and_metadata_round_trip(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(2, 3).t(),
        "b": torch.tensor(3),
        "c": torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last),
    }
    metadata = {"identity": "x", "progress": {"step": 3, "seconds": 0.1}}
    checkpoints.write_tensors(tmp_path / "new" / "t", tensors, metadata)
    found, described = checkpoints.read_tensors(tmp_path / "new" / "t")
    assert described == metadata
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert (
        checkpoints.sha256(tmp_path / "new" / "t") == hashlib.sha256((tmp_path / "new" / "t").read_bytes()).hexdigest()
    )


@pytest.mark.parametrize("kind", ["text", "json", "tensors", "replace"])
def test_a_failing_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    if kind == "text":
        monkeypatch.setattr(Path, "write_text", fail)
        with pytest.raises(RuntimeError):
            checkpoints.write_text(path, "new")
        monkeypatch.undo()
    elif kind == "json":
        with pytest.raises(ValueError, match="JSON"):
            checkpoints.write_json(path, {"value": float("nan")})
    elif kind == "tensors":

        def half(tensors: Any, where: Any, metadata: Any) -> None:
            Path(where).write_bytes(b"half")
            fail()

        monkeypatch.setattr(checkpoints, "save_file", half)
        with pytest.raises(RuntimeError):
            checkpoints.write_tensors(path, {"a": torch.zeros(1)})
    else:
        monkeypatch.setattr(checkpoints.os, "replace", fail)
        with pytest.raises(RuntimeError):
            checkpoints.write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot write to [^\n]*$"):
        checkpoints.write_text(tmp_path / "file" / "deep" / "a.json", "text")


def test_json(tmp_path: Path) -> None:
    checkpoints.write_json(tmp_path / "a.json", {"ε": [1.5, None, "x"]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ε": [1.5, None, "x"]}
    assert checkpoints.read_json(tmp_path / "a.json") == {"ε": [1.5, None, "x"]}
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"a\.json cannot be read as JSON"):
        checkpoints.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"b\.json is missing"):
        checkpoints.read_json(tmp_path / "b.json")
    assert checkpoints.finite(2.5) == 2.5
    assert checkpoints.finite(float("inf")) is None


@pytest.mark.parametrize(
    "build",
    [
        lambda p: torch.optim.SGD(p, 0.1, 0.9),
        lambda p: torch.optim.NAdam(p, 0.1),
        lambda p: torch.optim.Muon(p, 0.1),
    ],
)
def test_an_optimizer_s_state_goes_on_where_it_was(build: Any) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 4))
    gradients = [torch.randn(3, 4) for _ in range(6)]
    optimizer = build([weight])
    for number, gradient in enumerate(gradients):
        if number == 3:
            packed = checkpoints.pack_optimizers([optimizer])
            packed = {name: tensor.clone() for name, tensor in packed.items()}
            copy = nn.Parameter(weight.detach().clone())
            other = build([copy])
            checkpoints.unpack_optimizers([other], packed)
        weight.grad = gradient
        optimizer.step()
        if number >= 3:
            copy.grad = gradient
            other.step()
    assert torch.equal(weight, copy)
    assert all(name.startswith("optimizer.0.0.") for name in packed)
