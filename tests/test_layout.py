"""The package as files: what it imports is what pyproject declares, and a file's name says which file is meant."""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mor_jax"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"absl": "absl-py", "orbax": "orbax-checkpoint", "yaml": "pyyaml"}
"""Where an import's name is not the distribution's."""
NAMESAKES = {"__init__.py", "convert.py", "inspect.py", "prepare.py", "presets.py"}
"""Modules of `cli/` are named after their commands, as the modules are that do the work."""


def _files() -> Iterator[Path]:
    return PACKAGE.rglob("*.py")


def _imported() -> dict[str, set[str]]:
    """Distributions of other people that the package imports anywhere, and the files that do."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in (name.partition(".")[0] for name in names):
                if name != "mor_jax" and name not in sys.stdlib_module_names:
                    found[_normal(DISTRIBUTIONS.get(name, name))].add(str(path.relative_to(PACKAGE)))
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared(requirements: list[str]) -> set[str]:
    return {_normal(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in requirements}


def test_what_is_imported_is_declared():
    optional = PROJECT["optional-dependencies"]
    extras = set().union(*(_declared(lines) for extra, lines in optional.items() if extra != "dev"))
    missing = {
        name: files for name, files in _imported().items() if name not in _declared(PROJECT["dependencies"]) | extras
    }
    assert not missing


def test_what_every_installation_gets_is_imported():
    assert _declared(PROJECT["dependencies"]) <= _imported().keys()


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_dependencies_and_tools_are_pinned(version):
    pins = (ROOT / "constraints" / f"python{version}.txt").read_text(encoding="utf-8").splitlines()
    wanted = _declared(PROJECT["dependencies"]) | _declared(PROJECT["optional-dependencies"]["dev"]) - {"mor-jax"}
    assert wanted <= {_normal(pin.partition("==")[0]) for pin in pins}
    assert pins == sorted(pins, key=str.lower)


def test_no_two_files_share_a_name_without_need():
    places = defaultdict(list)
    for path in _files():
        places[path.name].append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in places.items() if len(found) > 1 and name not in NAMESAKES} == {}
    for name in NAMESAKES - {"__init__.py"}:
        assert len(places[name]) == 2 and f"cli/{name}" in places[name]
