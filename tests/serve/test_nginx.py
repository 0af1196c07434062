"""deploy/nginx.conf before two servers: keys, streams that are not held back, affinity, and a replica that ends."""

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from live_server import Answer, running, tiny_model

from mor_jax.cli import main
from mor_jax.infer.engine import Engine

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(NGINX is None, reason="nginx is not installed")]
CONF = (Path(__file__).parents[2] / "deploy" / "nginx.conf").read_text(encoding="utf-8")
WHOLE = """
daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
events {{ }}
http {{
    access_log off;
    {paths}
    {conf}
}}
"""
KEY = "a-key"


def _configured(folder, port, replicas):
    """The file as it stands, but for addresses, paths and TLS."""
    (folder / "keys").write_text(f'"Bearer {KEY}" somebody;\n')
    conf = CONF.replace("/etc/nginx/mor-keys.conf", str(folder / "keys"))
    conf = conf.replace("listen 443 ssl http2;", f"listen 127.0.0.1:{port};")
    conf, certificates = re.subn(r"ssl_certificate.*;", "", conf)
    for old, new in zip((8001, 8002), replicas, strict=True):
        conf = conf.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    assert certificates == 2 and f":{port};" in conf and all(f":{new} " in conf for new in replicas)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    return WHOLE.format(folder=folder, paths=paths, conf=conf)


@contextlib.contextmanager
def _nginx(folder, replicas):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (folder / "nginx.conf").write_text(_configured(folder, port, replicas))
    process = subprocess.Popen([str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")])
    try:
        limit = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=10)


def _send(port, path, fields=None, key=KEY):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}", "Host": "llm.example.org"}
        body = None if fields is None else json.dumps(fields).encode()
        connection.request("GET" if body is None else "POST", path, body, headers)
        response = connection.getresponse()
        times, data = [], b""
        while line := response.readline():
            data += line
            times.append(time.monotonic())
        return Answer(response.status, dict(response.getheaders()), data), times


def test_two_replicas_behind_nginx(tmp_path, monkeypatch, capsys):
    with (
        running(tiny_model(), max_queue=64) as first,
        running(tiny_model(), max_queue=64) as second,
        _nginx(tmp_path, (first.port, second.port)) as port,
    ):
        ask = {"prompt": "Once", "max_tokens": 40, "temperature": 0}
        assert _send(port, "/v1/completions", ask, key="another")[0].status == 401
        assert [_send(port, path)[0].status for path in ("/metrics", "/", "/health", "/v1/models")] == [
            404,
            404,
            200,
            200,
        ]
        assert _send(port, "/v1/completions", ask | {"max_tokens": 4000})[0].status == 400  # the server's own reason

        with monkeypatch.context() as patch:
            step = Engine.step
            patch.setattr(Engine, "step", lambda engine: (time.sleep(0.1), step(engine))[1])
            answer, times = _send(port, "/v1/completions", ask | {"stream": True})
        assert answer.events and times[-1] - times[0] > 0.3  # held back, all would come at once

        # equal beginnings share a replica, others are spread
        counts = [lambda server=server: server.metric("mor_accepted_completions_total") for server in (first, second)]
        before = [count() for count in counts]
        for _ in range(6):
            assert _send(port, "/v1/completions", ask)[0].status == 200
        assert sorted(count() - b for count, b in zip(counts, before, strict=True)) == [0, 6]
        for index in range(24):
            assert _send(port, "/v1/completions", {"prompt": f"{index} words", "max_tokens": 2})[0].status == 200
        assert all(count() - b > 3 for count, b in zip(counts, before, strict=True))

        # one ends under load: nobody notices
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        ending = threading.Timer(1.0, second.drain)
        ending.start()
        load = ["--concurrency", "6", "--requests", "400", "--prompt-length", "3", "--output-length", "12"]
        assert main(["bench", "http", f"http://127.0.0.1:{port}", *load, "--out", str(tmp_path / "found.json")]) == 0
        ending.join()
        assert not second.thread.is_alive()
    (found,) = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["measurements"]
    assert (found["completed"], found["errors"], found["ended_early"]) == (400, {}, 0) and found["seconds"] > 2
    assert "400 of 400" in capsys.readouterr().out
