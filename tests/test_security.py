"""Hostile files: refused or escaped, in one line, before they cost anything. Others' tests of the same kind:
test_checkpoints (pickles, truncation), test_config (wrong values), test_report (hostile text), test_results (names)."""

from __future__ import annotations

import builtins
import json
import pickle
import resource
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import robustflow
from robustflow import checkpoints, cli, config, model_cards, models
from robustflow.errors import UserError
from robustflow.report import build_report

Make = Callable[..., Path]
MARKUP = "<img src=x onerror=alert(1)>'\"&`|</script>"


@pytest.fixture
def folder(make_trained: Make, tmp_path: Path) -> Path:
    return make_trained(tmp_path / "out")


def change(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | changes))


def plant(folder: Path, content: bytes) -> None:
    """Weights of the attacker's, with a card that vouches for them: a hash protects from accidents alone."""
    (folder / "model.safetensors").write_bytes(content)
    change(folder, sha256=checkpoints.sha256(folder / "model.safetensors"))


def one_line(action: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def commanded(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says: one line, and exit code 2."""
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("robustflow: ")
    assert told.count("\n") == 1
    assert len(told) < 1000
    return told


# --------------------------------------------------------------------------------------------- checkpoints
class Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return builtins.open, (str(self.path), "w")


def test_a_pickle_under_another_name_is_not_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "executed"
    plant(folder, pickle.dumps(Planted(trace)))
    one_line(lambda: robustflow.load_model(folder), "not a whole safetensors file")
    told = commanded(["export", str(folder), "--format", "torch", "--out", str(tmp_path / "x")], capsys)
    assert "not a whole safetensors file" in told
    assert not trace.exists()


def header(**tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


HEADERS: dict[str, bytes] = {
    "a header longer than the file": struct.pack("<Q", 2**62) + b"{}",
    "offsets behind the end": header(w={"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}),
    "a shape without its bytes": header(w={"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 0]}),
    "a shape that overflows": header(w={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}),
    "a negative size": header(w={"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}) + b"\0" * 4,
    "an unknown type": header(w={"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 4]}) + b"\0" * 4,
    "no JSON": struct.pack("<Q", 8) + b"[[[[[[[[",
    "deep nesting": struct.pack("<Q", 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("kind", list(HEADERS))
def test_declared_sizes_are_not_believed(kind: str, folder: Path) -> None:
    plant(folder, HEADERS[kind])
    tracemalloc.start()
    one_line(lambda: robustflow.load_model(folder), "not a whole safetensors file")
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    one_line(lambda: checkpoints.read_tensors(folder / "model.safetensors"), "not a whole safetensors file")


def test_metadata_is_no_way_in(folder: Path) -> None:
    tensors, _ = checkpoints.read_tensors(folder / "model.safetensors")
    from safetensors.torch import save_file

    for told in ("{", "[" * 100_000):
        save_file(tensors, folder / "model.safetensors", {"robustflow": told})
        one_line(lambda: checkpoints.read_tensors(folder / "model.safetensors"), "not a whole safetensors file")


def test_names_of_tensors_are_shown_on_one_short_line(folder: Path) -> None:
    tensors, _ = checkpoints.read_tensors(folder / "model.safetensors")
    for name in ("\n\x1b[31mred", "a" * 100_000, "__class__"):
        checkpoints.write_tensors(folder / "model.safetensors", tensors | {name: torch.zeros(1)})
        change(folder, sha256=checkpoints.sha256(folder / "model.safetensors"))
        with pytest.raises(UserError, match="this model has no tensor") as caught:
            robustflow.load_model(folder)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"channels": [10**6, 10**6]}, "another architecture"),
        ({"channels": [2**40]}, "another architecture|cannot be built"),
        ({"channels": [2**62, 2**62]}, "another architecture|cannot be built"),
        ({"channels": [10**30]}, "cannot be built|not the card"),
        ({"channels": [4] * 100_000}, "for 100000 blocks"),
        ({"layers": 10**9}, "tensors for 2 blocks with 2000000000 layers"),
        ({"dense": 2**50, "dense_layers": 2}, "another architecture|cannot be built"),
        ({"dense": 16, "dense_layers": 10**9}, "layers$"),
        ({"kernel_size": 2**31 + 1}, "another architecture|cannot be built"),
    ],
)
@pytest.mark.parametrize("regime", ["sharp", "naive", "resnet"])
def test_absurd_sizes_in_a_card_take_no_memory(
    regime: str, network: dict[str, Any], message: str, make_trained: Make, tmp_path: Path
) -> None:
    folder = make_trained(tmp_path, regime)
    stored = json.loads((folder / "card.json").read_text())["config"]
    change(folder, config=stored | {"network": stored["network"] | network})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if regime == "resnet" and not {"channels"} & network.keys():
        assert robustflow.load_model(folder)  # it has no such option: nothing to be absurd
    else:
        one_line(lambda: robustflow.load_model(folder), message)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


def test_absurd_shapes_of_images_take_no_memory(make_trained: Make, tmp_path: Path) -> None:
    folder = make_trained(tmp_path, "naive")
    names = ["a"] * 10
    for shape in ([1, 2**16, 2**16], [2**16, 8, 8], [10**9, 8, 8], [1, 2**62, 2**62], [1, 10**40, 8]):
        change(folder, data={"input_shape": shape, "class_names": names})
        one_line(lambda: robustflow.load_model(folder), "another architecture|cannot be built|three sizes up to")


def test_nested_and_odd_cards(folder: Path) -> None:
    card = (folder / "card.json").read_text()
    for text, message in (
        ("[" * 100_000, "cannot be read as JSON"),
        ("[]", "is not the card of a model"),
        ("null", "is not the card of a model"),
        (card.replace('"name"', '"nome"', 1), "is not the card of a model: name"),
        (card.replace('"regime": "sharp"', '"regime": "os.system"'), "is not the card of a model: regime"),
        (card.replace('"sharp"', '"../../sharp"'), "is not the card of a model: name"),
    ):
        (folder / "card.json").write_text(text)
        one_line(lambda: robustflow.load_model(folder), message)


# ---------------------------------------------------------------------------------------------- names and paths
STRANGE = ["../secret/models/m", "out/../../secret", "/etc/passwd", "a\0b", "~root", "x" * 100_000, ""]


@pytest.mark.parametrize("name", STRANGE, ids=lambda name: repr(name[:30]))
def test_names_lead_nowhere_else(
    name: str, make_trained: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    make_trained(work / "results" / "out")
    make_trained(tmp_path / "secret", name="m")
    monkeypatch.chdir(work / "results")
    monkeypatch.setenv(models.ENVIRONMENT_VARIABLE, str(work / "results"))
    assert list(robustflow.list_trained()) == ["out/sharp"]
    if name.startswith("../"):  # a path of the user's own that does not exist from here
        assert not Path(name).exists()
    one_line(lambda: robustflow.load_model(name), "no trained model")
    commanded(["compare", name, name], capsys)
    commanded(["describe", name], capsys)


ELSEWHERE = ["../../evil", "a/b", "..", ".hidden", "a\\b", "a\0b", "a\nb", "x" * 65, "", "-rf"]


@pytest.mark.parametrize("name", ELSEWHERE, ids=repr)
def test_a_config_cannot_name_files_elsewhere(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model's name becomes a directory: with separators, or hidden, it is refused before anything is made."""
    path = tmp_path / "evil.toml"
    text = Path(config.find("quickstart")).read_text(encoding="utf-8")
    first = config.read("quickstart").models[0].name
    path.write_text(text.replace(f'"{first}"', json.dumps(name), 1), encoding="utf-8")
    told = commanded(["train", str(path), "--out", str(tmp_path / "out")], capsys)
    assert "models.0.name: " in told
    assert {entry.name for entry in tmp_path.iterdir()} == {"evil.toml"}


# ------------------------------------------------------------------------------------------------------- configs
def test_hostile_configs_are_one_short_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, deep = tmp_path / "executed", 20_000
    good = Path(config.find("quickstart")).read_text(encoding="utf-8")
    for name, text, message in (
        ("key.toml", "k" * 10_000_000 + " = 1\n", "not a config"),
        ("long.toml", "k" * 50_000 + " = 1\n" + good, "unknown key 'kkk"),
        ("table.toml", good + "[" + ".".join("a" * 5_000) + "]\n", "unknown key 'a'"),
        ("deep.toml", "title = " + "[" * deep + "]" * deep, "cannot be read as TOML"),
        ("inline.toml", "title = " + "{a=" * deep + "1" + "}" * deep, "cannot be read as TOML"),
        ("number.toml", "seed = " + "9" * 50_000 + "\n" + good, "cannot be read as TOML"),
        ("types.toml", 'title = ["t"]\ndataset = {}\nmodels = 7\n', "title: .*string"),
        ("tag.yaml", f"!!python/object/apply:builtins.open ['{trace}', 'w']\n", "cannot be read as TOML"),
        ("tag.yml", "title: !!python/name:os.system\n", "cannot be read as TOML"),
        ("red.toml", '"\\n\\u001b[31mred" = 1\n' + good, "unknown key"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            config.read(tmp_path / name)
        assert "\n" not in str(caught.value), name
        assert str(caught.value).isprintable(), name
        assert len(str(caught.value)) < 500 + len(str(tmp_path)), name
        commanded(["bench", str(tmp_path / name), "--out", str(tmp_path / "out")], capsys)
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------- pages
@pytest.mark.parametrize("where", ["title", "name", "class", "attack"])
def test_markup_is_text_in_a_report(
    where: str, make_benchmark: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustflow.report.draw", lambda benchmark, summary: [])
    safe = MARKUP.replace("/", "")  # a name with a separator is refused already
    out = make_benchmark(tmp_path / "out", names=["fine", safe] if where == "name" else ["fine"], n=30)
    evaluation = out / "evaluations" / "digits-test"
    if where == "title":
        told = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(told | {"title": MARKUP, "name": MARKUP}))
    elif where == "class":
        told = json.loads((evaluation / "evaluation.json").read_text())
        changes = {"class_names": [MARKUP] * 10, "dataset": MARKUP}
        (evaluation / "evaluation.json").write_text(json.dumps(told | changes))
    elif where == "attack":
        told = json.loads((evaluation / "fine.json").read_text())
        (evaluation / "fine.json").write_text(json.dumps(told | {"forward_passes": {MARKUP: 3}, "warnings": [MARKUP]}))
    page = build_report(out).read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert page.count("</script>") == 1
    assert "&lt;img src=x" in page


def test_markup_is_text_in_a_model_card(folder: Path) -> None:
    change(folder, description=MARKUP + "\n# heading\n[link](http://x)", data={"dataset": "digits", "train_n": MARKUP})
    text = model_cards.to_markdown(model_cards.describe(folder))
    assert text.count("\\<img src=x") == text.count("<img") == 2
    assert "\n# heading" not in text
    assert "\\[link\\](http" in text
