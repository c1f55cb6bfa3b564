"""Plain data as typed objects: no unknown key, no wrong type, and what is wrong in one line."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from robustflow.errors import UserError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


AnyStrict = TypeVar("AnyStrict", bound=Strict)


def validated(kind: type[AnyStrict], raw: dict[str, Any], origin: str) -> AnyStrict:
    """Plain data as a typed object.

    Raises:
        UserError: an unknown key or a wrong value, in one line that begins with ``origin``.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{origin}: {first_line(error)}") from None


def first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    # A shown value is cut short: a config may hold anything.
    key = ".".join(str(part) for part in first["loc"])[:120] or "top level"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}"
    if first["type"] == "missing":
        return f"{key}: missing"
    shown = repr(first["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{key}: {message[0].lower()}{message[1:]} (got {shown})"
