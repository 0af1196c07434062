"""The console command ``mor``: one module per subcommand, imported when it is asked for.

A mistake of the user ends in one line on stderr and exit code 2, a diverged run in exit code 1. A reader of stdout that
goes away (``mor ... | head``) ends the command quietly, with 141 as of a program that SIGPIPE ends: `pipefail` sees it.
"""

import importlib
import io
import logging
import os
import select
import sys
from collections.abc import Sequence
from typing import TextIO

from mor_jax.errors import UNUSABLE_PATH, UserError, one_line, suggest

COMMANDS = {
    "train": "train, or continue, a run",
    "presets": "list the named configurations",
    "prepare": "turn text into packed, shuffled shards",
    "plan": "compile a run for a TPU slice that need not be there: memory, FLOPs, communication",
    "eval": "held-out loss of a run under both selection modes",
    "convert": "weights between this project, Hugging Face and the official release",
    "sweep": "run a list of configurations, resumable, with one table at the end",
    "generate": "continue texts with a trained model",
    "serve": "answer completion requests over HTTP",
    "bench": "measure speed on the present device",
    "inspect": "make a run's pictures again, for held-out text or any other",
}
"""Subcommand and what it does; the module ``mor_jax.cli.<name>`` has ``run(arguments) -> exit code``."""

USER_ERROR, FAILURE, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141


def usage() -> str:
    """Return the list of subcommands."""
    lines = [f"  {name:10s} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: mor COMMAND ...", "", *lines, "", "`mor COMMAND --help` says more."])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    _replace_what_stdout_cannot_show()
    try:
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        except SystemExit as stop:
            if isinstance(stop.__context__, BrokenPipeError):  # rich makes an exit of it
                return CLOSED_PIPE
            raise
        finally:
            if sys.stdout is not None and not isinstance(sys.exception(), Exception):  # None: it was closed before
                sys.stdout.flush()  # here, and not when the interpreter ends: the reader may have gone
    except BrokenPipeError:
        gone = [stream for stream in (sys.stdout, sys.stderr) if stream and _reader_is_gone(stream)]
        if not gone:
            raise
        for stream in gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is still held back
        return CLOSED_PIPE


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else USER_ERROR
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"mor: unknown command {name!r}{suggest(name, COMMANDS)}\n\n{usage()}", file=sys.stderr)
        return USER_ERROR
    _log_to_stderr()
    try:
        return importlib.import_module(f"mor_jax.cli.{name}").run(rest)
    except UserError as error:
        print(f"mor {name}: {one_line(error)}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        if error.errno not in UNUSABLE_PATH or error.filename is None:
            raise
        print(f"mor {name}: {error.filename} cannot be used: {os.strerror(error.errno)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(f"mor {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _replace_what_stdout_cannot_show() -> None:
    """Let a terminal without, say, emoji show `?` for them; stderr shows escapes anyway."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _reader_is_gone(stream: TextIO) -> bool:
    """Whether a stream is a pipe that nobody reads any more: other pipes break, too, and those are faults."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # it has no descriptor, or is closed
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _log_to_stderr() -> None:
    """Show this package's log lines: which backends run, damaged checkpoints, and the like."""
    logger = logging.getLogger("mor_jax")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("mor: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False  # absl may have given the root logger a handler of its own
