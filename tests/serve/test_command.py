"""``mor serve RUN``: it says where it serves, answers, and ends on SIGTERM with code 0."""

import json
import logging
import os
import signal
import threading
import urllib.request
from queue import SimpleQueue

import jax
import pytest
from live_server import MODEL

from mor_jax import config_io
from mor_jax.cli import serve
from mor_jax.config import Config
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.parallel import make_mesh
from mor_jax.train.checkpoint import Checkpoints
from mor_jax.train.state import init_train_state


@pytest.fixture
def run(tmp_path):
    config, folder = Config(preset="tiny", model=MODEL), tmp_path / "small"
    folder.mkdir()
    config_io.save(config, folder / "config.json")
    Tokenizer.bytes_level().save(folder / "tokenizer.json")
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(init_train_state(config, make_mesh(config.mesh, jax.devices()[:1])), data_step=0, data_hash="tiny")
    checkpoints.close()
    return folder


class _Messages(logging.Handler):
    """Hands log messages on."""

    def __init__(self):
        super().__init__()
        self.queue = SimpleQueue()

    def emit(self, record):
        self.queue.put(record.getMessage())


def test_it_answers_and_ends_on_sigterm(run, monkeypatch):
    assert threading.current_thread() is threading.main_thread()  # or the signal would end the tests
    monkeypatch.setattr(serve, "enable_compilation_cache", lambda: None)
    logger, messages, answers = logging.getLogger("mor_jax.serve.server"), _Messages(), []
    logger.setLevel(logging.INFO)
    logger.addHandler(messages)

    def ask():
        try:
            address = messages.queue.get(timeout=60).removeprefix("serving on ")
            body = json.dumps({"prompt": "once", "max_tokens": 6, "temperature": 0, "model": "small"}).encode()
            request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                answers.append(json.load(response))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    before = signal.getsignal(signal.SIGTERM)
    asking.start()
    try:
        code = serve.run([str(run), "--port", "0", "--steps", "4", "--max-running", "4", "--prefill-chunk", "16"])
    finally:
        logger.removeHandler(messages)
        logger.setLevel(logging.NOTSET)
        asking.join()
    assert code == 0 and signal.getsignal(signal.SIGTERM) is before
    (answer,) = answers
    assert answer["model"] == "small" and answer["usage"]["prompt_tokens"] == 4
