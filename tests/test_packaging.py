"""What an installed wheel must hold besides Python files."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robustflow import licences
from robustflow.environment import revision

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("autoattack", "export", "ray")  # for users; the others are for developers
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_configs_and_templates_are_part_of_the_wheel() -> None:
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"configs": "robustflow/configs"}
    assert set(wheel["packages"]) == {"robustflow", "attacks"}
    # hatch takes every file of a package that git does not ignore.
    templates = [str(path) for path in (ROOT / "robustflow" / "templates").iterdir()]
    assert len(templates) >= 3
    if shutil.which("git"):
        ignored = subprocess.run(
            ["git", "-C", str(ROOT), "check-ignore", *templates], check=False, capture_output=True, text=True
        )
        assert not ignored.stdout
    assert "exclude" not in wheel


def test_the_command_is_there() -> None:
    module, name = PROJECT["project"]["scripts"]["robustflow"].split(":")
    assert callable(getattr(importlib.import_module(module), name))


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Top-level names of the modules imported, and whether only inside a function or for the type checker."""
    if isinstance(node, ast.Import):
        yield from ((alias.name.split(".")[0], inside) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module.split(".")[0], inside
    inside |= isinstance(node, ast.FunctionDef) or (
        isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    for child in ast.iter_child_nodes(node):
        yield from imports(child, inside)


def declared(entries: list[str]) -> set[str]:
    return {re.split(r"[<>=! \[;]", entry)[0] for entry in entries}


def test_every_import_of_the_packages_is_a_declared_dependency() -> None:
    always = declared(PROJECT["project"]["dependencies"])
    extras = PROJECT["project"]["optional-dependencies"]
    optional = declared([entry for name in EXTRAS for entry in extras[name]])
    names = {"sklearn": "scikit-learn", "eagerpy": "foolbox", "markupsafe": "jinja2", "PIL": "matplotlib"}
    for path in [path for package in ("robustflow", "attacks") for path in (ROOT / package).rglob("*.py")]:
        for name, late in imports(ast.parse(path.read_text(encoding="utf-8"))):
            if name not in sys.stdlib_module_names and name not in ("robustflow", "attacks"):
                # What only an extra brings is imported where it is used: the rest works without it.
                assert names.get(name, name) in (always | optional if late else always), f"{path}: {name}"


needs_hatchling = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed: no wheel without a download"
)


def build(root: Path, to: Path, *kinds: str) -> list[str]:
    """Run the build backend on a source tree; the names of what it made."""
    to.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "hatchling", "build", *kinds, "-d", str(to)]
    subprocess.run(command, check=True, capture_output=True, cwd=root)
    return sorted(path.name for path in to.iterdir())


def names_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the source archive of this tree."""
    folder = tmp_path_factory.mktemp("dist")
    version = ast.literal_eval(re.findall(r"__version__ = (.*)", (ROOT / "robustflow/__init__.py").read_text())[0])
    made = build(ROOT, folder, "-t", "wheel", "-t", "sdist")
    assert made == [f"robustflow-{version}-py3-none-any.whl", f"robustflow-{version}.tar.gz"]
    return folder


@needs_hatchling
def test_the_wheel(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    held = names_of(wheel)
    for folder, prefix in (("robustflow", "robustflow"), ("attacks", "attacks"), ("configs", "robustflow/configs")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".j2", ".css", ".js", ".typed"):
                assert f"{prefix}/{path.relative_to(ROOT / folder)}" in held
    tops = {name.split("/")[0] for name in held}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"robustflow", "attacks"}
    assert any(name.endswith("licenses/LICENSE") for name in held)


@needs_hatchling
def test_the_source_archive_holds_no_results_and_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.split("/", 1)[1] for name in file.getnames()}
        file.extractall(tmp_path, filter="data")
    tops = {"robustflow", "attacks", "configs", "tests"}
    files = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "THIRD_PARTY.md"}
    files |= {"pyproject.toml", "PKG-INFO", ".gitignore"}
    assert {name.split("/")[0] for name in held} == tops | files
    (source,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    (again,) = build(source, tmp_path / "again", "-t", "wheel")
    assert names_of(tmp_path / "again" / again) == names_of(dist / again)


class Installed:
    """A new environment holding the wheel; everything runs from an empty directory, without the checkout's path."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self.bin, self.empty = folder / "venv" / "bin", folder / "empty"
        self.empty.mkdir()
        venv.create(folder / "venv", with_pip=False)
        python = str(self.bin / "python")
        command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
        subprocess.run([*command, str(wheel)], check=True, capture_output=True)
        # The dependencies come from the environment that runs the tests; its .pth files, and with them an editable
        # install of the checkout, are not followed from here.
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text("\n".join(dict.fromkeys(sysconfig.get_paths()[k] for k in PLACES)))

    def run(self, *command: str, **options: Any) -> str:
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        program = [str(self.bin / command[0]), *command[1:]]
        options = {"cwd": self.empty, "env": environment} | options
        result = subprocess.run(program, capture_output=True, text=True, check=False, **options)
        assert result.returncode == 0, f"{command}: {result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        return result.stdout


PLACES = ("purelib", "platlib")


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    (wheel,) = dist.glob("*.whl")
    return Installed(tmp_path_factory.mktemp("installed"), wheel)


PUBLIC = """
import importlib.metadata, importlib.resources, pathlib, sys
import torch, attacks, robustflow
from robustflow import config, data
from robustflow.structured import config as structured

here = pathlib.Path(sys.prefix).resolve()
for package in (robustflow, attacks):
    place = pathlib.Path(package.__file__).resolve()
    assert here in place.parents, place
    assert (place.parent / "py.typed").exists(), "not typed for others"
assert importlib.metadata.version("robustflow") == robustflow.__version__
for name in robustflow.__all__:
    getattr(robustflow, name)
configs = config.list_configs()
assert "quickstart" in configs and all(here in path.resolve().parents for path in configs.values()), configs
for name in configs:
    raw, origin = config.read_toml(name)
    structured.from_dict(raw, origin) if "system" in raw else config.from_dict(raw, origin)
test = data.load("digits").splits["test"].head(8)
model = robustflow.create_model("nonexpansive", input_shape=(1, 8, 8), channels=(4, 8), layers=1).eval()
result = robustflow.evaluate(model, test.images(), test.labels, epsilons=(0.1, 0.5))
assert (result.summary["certified"] <= result.summary["attacked"]).all()
print(result.summary.to_string())
"""


@needs_hatchling
def test_the_installed_package_from_an_empty_directory(installed: Installed) -> None:
    printed = installed.run("python", "-W", "error", "-c", PUBLIC)
    assert "certified" in printed
    listed = installed.run("robustflow", "list")
    assert "quickstart" in listed
    assert str(ROOT) not in listed
    assert not list(installed.empty.iterdir())  # looking leaves nothing behind


@needs_hatchling
def test_a_report_is_built_by_the_installed_package(installed: Installed, hand_benchmark: Path) -> None:
    """Templates, style and script are package data: this fails where one was left out of the wheel."""
    assert installed.run("robustflow", "report", str(hand_benchmark)).strip().endswith("report.html")
    assert "<table" in (hand_benchmark / "report.html").read_text(encoding="utf-8")


@needs_hatchling
def test_tests_of_the_public_interface_pass_against_the_installed_package(installed: Installed, tmp_path: Path) -> None:
    """The checkout's tests without the checkout: a copy of them is all there is beside the installed package."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    chosen = ["test_config.py", "test_certificate_inputs.py", "test_statistics.py", "attacks/test_contract.py"]
    chosen += ["test_bracket.py", "test_load_model.py", "test_compare.py", "test_export.py"]
    options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-W", "error", f"--rootdir={tmp_path}"]
    options += ["-k", "not test_onnx and not test_torch_export"]  # a third of the time: every regime, every format
    there = [str(tmp_path / "tests" / name) for name in chosen]
    printed = installed.run("python", "-m", "pytest", *options, "-c", os.devnull, *there, cwd=tmp_path)
    assert re.search(r"\d{2,} passed", printed)


@needs_hatchling
@pytest.mark.skipif("ROBUSTFLOW_NEWCOMER" not in os.environ, reason="downloads everything: set ROBUSTFLOW_NEWCOMER=1")
@pytest.mark.timeout(3600)
def test_a_newcomer_s_path(dist: Path, tmp_path: Path) -> None:
    """From an empty directory and the wheel: install, quickstart, load a model, evaluate one's own, open the report.

    ROBUSTFLOW_NEWCOMER=FILE.json keeps the seconds in a file, with what they were measured on.
    """
    (wheel,) = dist.glob("*.whl")
    kept = Path(os.environ["ROBUSTFLOW_NEWCOMER"]).resolve()
    model = ROOT / "results" / "cifar10" / "models" / "nonexpansive"
    load = f"import robustflow, torch; m = robustflow.load_model({str(model)!r}); print(m(torch.rand(1, 3, 32, 32)))"
    own = (
        "import robustflow, torch, torchvision; torch.manual_seed(0); m = torchvision.models.resnet18(num_classes=10)"
        "; x = torch.rand(8, 3, 32, 32); print(robustflow.evaluate(m.eval(), x, m(x).argmax(1)).summary)"
    )
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    page = f"{tmp_path}/runs/quickstart/report.html"
    render = f"{browser} --headless --no-sandbox --disable-gpu --user-data-dir=profile --dump-dom file://{page}"
    steps = {
        "install": f"{sys.executable} -m venv v && v/bin/pip install -q --no-cache-dir {wheel}",
        "quickstart": "v/bin/robustflow bench quickstart",
        "load a CIFAR-10 model": f'v/bin/python -c "{load}"',
        "evaluate a torchvision model": f'v/bin/python -c "{own}"',
        "open the report": f"{render} 2>/dev/null | grep -q leaderboard" if browser else f"test -s {page}",
    }
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    seconds, load_before = {}, os.getloadavg()
    for name, command in steps.items():
        started = time.monotonic()
        subprocess.run(command, shell=True, check=True, cwd=tmp_path, env=environment)
        seconds[name] = round(time.monotonic() - started, 1)
        print(f"{name}: {seconds[name]:.0f} s")
    if kept.suffix == ".json":
        tell = "import json, robustflow.environment as e; print(json.dumps(e.describe('cpu')))"
        python = [str(tmp_path / "v" / "bin" / "python"), "-c", tell]
        told = subprocess.run(python, check=True, capture_output=True, cwd=tmp_path, env=environment).stdout
        machine = {"cores": len(os.sched_getaffinity(0)), "load_before": load_before, "load_after": os.getloadavg()}
        pip = subprocess.run(["v/bin/pip", "config", "list"], check=True, capture_output=True, text=True, cwd=tmp_path)
        near = re.search(r"index-url='file:|find-links", pip.stdout)
        machine |= {"packages": "in part from files of this machine" if near else "downloaded", "browser": browser}
        machine |= {**json.loads(told), "revision": revision()}
        kept.write_text(json.dumps({"seconds": seconds, "environment": machine}, indent=1) + "\n", encoding="utf-8")


def test_every_dependency_s_licence_is_listed() -> None:
    listed = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *(entry for name in EXTRAS for entry in extras[name])]
    for name in declared(wanted):
        assert re.search(rf"^\| {re.escape(name)} \|", listed, flags=re.M), f"{name}: python -m robustflow.licences"
    assert not re.search("not stated|not installed", listed)
    # Robustflow is MIT: a licence that would reach into it is not for its dependencies.
    assert not re.search(r"\bA?GPL", listed.replace("LGPL", ""))


def test_the_licences_of_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    licences.main()
    printed = capsys.readouterr().out
    for name, licence in (("torch", "BSD"), ("jinja2", "BSD"), ("pydantic", "MIT"), ("foolbox", "MIT")):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"| {name} |")]
        assert licence in line


def test_the_citation_names_the_paper_and_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version = importlib.import_module("robustflow").__version__
    for wanted in (f"version: {version}", "10.48550/arXiv.2210.02373", "Celledoni", "Murari", "Owren", "Sherry"):
        assert wanted in text
    assert re.search("Sch(ö|oe)nlieb", text)
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
