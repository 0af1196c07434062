"""Presets with overrides, parsed from flags: every field of ``Config`` is one."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

import tyro

from mor_jax import presets
from mor_jax.config import Config
from mor_jax.errors import UserError

T = TypeVar("T")
_OLD_FLAGS = {
    "--train.tensorboard": ("--train.trackers", "tensorboard"),
    "--train.no-tensorboard": ("--train.trackers",),
}
"""Flags of older scripts and what they mean now."""


def parse(kind: type[T], arguments: Sequence[str], command: str, description: str) -> T:
    """Parse the flags of a subcommand into a dataclass; a mistake is explained on stderr and exits with code 2."""
    return tyro.cli(kind, args=list(arguments), prog=f"mor {command}", description=description)


def refuse_products(arguments: Sequence[str], flag: str) -> None:
    """Raise ``UserError`` if a flag is given that chose kernels which are no longer there."""
    if any(argument.partition("=")[0] == flag for argument in arguments):
        raise UserError(f"{flag} is gone: the kernels gained nothing over XLA's (experiments/serving/README.md)")


def preset_with_overrides(arguments: Sequence[str], command: str, description: str) -> Config:
    """Parse ``PRESET [--field value ...]``.

    Args:
        arguments: of the subcommand.
        command: its name, for messages.
        description: shown by ``--help``.

    Returns:
        The preset's configuration with the overrides in place.

    Raises:
        UserError: an unknown preset, or values that break a rule of the configuration.
        SystemExit: code 2 for an unknown flag, 0 after ``--help``.
    """
    return _parse(arguments, command, description, {})[0]


def preset_and_group(arguments: Sequence[str], command: str, description: str, name: str, group: T) -> tuple[Config, T]:
    """Parse as ``preset_with_overrides`` does, with one more group of flags, ``--NAME.field``.

    Args:
        arguments: of the subcommand.
        command: its name, for messages.
        description: shown by ``--help``.
        name: of the group.
        group: a dataclass with the defaults.

    Returns:
        (the configuration, the group).
    """
    config, parsed = _parse(arguments, command, description, {name: group})
    return config, getattr(parsed, name)


def preset_and_flags(arguments: Sequence[str], command: str, description: str, kind: type[T]) -> tuple[Config, T]:
    """Parse as ``preset_with_overrides`` does, with flags of the command's own, ``--field``.

    Args:
        arguments: of the subcommand.
        command: its name, for messages.
        description: shown by ``--help``.
        kind: frozen dataclass of the flags, all with defaults; the names differ from the configuration's.

    Returns:
        (the configuration, the flags).
    """
    config, parsed = _parse(arguments, command, description, {}, (kind,))
    fields: Any = dataclasses.fields(kind)  # type: ignore[arg-type]
    return config, kind(**{f.name: getattr(parsed, f.name) for f in fields})


def _parse(
    arguments: Sequence[str], command: str, description: str, groups: Mapping[str, Any], own: tuple[type, ...] = ()
) -> tuple[Config, Any]:
    if not arguments or arguments[0] in ("-h", "--help"):
        stream = sys.stdout if arguments else sys.stderr
        print(f"usage: mor {command} PRESET [--field value ...]\n\n{description}", file=stream)
        print(f"\n`mor presets` describes the presets; `mor {command} PRESET --help` lists the fields.", file=stream)
        raise SystemExit(0 if arguments else 2)
    name, *given = arguments
    flags = [flag for old in given for flag in _OLD_FLAGS.get(old.replace("_", "-"), (old,))]
    _check_typed_source(flags)
    config = presets.get(name).config
    fields = [f for f in dataclasses.fields(Config) if f.name != "preset"]  # its name is no flag
    flag_groups: list[Any] = [(f.name, f.type, dataclasses.field(default=getattr(config, f.name))) for f in fields]
    flag_groups += [(key, type(value), dataclasses.field(default=value)) for key, value in groups.items()]
    overrides = dataclasses.make_dataclass("Overrides", flag_groups, bases=own, frozen=True)
    parsed: Any = tyro.cli(overrides, args=flags, prog=f"mor {command} {name}", description=description)
    return Config(preset=name, **{f.name: getattr(parsed, f.name) for f in fields}), parsed


def _check_typed_source(flags: Sequence[str]) -> None:
    """Refuse a typed name that a folder and a built-in source share; in a saved configuration it is the source's."""
    from mor_jax.data.inputs import refuse_ambiguous

    for flag, following in zip_longest(flags, flags[1:], fillvalue=""):
        name, equals, value = flag.partition("=")
        if name == "--data.source":
            for source in (value if equals else following).split(","):
                refuse_ambiguous(source.strip(), "data.source")
