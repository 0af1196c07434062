"""Every command in the documentation parses, every file that it names is there: what was renamed fails here, not at a
reader's."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from mor_jax.cli import main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PACKAGE = ROOT / "src" / "mor_jax"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *(p for folder in ("docs", "tpu", "experiments") for p in (ROOT / folder).rglob("*.md")),
]
STARTS = {"mor": [], "tpu/run.sh start": ["train"]}
"""What a documented command begins with, and what it then is of `mor`."""


class Parsed(Exception):
    """The arguments were understood; nothing shall be run."""


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of every `mor` command in the fenced shell blocks of a page."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for start, prefix in STARTS.items():
                found = re.match(rf"(?:srun |[A-Z_]+=\S+ )*{re.escape(start)} (.*)", line)
                if found is not None and "..." not in line:
                    words = shlex.split(found[1].partition("  #")[0].partition(" > ")[0], comments=True)
                    yield [*prefix, *words]


COMMANDS = [(page, command) for page in PAGES for command in _commands(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{page.relative_to(ROOT)}: {' '.join(words)}"[:90] for page, words in COMMANDS]
)
def test_a_documented_command_parses(page, command, monkeypatch, capsys):
    parse = tyro.cli

    def only_parse(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", only_parse)
    with pytest.raises(Parsed):
        main(command)


def test_the_commands_are_found():
    assert len(COMMANDS) > 80 and {command[0] for _, command in COMMANDS} >= {"train", "eval", "plan", "sweep", "serve"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    links = {link.partition("#")[0] for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)} - {""}
    files = re.findall(r"`((?:src|tests|docs|experiments|tpu)/[\w./-]*\w)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in files if not (ROOT / name).exists() and "NAME" not in name]
    assert not missing


def test_the_code_map_of_the_readme_is_the_package():
    """Every folder and file of the map exists, and every folder of the package is on it."""
    (code_map,) = re.findall(r"```\nsrc/mor_jax/\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = [line.strip().partition("  ")[0] for line in code_map.splitlines()]
    folders = {name for line in names for name in re.findall(r"(\w+)/", line)} - {"routing"}
    assert folders == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    known = {path.name for path in PACKAGE.rglob("*.py")}
    assert set(re.findall(r"\w+\.py", code_map)) <= known


def test_the_way_of_the_data_names_files_that_are_there():
    way = README.read_text(encoding="utf-8").partition("The way of the data")[2].partition("\n## ")[0]
    names = re.findall(r"`((?:\w+/)*\w+\.py)`", way)
    assert len(names) > 10
    assert [name for name in names if not any(path.match(name) for path in PACKAGE.rglob("*.py"))] == []
