"""What the code's structure promises: one direction of imports, files that fit a sitting."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for package in ("robustflow", "attacks") for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in FILES}


def imported(path: Path, source: str | None = None) -> set[str]:
    """Every module that a file names in an import, inside functions too; relative imports resolved."""
    found = set()
    for node in ast.walk(ast.parse(source if source is not None else path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from package import module` depends on the module, not on the package's __init__.
            names = {f"{module}.{alias.name}" for alias in node.names}
            inner = {name for name in names if name in MODULES}
            found |= inner
            if len(inner) < len(names):
                found.add(module)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("import_module", "__import__"):
                found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def test_the_reader_of_imports_sees_all_forms() -> None:
    source = "import robustflow.cli as c\nfrom robustflow import bench, version\nfrom . import data\n"
    source += "def f():\n    from .config import read"
    found = imported(ROOT / "robustflow" / "x.py", source)
    assert found == {"robustflow.cli", "robustflow.bench", "robustflow", "robustflow.data", "robustflow.config"}
    assert imported(ROOT / "attacks" / "x.py", "import_module('robustflow.data')") == {"robustflow.data"}


def test_attacks_know_nothing_of_the_networks() -> None:
    for path in FILES:
        if path.is_relative_to(ROOT / "attacks"):
            assert not any(name.split(".")[0] == "robustflow" for name in imported(path)), path


def test_imports_have_no_circles() -> None:
    graph = {name: imported(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert len(order) == len(MODULES)
    assert graph["robustflow.errors"] == set()
    assert "robustflow.data" in graph["robustflow.bench"]


def test_only_the_evaluation_and_the_command_line_attack() -> None:
    users = {
        name
        for name, path in MODULES.items()
        if not name.startswith("attacks") and any(used.split(".")[0] == "attacks" for used in imported(path))
    }
    measured = {f"robustflow.measurements.{name}" for name in ("attack_sets", "attack_workers", "plain_foolbox")}
    users -= {"robustflow.training_grid"}  # it takes their executors, no attack
    assert users == {"robustflow.bracket", "robustflow.cli", "robustflow.evaluation"} | measured


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_fits_a_sitting(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    assert max((len(line) for line in lines), default=0) <= 120
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse("\n".join(lines))), "a module says what it is for"


def test_nothing_is_ever_unpickled() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not {"pickle", "dill", "joblib", "cloudpickle"} & {name.split(".")[0] for name in imported(path)}, path
        assert "torch.load(" not in text, path
        assert "allow_pickle=True" not in text, path


def test_building_a_network_needs_neither_attacks_nor_plots() -> None:
    heavy = ["foolbox", "matplotlib", "torchvision", "sklearn"]
    program = f"import sys, robustflow; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"
