"""All systems by name."""

from __future__ import annotations

from robustflow.errors import UserError
from robustflow.structured import mechanics, pixels, populations, presnov_systems, volumes
from robustflow.structured.systems import System

# In the order of the talk. Each module ends with what it offers.
_ALL: tuple[System, ...] = (
    *pixels.SYSTEMS,
    *populations.SYSTEMS,
    *mechanics.SYSTEMS,
    *volumes.SYSTEMS,
    *presnov_systems.SYSTEMS,
)
SYSTEMS: dict[str, System] = {system.name: system for system in _ALL}


def find(name: str) -> System:
    """
    Raises:
        UserError: there is no system of this name.
    """
    if name not in SYSTEMS:
        raise UserError(f"no system {name!r}; there are: {', '.join(SYSTEMS) or 'none'}")
    return SYSTEMS[name]
