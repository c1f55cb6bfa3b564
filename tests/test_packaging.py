"""What an installed wheel must hold besides Python files."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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


def test_every_import_of_the_packages_is_a_declared_dependency() -> None:
    declared = {entry.split(">")[0].split("<")[0].split("=")[0].strip() for entry in PROJECT["project"]["dependencies"]}
    names = {"sklearn": "scikit-learn", "eagerpy": "foolbox", "markupsafe": "jinja2", "PIL": "matplotlib"}
    for path in [path for package in ("robustflow", "attacks") for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top not in ("robustflow", "attacks"):
                    assert names.get(top, top) in declared, f"{path}: {module}"


@pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed: no wheel without a download"
)
def test_the_wheel(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for folder, prefix in (("robustflow", "robustflow"), ("attacks", "attacks"), ("configs", "robustflow/configs")):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".j2", ".css", ".js"):
                assert f"{prefix}/{path.relative_to(ROOT / folder)}" in held
    assert not any(name.startswith(("tests/", "results/")) for name in held)
