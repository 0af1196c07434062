"""A model's chat template: found beside its tokenizer, rendered by a process that cannot hang the server."""

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from mor_jax.data.published_tokens import token_names
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.serve import render_chat

log = logging.getLogger(__name__)
_IDS = {"bos_token": "bos_id", "eos_token": "eos_id", "pad_token": "pad_id", "unk_token": "unk_id"}


class ChatTemplate:
    """Turns messages into the text that a model continues.

    Args:
        template: Jinja.
        tokens: names of special tokens and their texts, such as ``bos_token``.

    Raises:
        UserError: it is no template.
    """

    def __init__(self, template: str, tokens: dict[str, str]) -> None:
        self._template, self._tokens = template, tokens
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        with self._lock:
            self._start()

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text; one at a time.

        Raises:
            UserError: the template refuses the messages, or takes longer than ``render_chat.SECONDS``.
        """
        variables = {
            **self._tokens,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        with self._lock:
            if self._process is None:
                self._start()
            return self._ask(variables)["text"]

    def close(self) -> None:
        """End the process; the next text would start another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        # a session of its own: Ctrl-C lets requests finish, and so must not reach it
        self._process = subprocess.Popen(
            [sys.executable, "-P", render_chat.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        try:
            self._ask(self._template)
        except UserError:
            self._stop()
            raise

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, value: Any) -> dict[str, str]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(value) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._stop()
            raise UserError(f"the model's chat template took more than {render_chat.SECONDS:g} s, or too much memory")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"the model's chat template says: {answer['error']}")
        return answer


def open_chat_template(tokenizer: Tokenizer) -> ChatTemplate | None:
    """Find a model's template; None, with a word in the log, where there is none that can be used."""
    special = tokenizer.special
    found = special.chat_template
    template = found.get("default") if isinstance(found, dict) else found
    if template is None:
        named = f": none of {', '.join(found)} is the default" if found else ""
        log.info("no chat: the model has no chat template%s", named)
        return None
    ids = {name: getattr(special, field) for name, field in _IDS.items()}
    tokens = {name: tokenizer.token_text(token) for name, token in ids.items() if token is not None}
    try:
        return ChatTemplate(template, tokens | token_names(special.files))
    except UserError as error:
        log.warning("no chat: %s", error)
        return None
