"""``mor bench http`` against our own server: its counts are the server's, and the whole record is written."""

import json

from live_server import MODEL, NAME, running, tiny_model

from mor_jax.bench.http_prompts import draw
from mor_jax.bench.http_settings import HttpSettings
from mor_jax.cli import main


def test_its_counts_are_the_servers(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a key that nobody asks for")
    out = tmp_path / "new" / "found.json"
    loads = ["--concurrency", "1", "4", "--rates", "30", "--requests", "8", "--warmup", "2"]
    lengths = ["--prompt-length", "uniform:1:6", "--output-length", "uniform:1:20"]
    with running(tiny_model(), max_queue=20) as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        command = ["bench", "http", url, *loads, *lengths, "--label", "a tiny model", "--out", str(out)]
        assert main(command) == 0
        generated, read = (server.metric(f"mor_{name}_tokens_total") for name in ("generated", "prompt"))
        answered = server.metric("mor_accepted_completions_total")
        shallow = server.metric('mor_tokens_by_depth_total{depth="1"}')
        small = ["--requests", "2", "--warmup", "1", "--prompt-length", "2", "--output-length", "4"]
        assert main(["bench", "http", url, *small, "--extra-body", '{"max_depth": 1}']) == 0
        assert server.metric('mor_tokens_by_depth_total{depth="1"}') == shallow + 3 * 4
        assert main(["bench", "http", url, "--model", "tinny"]) == 2
        assert main(["bench", "http", url, "--prompt-length", "300"]) == 2
    printed, wrong = capsys.readouterr()
    record = json.loads(out.read_text(encoding="utf-8"))
    found = record["measurements"]
    assert [(m.get("concurrency"), m.get("rate")) for m in found] == [(1, None), (4, None), (None, 30.0)]
    assert all(m["requests"] == m["completed"] == 8 and m["ended_early"] == 0 and not m["errors"] for m in found)
    assert answered == 2 + 3 * 8  # the warm-up's too, whose tokens nobody counts
    assert 0 < sum(m["output_tokens"] for m in found) == generated - _warm_up_tokens(record)
    assert 0 < sum(m["prompt_tokens"] for m in found) < read
    assert len({m["prompts_sha256"] for m in found}) == 3
    for measured in found:
        first, whole = measured["time_to_first_token_seconds"], measured["end_to_end_seconds"]
        assert 0 < first["p50"] <= first["p90"] <= first["p99"] <= whole["p99"] and first["mean"] <= whole["mean"]
    assert record["model"] == NAME and record["server"]["models"][0]["max_length"] == MODEL.context_length
    assert record["command"].startswith("mor bench http") and "--label 'a tiny model'" in record["command"]
    assert record["token_counts"] == "usage" and record["versions"].keys() == {"mor-jax", "python"}
    assert printed.count("8 of 8 requests") == 3
    refused = [line for line in wrong.splitlines() if line.startswith("mor bench")]
    assert len(refused) == 2 and "did you mean 'tiny'" in refused[0] and "exceed max_length=96" in refused[1]


def _warm_up_tokens(record):
    names = ("requests", "warmup", "prompt_length", "output_length")
    settings = HttpSettings(**{name: record["settings"][name] for name in names})
    return sum(draft.max_tokens for draft in draw(settings, -1))
