"""Exports give the logits of the original, for any batch size, without a class of ours."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import robustflow
from robustflow import checkpoints, cli, create_model, export
from robustflow.errors import UserError
from robustflow.networks import Classifier

OURS = {
    "sharp": {"kernel": "patch", "lift": "patch", "dense": 16, "dense_layers": 2, "mirror": True},
    "nonexpansive": {"mirror": True},
    "prescribed": {"kernel": "patch", "lift": "patch"},
    "flexible": {},
    "naive": {},
    "unconstrained": {},
    "resnet": {},
    "shared": {},
    "cpl": {},
    "sll": {},
    "aol": {},
    "cayley": {},
}


def network(regime: str) -> Classifier:
    torch.manual_seed(3)
    shape = (1, 8, 8)
    model = create_model(regime, input_shape=shape, channels=(4, 8), layers=2, mean=(0.3,), std=(0.5,), **OURS[regime])  # type: ignore[arg-type]
    with torch.no_grad():
        model(torch.rand(64, *shape))  # running statistics that are not 0 and 1
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.uniform_(-0.2, 0.2)  # zeros would hide a bias that is lost
    return model.eval()


def images(count: int) -> Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(4))


def close(found: Tensor, expected: Tensor) -> bool:
    difference = (found - expected).abs().max() / expected.abs().max().clamp_min(1.0)
    return found.shape == expected.shape and bool(difference <= 1e-5)


def test_every_model_that_there_is_is_exported_here() -> None:
    assert set(OURS) == set(robustflow.list_models())


@pytest.mark.parametrize("regime", list(OURS))
def test_plain_module(regime: str) -> None:
    model = network(regime)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = export.to_plain(model)
    with torch.no_grad():
        for count in (1, 2, 9):
            assert close(plain(images(count)), model(images(count)))
        if regime != "cayley":  # the frequencies of its inverse are traced in float32
            twin = copy.deepcopy(plain).double()
            assert torch.allclose(twin(images(3).double()), model.double()(images(3).double()), rtol=0, atol=1e-12)
            model.float()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "left as it was"
    assert not any(type(part).__module__.startswith("robustflow") for part in plain.modules())
    assert not plain.train().eval().training
    x = images(2).requires_grad_()
    theirs, ours = (torch.autograd.grad(one(x).square().sum(), x)[0] for one in (plain, model))
    assert torch.allclose(theirs, ours, atol=1e-4)


def test_a_model_in_training_mode_is_exported_in_evaluation_mode() -> None:
    model = network("resnet")
    with torch.no_grad():
        expected = model(images(3))
        assert close(export.to_plain(model.train())(images(3)), expected)
    assert model.training


def test_parametrisations_are_baked_in() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), parametrizations.orthogonal(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 10))
    plain = export.to_plain(model, (1, 8, 8))
    assert sorted(name for name, _ in plain.named_parameters()) == ["1.bias", "1.weight", "3.bias", "3.weight"]
    with torch.no_grad():
        assert close(plain(images(4)), model(images(4)))
    assert hasattr(model[1], "parametrizations"), "the original keeps them"


def test_a_program_runs_where_robustflow_is_not_installed(tmp_path: Path) -> None:
    model = network("sharp")
    assert export.save(model, tmp_path / "m.pt2", "torch") <= 1e-5
    x = images(5)
    checkpoints.write_tensors(tmp_path / "x.safetensors", {"x": x, "logits": model(x).detach()})
    code = (
        "import sys; sys.modules['robustflow'] = None\n"  # importing it raises
        "import torch; from safetensors.torch import load_file\n"
        "told = load_file('x.safetensors'); m = torch.export.load('m.pt2').module()\n"
        "assert (m(told['x']) - told['logits']).abs().max() <= 1e-5\n"
        "assert (m(told['x'][:1]) - told['logits'][:1]).abs().max() <= 1e-5\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("regime", list(OURS))
def test_torch_export(regime: str, tmp_path: Path) -> None:
    model = network(regime)
    assert export.save(model, tmp_path / "m.pt2", "torch") <= 1e-5
    read = torch.export.load(tmp_path / "m.pt2").module()
    with torch.no_grad():
        for count in (1, 6):
            assert close(read(images(count)), model(images(count)))


@pytest.mark.parametrize("regime", [name for name in OURS if name != "cayley"])
def test_onnx(regime: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'robustflow[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'robustflow[export]'")
    model = network(regime)
    assert export.save(model, tmp_path / "m.onnx", "onnx") <= 1e-5
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"], "one file, weights included"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, made.name) == ("images", "logits")
    assert isinstance(given.shape[0], str)  # a batch of any size
    for count in (1, 6):
        found = torch.from_numpy(session.run(None, {"images": images(count).numpy()})[0])
        assert close(found, model(images(count)).detach())


def test_onnx_has_no_complex_inverse(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="pip install 'robustflow[export]'")
    with pytest.raises(UserError, match=r"^this model cannot be written as ONNX: [^\n]*linalg_inv[^\n]*$"):
        export.save(network("cayley"), tmp_path / "m.onnx", "onnx")
    assert not list(tmp_path.iterdir())


class Switch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if float(x.sum()) > 1 else -x.flatten(1)


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = network("naive"), tmp_path / "m"
    for action, message in (
        (lambda: export.save(model, out, "tflite"), "unknown format 'tflite': one of torch, onnx"),
        (lambda: export.to_plain(nn.Flatten()), "does not tell the shape of its images: give input_shape"),
        (lambda: export.save(Switch(), out, "torch", (1, 8, 8)), r"torch\.export cannot trace this Switch: "),
    ):
        with pytest.raises(UserError, match=message) as caught:
            action()
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"ONNX needs the package onnxscript: pip install 'robustflow\[export\]'"):
        export.save(model, out, "onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("naive")
    write = export._write_torch

    def wrong(traced: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], Tensor]:
        made = write(traced, path)
        return lambda x: made(x) + 1e-3

    monkeypatch.setattr(export, "_write_torch", wrong)
    (tmp_path / "m.pt2").write_text("of before")
    with pytest.raises(UserError, match=r"gives other logits than the model \(relative difference .*\): not kept"):
        export.save(model, tmp_path / "m.pt2", "torch")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("m.pt2", "of before")]


def test_the_command_writes_the_model_and_its_card(
    make_trained: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = make_trained(tmp_path, "naive"), tmp_path / "new" / "mine.pt2"
    assert cli.main(["export", str(folder), "--format", "torch", "--out", str(file)]) == 0
    assert "within" in capsys.readouterr().out
    card = json.loads(file.with_suffix(".json").read_text())
    assert card["export"]["sha256"] == checkpoints.sha256(file)
    assert card["limits"]
    plain = torch.export.load(file).module()
    assert close(plain(images(3)).detach(), robustflow.load_model(folder)(images(3)).detach())
    assert cli.main(["export", str(folder), "--format", "torch", "--out", str(tmp_path / "m.json")]) == 2
    assert "its card takes that name" in capsys.readouterr().err
    assert cli.main(["export", "nothing/here", "--format", "torch", "--out", str(tmp_path / "m.pt2")]) == 2
    assert not (tmp_path / "m.pt2").exists()
