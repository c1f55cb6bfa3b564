"""Where a result comes from: versions, device, source revision. And the choice of that device."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from robustflow.errors import UserError

_PACKAGES = ("robustflow", "torch", "torchvision", "foolbox", "numpy", "scipy", "pandas")


def choose_device(name: str) -> torch.device:
    """``auto`` takes a GPU where there is one. TF32 is switched off: logits that are reported have full precision."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu or auto")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe(device: torch.device | str) -> dict[str, Any]:
    """What a result file says of the machine and software that made it."""
    kind = torch.device(device).type
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name() if kind == "cuda" else "cpu",
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "revision": revision(),
    }


@functools.cache
def revision() -> str:
    """The commit of the checkout, "+changes" behind it if files differ from it; outside a checkout "unknown"."""
    folder = Path(__file__).resolve().parent
    try:
        # An installed copy may lie inside some other project's checkout: that one's commit would say nothing.
        if Path(_git(folder, "rev-parse", "--show-toplevel")) != folder.parent:
            return "unknown"
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".", "../attacks")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
