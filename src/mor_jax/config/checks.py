"""Checks of configuration fields: one message with the field, its value and the rule."""

import math
from typing import get_args

from mor_jax.errors import require


def require_choice(name: str, value: object, choices: object) -> None:
    """Refuse a value that is none of a ``Literal``'s."""
    allowed = get_args(choices)
    require(value in allowed, f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def require_positive(**values: float) -> None:
    """Refuse values of 0 and below, NaN and infinity."""
    for name, value in values.items():
        require(-math.inf < value < math.inf, f"{name}={value} is not a finite number")
        require(value > 0, f"{name}={value} must be positive")


def require_not_negative(**values: float) -> None:
    """Refuse values below 0, NaN and infinity."""
    for name, value in values.items():
        require(-math.inf < value < math.inf, f"{name}={value} is not a finite number")
        require(value >= 0, f"{name}={value} must not be negative")


def require_seed(name: str, value: int) -> None:
    """Refuse what is no seed of every generator in use: unsigned, 32 bits."""
    require(0 <= value < 2**32, f"{name}={value} is outside 0..2^32-1")
