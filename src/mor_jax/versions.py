"""Versions of packages, for logs and results."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def installed_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed; this project itself may be a mere source tree."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name == "mor-jax":
                found[name] = "not installed"
    return found
