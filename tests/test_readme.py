"""What the README promises: its example runs, its tables are lines of the committed results, its files exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import attacks

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="no README beside the tests (not a checkout)")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.parametrize("place", range(len(blocks("python")) if README.exists() else 0))
def test_the_python_examples_run(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[place], "README.md", "exec"), {})
    assert "certified" in capsys.readouterr().out


def test_tables_are_lines_of_the_committed_results() -> None:
    text = README.read_text(encoding="utf-8")
    quoted = re.findall(r"<!-- from (results/\S+) -->\n(.*?)<!-- end -->", text, flags=re.S)
    assert quoted
    for source, lines in quoted:
        committed = (ROOT / source).read_text(encoding="utf-8").splitlines()
        for line in filter(None, lines.splitlines()):
            assert line in committed, f"{line!r} is not a line of {source}"


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_the_prediction_for_a_cluster_is_its_own_arithmetic() -> None:
    text = README.read_text(encoding="utf-8")
    passes = attacks.expected_passes("strong", [36 / 255])
    assert f"{passes:,} forward passes" in text
    small, large = (passes * 1e7 * 4 * size / (64 * 19.5e12 / 4) / 3600 for size in (27.1e6, 1082e6))
    assert f"64 GPUs {small:.1f} hours" in text
    assert f"(1,082 M) {large:.0f}" in text


def test_the_newcomer_s_seconds_are_those_measured() -> None:
    measured = json.loads((ROOT / "results" / "newcomer.json").read_text(encoding="utf-8"))
    seconds, machine = measured["seconds"], measured["environment"]
    text = " ".join(README.read_text(encoding="utf-8").split())
    names = ("install", "quickstart", "load a CIFAR-10 model", "evaluate a torchvision model", "open the report")
    assert list(seconds) == list(names)
    assert ", ".join(f"{name} {seconds[name]:.0f} s" for name in names) in text
    packages = machine["packages"].replace("files of this machine", "disk")
    assert f"on {machine['cores']} cores, packages {packages}" in text
    assert seconds["quickstart"] < 180, "the README says: under three minutes"
    assert max(machine["load_before"][0], machine["load_after"][0]) < 2, "measured beside other work"


def test_one_seed_of_every_system_takes_less_than_half_an_hour() -> None:
    """The README's minutes are those of the committed trainings and measurements, on one core."""
    folders = sorted(path.parent for path in (ROOT / "results" / "structured").glob("*/config.json"))
    assert [folder.name for folder in folders] == sorted(
        path.stem for path in (ROOT / "configs" / "structured").glob("*.toml")
    )
    spent = 0.0
    for folder in folders:
        cards = [json.loads(path.read_text()) for path in (folder / "seed-0" / "models").glob("*/card.json")]
        measured = [*(folder / "seed-0" / "measured").glob("*.json"), *(folder / "prepared").glob("*.json")]
        spent += sum(sum(card["seconds"].values()) for card in cards)
        spent += sum(json.loads(path.read_text())["seconds"] for path in measured)
    assert spent < 30 * 60
    assert f"takes {spent / 60:.0f} minutes of one core" in README.read_text(encoding="utf-8").replace("\n", " ")
