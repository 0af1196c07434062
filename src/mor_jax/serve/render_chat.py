"""Renders chat templates, in a process of its own: one that loops, or eats memory, is ended without ending the server.

It speaks JSON, a line each: first the template, then the variables of one text after the other. Jinja's environment is
set up as that of `transformers`. This file is run as a script, and imports nothing of this package.
"""

import contextlib
import datetime
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1.0
"""Time that a text may take."""
MOST_CHARACTERS = 1 << 22
"""Length of a text."""
_MOST_BYTES = 1 << 30
"""Memory of the process."""


class _Generation(Extension):
    """``{% generation %}``: marks answers for training, and means nothing here."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Take what stands between the tags as it is."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def compile_template(template: str) -> Callable[[dict[str, Any]], str]:
    """Compile a template.

    Returns:
        What turns variables into text.

    Raises:
        jinja2.TemplateError: it is none.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    compiled = environment.from_string(template)

    def render(variables: dict[str, Any]) -> str:
        return compiled.render(**variables)

    return render


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As `transformers` does it: jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def answers(lines: Iterable[str], arm: Callable[[float], object]) -> Iterable[str]:
    """Answer a line with a line.

    Args:
        lines: the template, and the variables of every text.
        arm: ends the process after so many seconds, unless it is called with 0 before.
    """
    render: Callable[[dict[str, Any]], str] | None = None
    for line in lines:
        arm(SECONDS)
        answer: dict[str, str] = {}
        try:
            if render is None:
                render = compile_template(json.loads(line))
            else:
                answer["text"] = render(json.loads(line))
                if len(answer["text"]) > MOST_CHARACTERS:
                    answer = {"error": f"the text would have more than {MOST_CHARACTERS} characters"}
        except Exception as error:  # whatever a template can do wrong
            answer = {"error": f"{str(error)[:500] or type(error).__name__}"}
        arm(0.0)
        yield json.dumps(answer)


def _main() -> None:
    import resource
    import signal

    with contextlib.suppress(ValueError, OSError):  # a system that has no such limit, or a lower one
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    for answer in answers(sys.stdin, lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)):
        print(answer, flush=True)


if __name__ == "__main__":
    _main()
