"""The licences of what robustflow depends on, from the installed packages' own metadata.

``python -m robustflow.licences > THIRD_PARTY.md`` writes the file of that name again.
"""

from __future__ import annotations

import re
from importlib import metadata

EXTRAS_FOR_DEVELOPERS = ("test", "lint")
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


def requirements(package: str = "robustflow") -> dict[str, str]:
    """Direct dependencies of a package: name → the extra that asks for it, "" where it is always needed.

    >>> requirements()["torch"]
    ''
    """
    found: dict[str, str] = {}
    for line in metadata.requires(package) or []:
        name = _REQUIREMENT.match(line)
        extra = _EXTRA.search(line)
        assert name
        asked = extra[1] if extra else ""
        if asked not in EXTRAS_FOR_DEVELOPERS:
            found.setdefault(name[0].lower(), asked)
    return found


def licence(package: str) -> str:
    """What a package states: its licence expression, else the classifiers, else the first line of the field.

    >>> licence("jinja2")
    'BSD'
    """
    about = metadata.metadata(package)
    expression, field = ((about.get_all(name) or [""])[0] for name in ("License-Expression", "License"))
    kinds = [line.rsplit(" :: ", 1)[1] for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    stated = ", ".join(kind.removesuffix(" License") for kind in kinds if kind != "OSI Approved")
    return str(expression or stated or next(iter(field.strip().splitlines()), "not stated"))


def table() -> str:
    """The content of THIRD_PARTY.md."""
    lines = [
        "# Licences of the dependencies",
        "",
        "robustflow is under the MIT licence and contains no code of the packages below; it imports them. Written by",
        "`python -m robustflow.licences` from their own metadata; packages that they bring along state theirs in turn",
        "(PyTorch for CUDA brings NVIDIA's libraries under NVIDIA's terms).",
        "",
        "| package | licence | needed for |",
        "| --- | --- | --- |",
    ]
    for name, extra in sorted(requirements().items()):
        try:
            stated = licence(name)
        except metadata.PackageNotFoundError:
            stated = "not installed here"
        lines.append(f"| {name} | {stated} | {f'`robustflow[{extra}]`' if extra else 'everything'} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    print(table(), end="")


if __name__ == "__main__":
    main()
