"""What a benchmark measures: a preset with overrides, written `PRESET[:field=value,...]`."""

import json
import re
from dataclasses import dataclass
from typing import Any

from mor_jax import presets
from mor_jax.config import Config
from mor_jax.config.io import from_dict, to_dict
from mor_jax.errors import UserError

_NEXT_FIELD = re.compile(r",(?=[a-z_.0-9]+=)")


@dataclass(frozen=True)
class Case:
    """One configuration to time."""

    name: str
    """As the user wrote it."""
    config: Config


def parse_case(text: str, shared: tuple[str, ...] = ()) -> Case:
    """Read ``PRESET[:field=value,...]``.

    Args:
        text: fields are dotted as on the command line of ``mor train``; values are JSON, or plain text. `remat=full`
            is short for `perf.remat=full`.
        shared: more `field=value` pairs, applied first.

    Raises:
        UserError: an unknown preset or field, or a value that breaks a rule.
    """
    preset, _, rest = text.partition(":")
    values = to_dict(presets.get(preset).config)
    for pair in (*shared, *filter(None, _NEXT_FIELD.split(rest))):
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"case {text!r}: {pair!r} is not of the form field=value")
        _set(values, name if "." in name else f"perf.{name}", _value(value))
    return Case(name=text, config=from_dict(Config, values))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None if text == "None" else text


def _set(values: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted field; an unknown one is put in all the same, for the configuration to refuse by name."""
    *parents, name = path.split(".")
    for parent in parents:
        inner = values.get(parent)
        if not isinstance(inner, dict):
            inner = values[parent] = {}
        values = inner
    values[name] = value
