"""Strict JSON round trip of the configuration: ``load(save(x)) == x``, unknown keys are refused by name."""

import dataclasses
import json
import typing
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar

from mor_jax.errors import UserError, reason, shown, suggest

T = TypeVar("T")
_LARGEST = 2**63


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration dataclass as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[T], values: object, where: str = "") -> T:
    """Build ``kind`` from what ``to_dict`` gave.

    Args:
        kind: a configuration dataclass.
        values: its JSON object.
        where: dotted path of the object, for messages.

    Returns:
        The dataclass; fields that are absent take their defaults, and those of older releases are translated by its
        ``upgrade``, if it has one.

    Raises:
        UserError: an unknown field (with the nearest known name), a missing one that has no default, a value of the
            wrong type, or a broken rule.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where or kind.__name__}={shown(values)} is not an object")
    fields: dict[str, Any] = getattr(kind, "upgrade", dict)(values)
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(typing.cast(Any, kind))]
    built = {}
    for name, value in fields.items():
        path = f"{where}.{name}" if where else name
        if name not in known:
            raise UserError(f"unknown field {shown(path)}{suggest(name, known)}")
        built[name] = _convert(hints[name], value, path)
    missing = [f.name for f in dataclasses.fields(typing.cast(Any, kind)) if f.name not in built and _is_needed(f)]
    if missing:
        raise UserError(f"{where or kind.__name__}: {', '.join(missing)} missing")
    return kind(**built)


def _is_needed(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, path)
    if origin in (typing.Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        return _convert(next(a for a in arguments if a is not NoneType), value, path)
    if origin is typing.Literal:
        if value not in arguments:
            raise UserError(f"{path}={shown(value)} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{path}={shown(value)} is not a list")
        return tuple(_convert(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise UserError(f"{path}={shown(value)} is outside the 64-bit integers")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise UserError(f"{path}={shown(value)} is not of type {hint.__name__}")
    return value


def save(config: Any, path: Path) -> None:
    """Write a configuration as indented JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")


def load(kind: type[T], path: Path) -> T:
    """Read what ``save`` wrote.

    Raises:
        UserError: the file is missing, is not JSON, or does not describe ``kind``.
    """
    values = read_json(path)
    try:
        return from_dict(kind, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_json(path: Path, what: str = "configuration file") -> Any:
    """Read a file of JSON; a byte-order mark of UTF-8 is passed over.

    Args:
        path: the file.
        what: it should be, for messages.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except RecursionError as error:
        raise UserError(f"{path}: not a readable {what} (nested too deeply)") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable {what} ({reason(error)})") from error


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Name every field that differs between two configurations, as ``path: old -> new``."""
    lines = []
    for f in dataclasses.fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        path = f"{where}.{f.name}" if where else f.name
        if dataclasses.is_dataclass(a):
            lines += differences(a, b, path)
        elif a != b:
            lines.append(f"{path}: {a!r} -> {b!r}")
    return lines
