"""Every command in the documentation parses: flags that were renamed or mistyped fail here, not at a reader's."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from mor_jax.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(p for folder in ("docs", "tpu", "experiments") for p in (ROOT / folder).rglob("*.md"))]
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
