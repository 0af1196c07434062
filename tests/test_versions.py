"""Versions in logs and results: what is not installed is left out, a source tree is said."""

import importlib.metadata

from mor_jax import versions
from mor_jax.versions import installed_versions


def test_what_is_not_installed_is_left_out_but_the_project_is_named(monkeypatch):
    assert list(installed_versions(("jax", "no-such-package", "mor-jax"))) == ["jax", "mor-jax"]

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    assert installed_versions(("jax", "mor-jax")) == {"mor-jax": "not installed"}
