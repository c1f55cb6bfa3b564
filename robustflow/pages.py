"""What every report shares: the page's frame and filters; files that replace the earlier ones, all of them or none."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from robustflow import tables
from robustflow.errors import UserError


def render(template: str, **values: Any) -> str:
    """One page without any outside reference: its policy forbids the network and any script but its own."""
    loader = PackageLoader("robustflow", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "epsilon": tables.epsilon_label,
        "count": tables.count,
        "bound": tables.bound,
        "duration": tables.duration,
        "percent": lambda value: f"{100 * value:.1f}",
        "points": lambda value: f"{100 * value:+.1f}",
        "pretty": lambda value: json.dumps(value, indent=2, ensure_ascii=False),
        "settings": _settings,
    }
    script = loader.get_source(environment, "report.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=Markup(loader.get_source(environment, "report.css")[0]),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        **values,
    )


def inline(alt: str, png: bytes) -> dict[str, str]:
    return {"alt": alt, "source": f"data:image/png;base64,{base64.b64encode(png).decode()}"}


def replace(out: Path, files: dict[str, bytes], plot_kinds: tuple[str, ...]) -> None:
    """Write every file beside its place first; only when all are on disk does any of them take the place of the old.

    Plots of ``plot_kinds`` (KIND.png, KIND-….png) that are not among the files are removed: one of an evaluation that
    is gone would pass for a current one.

    Raises UserError where the directory cannot be written.
    """
    try:
        _replace(out, files, plot_kinds)
    except OSError as error:
        raise UserError(f"{out}: the report cannot be written there ({error.strerror or error})") from None


def _replace(out: Path, files: dict[str, bytes], plot_kinds: tuple[str, ...]) -> None:
    (out / "plots").mkdir(exist_ok=True)
    blocked = next((name for name in files if (out / name).is_dir()), None)
    if blocked:
        raise IsADirectoryError(0, f"{blocked} is a directory")
    staging = Path(tempfile.mkdtemp(prefix=".report-", dir=out))
    try:
        (staging / "plots").mkdir()
        for name, content in files.items():
            with (staging / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(staging / name, out / name)
        for plot in (out / "plots").glob("*.png"):
            if plot.name.split("-")[0].removesuffix(".png") in plot_kinds and f"plots/{plot.name}" not in files:
                plot.unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _settings(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested configuration as lines.

    >>> _settings({"width": 8, "train": {"loss": {"kind": "offset"}, "milestones": [1, 2]}})
    [('width', '8'), ('train.loss.kind', '"offset"'), ('train.milestones', '[1, 2]')]
    """
    lines: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, dict) and value:
            lines += _settings(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", json.dumps(value, ensure_ascii=False)))
    return lines
