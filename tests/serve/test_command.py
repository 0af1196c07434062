"""``mor serve RUN``: it says where it serves, answers, and ends on SIGTERM with code 0."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from queue import SimpleQueue

import jax
import pytest
from live_server import MODEL

from mor_jax.cli import serve
from mor_jax.cli.options import parse
from mor_jax.config import Config
from mor_jax.config import io as config_io
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError
from mor_jax.mesh.mesh import make_mesh
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.state import init_train_state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config, folder = Config(preset="tiny", model=MODEL), tmp_path_factory.mktemp("runs") / "small"
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
            for asked in (request, f"{address}/v1/models/small"):
                with urllib.request.urlopen(asked, timeout=60) as response:
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
    answer, model = answers
    assert answer["model"] == "small" and answer["usage"]["prompt_tokens"] == 4
    assert model["id"] == "small" and model["max_length"] == MODEL.context_length


_HANGS = """
import sys, threading
from mor_jax.cli import main
from mor_jax.infer.engine import Engine
from mor_jax.serve import server, service

service._LAST_STEP = 0.5
init = server.Server.__init__

def hang_once_warm(self, *arguments):
    init(self, *arguments)
    Engine.step = lambda engine: threading.Event().wait()

server.Server.__init__ = hang_once_warm
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_process_whose_engine_hangs_ends_on_sigterm(run):
    options = ["--port", "0", "--steps", "4", "--stall-seconds", "0.5", "--drain-seconds", "60", "--mesh.data", "2"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", _HANGS, "serve", str(run), *options], stderr=subprocess.PIPE, text=True, env=environment
    )
    with process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "serving on" in line:
                break
        else:
            raise AssertionError("".join(lines))
        address = line.partition("serving on ")[2].strip()
        body = json.dumps({"prompt": "once", "max_tokens": 6}).encode()
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        asking = threading.Thread(target=_status, args=(request,))
        asking.start()
        while _status(f"{address}/health") == 200:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 1
        assert "the engine is left behind in a step" in process.stderr.read()
        asking.join()


def _status(request):
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--backend", "pallas"), "backend='pallas' needs a GPU, not device='cpu'"),
        (("--products", "xla"), "--products is gone: the kernels gained nothing over XLA's"),
        (("--block-slots", "0"), "block_slots=0 must be positive, or None"),
        (("--exit-at", "-1"), "exit_at=-1 must be positive, or None"),
        (("--exit-slots", "0"), "exit_slots=0 must be positive, or None"),
    ],
)
def test_sizes_that_cannot_be_are_refused(run, monkeypatch, flags, words):
    monkeypatch.setattr(serve, "enable_compilation_cache", lambda: None)
    with pytest.raises(UserError, match=re.escape(words)):
        serve.run([str(run), "--port", "0", *flags])


def test_flags_become_sizes_of_the_engine(run):
    flags = ["--block-slots", "5", "--exit-slots", "3", "--exit-at", "1", "--no-cuts"]
    _, name, options = serve._load(parse(serve.ServeArguments, [str(run), *flags], "serve", ""))
    assert name == "small" and not options.cuts
    assert (options.block_slots, options.exit_slots, options.exit_at) == (5, 3, 1)
    assert options.max_length is None  # the model's context
