"""What the documents promise: their examples and commands run, and the mistakes they speak of are found."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from attacks import ATTACKS, AttackInputError
from robustflow import cli, data, licences
from robustflow.errors import UserError
from robustflow.regimes import REGIMES
from robustflow.structured.catalogue import SYSTEMS

ROOT = Path(__file__).resolve().parent.parent
CONTRIBUTING = ROOT / "CONTRIBUTING.md"

pytestmark = pytest.mark.skipif(not CONTRIBUTING.exists(), reason="no documents beside the tests (not a checkout)")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


TEXT = text_of(CONTRIBUTING)
EXAMPLES = re.findall(r"^## (.*?)\n.*?<!-- mistake: (.*?) → (.*?) -->\n```python\n(.*?)^```$", TEXT, flags=re.M | re.S)


@pytest.fixture
def registries() -> Iterator[None]:
    """The examples register things: taken back afterwards, so that no other test meets them."""
    tables: tuple[dict[str, object], ...] = (data.DATASETS, REGIMES, ATTACKS, SYSTEMS)  # type: ignore[assignment]
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def run(example: str) -> None:
    torch.manual_seed(0)
    exec(compile(example, str(CONTRIBUTING), "exec"), {})


def test_each_extension_has_its_example() -> None:
    assert [title for title, *_ in EXAMPLES] == ["A step", "A regime", "An attack", "A dataset", "A system"]
    assert TEXT.count("```python") == len(EXAMPLES)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(("right", "wrong", "example"), [rest for _, *rest in EXAMPLES], ids=[e[0] for e in EXAMPLES])
def test_an_example_runs_and_its_mistake_is_found(right: str, wrong: str, example: str) -> None:
    run(example)
    assert example.count(right) == 1
    ATTACKS.pop("downhill", None)  # a name is taken once
    with pytest.raises((AssertionError, UserError, AttackInputError)):
        run(example.replace(right, wrong))


@pytest.mark.parametrize("name", sorted(data.DATASETS))
def test_every_dataset_keeps_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object) -> None:
        raise UserError(f"no {name}.npz, and tests download nothing")

    monkeypatch.setattr(data, "_download", no_network)
    try:
        images = data.load(name)
    except UserError as error:
        pytest.skip(f"not at hand: {error}")
    assert set(images.splits) == set(data.SPLITS)
    assert images.input_shape == data.INPUT_SHAPES[name]
    assert images.class_names == data.CLASS_NAMES[name]
    assert len(images.mean) == len(images.std) == images.input_shape[0]
    for split in images.splits.values():
        assert split.pixels.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.pixels.shape == (len(split), *images.input_shape[1:], images.input_shape[0])
        assert set(split.labels.tolist()) <= set(range(len(images.class_names)))
        assert split.pixels.float().std() > 10  # in [0, 255], not in [0, 1]
    if name != "cifar100":  # a hundred classes: a small copy may lack one
        assert len(images.splits["test"].labels.unique()) == len(images.class_names)


def commands(path: Path) -> list[str]:
    """The lines of a document's sh blocks and the commands inside its sentences, without comments."""
    text = text_of(path)
    shell = [
        line for block in re.findall(r"^```sh\n(.*?)^```$", text, flags=re.M | re.S) for line in block.splitlines()
    ]
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    inline = re.findall(r"`((?:robustflow|python -m|\.venv/bin/\S+) [^`\n]+)`", prose)
    return [part.split(" #")[0].strip() for line in [*shell, *inline] for part in line.split("&&") if part.strip()]


def robustflow_arguments(command: str) -> list[str] | None:
    words = shlex.split(command)
    return words[1:] if words and words[0].rsplit("/", 1)[-1] == "robustflow" else None


ALL = [(path.name, command) for path in (ROOT / "README.md", CONTRIBUTING) for command in commands(path)]
OURS = [(name, command) for name, command in ALL if robustflow_arguments(command) is not None]


def test_the_commands_are_seen() -> None:
    assert len([name for name, _ in OURS if name == "README.md"]) >= 6
    assert len([name for name, _ in ALL if name == "CONTRIBUTING.md"]) >= 11


@pytest.mark.parametrize(("name", "command"), OURS)
def test_every_robustflow_command_parses(name: str, command: str) -> None:
    arguments = robustflow_arguments(command)
    assert arguments is not None
    cli._parser().parse_args(arguments)


RUN = {command for _, command in OURS if shlex.split(command)[1] in ("list", "report")}
CHEAP = sorted(command for command in RUN if not command.endswith(" OUT"))


@pytest.mark.parametrize("command", CHEAP)
def test_cheap_commands_run(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a directory where `results` is a copy, so that a report is not written over the committed one."""
    arguments = robustflow_arguments(command)
    assert arguments
    if arguments[0] == "report":
        shutil.copytree(ROOT / arguments[1], tmp_path / arguments[1])
    elif (ROOT / "results").exists():
        (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out


def test_commands_of_other_programs_are_those_that_ci_runs() -> None:
    """Making an environment, all tests, lint, types: .ci/run does them. A choice of tests: its files hold tests."""
    ci = text_of(ROOT / ".ci" / "run") + text_of(ROOT / "README.md")
    for name, command in ALL:
        if name == "README.md" or (name, command) in OURS:
            continue
        if "pytest tests" in command:
            for place in command.split()[3:]:
                files = (ROOT / place).glob("test_*.py") if (ROOT / place).is_dir() else [ROOT / place]
                assert any(re.search(r"^def test_", text_of(file), flags=re.M) for file in files), place
        elif "robustflow.licences" in command:
            licences.main()
        else:
            program = command.replace("'.[test,lint]'", "'.[test]'")
            assert program in ci, f"{command}: neither a test nor .ci/run runs it"


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert target.startswith("http") or (ROOT / target).exists(), target
