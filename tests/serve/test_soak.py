"""A short run of the soak in experiments/serving: random, bad and leaving clients, after which nothing is held."""

import asyncio
import dataclasses
import random
import time
from pathlib import Path

import pytest
from live_server import ENGINE, TEMPLATE, running, tiny_model

from experiment_script import load_script
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.infer.compilations import compilations
from mor_jax.infer.engine import Engine

FOLDER = Path(__file__).parents[2] / "experiments" / "serving"
REQUEST_BYTES = 8000
SCARCE = dataclasses.replace(ENGINE, block_pages=40, edge_pages=14)
"""Little more than one sequence at its longest may take, which is 36 and 12 pages."""

soak_client = load_script("serving/soak_client")
soak = load_script("serving/soak")


def test_nothing_is_lost_or_held():
    limits = {"max_queue": 10, "max_request_bytes": REQUEST_BYTES, "read_seconds": 5.0}
    with running(tiny_model(TEMPLATE), SCARCE, **limits) as client:
        before = compilations()
        clients = soak_client.Client(
            soak_client.Limits(client.port, ENGINE.max_length, REQUEST_BYTES), random.Random(2)
        )
        asyncio.run(soak_client.send_many(clients, 150, 16))
        assert clients.violations == []
        kinds = {outcome.partition(":")[0] for outcome in clients.outcomes}
        outcomes = {outcome.partition(": ")[2] for outcome in clients.outcomes}
        assert sum(clients.outcomes.values()) == 150 and len(kinds) == 13
        assert outcomes - {"refused 429"} == {"answered", "left", "refused 400", "refused 404", "refused 413"}
        limit = time.monotonic() + 20
        while any(client.metric(name) for name in soak.HELD):
            assert time.monotonic() < limit
            time.sleep(0.1)
        assert client.metric("mor_accepted_completions_total") == client.metric("mor_completions_total") > 30
        assert compilations() == before
        assert max(clients.waits) < soak.LONGEST_WAIT
        assert client.metric("mor_preemptions_total") > 0 and client.metric("mor_prefix_hits_total") > 0
    engine = client.server.service._thread._engine
    assert isinstance(engine, Engine)
    assert engine._places.book.seated == [0, 0] and not engine.busy


def test_a_server_that_misbehaves_is_told_from_a_good_one():
    """What the soak would say of servers that leak, recompile, grow, or cut their answers."""
    good = {
        "violations": [], "held_at_the_end": {"mor_pages_used": 0}, "accepted_completions": 5, "ended_completions": 5,
        "compilations_under_load": 0, "rss_growth": 0.001, "waits": {"longest": 1.0},
        "before": {"rss_mib": 1, "threads": 9},
        "after": {"rss_mib": 2, "threads": 9}, "sigterm": {"exit_code": 0, "outcomes": ["answered"]},
    }  # fmt: skip
    assert soak.judge(good) == []
    for wrong in (
        {"violations": ["stream: cut"]}, {"held_at_the_end": {"mor_pages_used": 1}}, {"ended_completions": 4},
        {"compilations_under_load": 1}, {"rss_growth": 0.2}, {"waits": {"longest": 99.0}},
        {"after": {"rss_mib": 2, "threads": 10}},
        {"sigterm": {"exit_code": 143, "outcomes": []}}, {"sigterm": {"exit_code": 0, "outcomes": ["OSError"]}},
    ):  # fmt: skip
        assert len(soak.judge(good | wrong)) == 1
    for received in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", b"HTTP/1.1 200"):
        with pytest.raises(soak_client.Violation):
            soak_client.Response.parse(received)
    with pytest.raises(soak_client.Violation):
        soak_client._joined(b'data: {"choices": []}\n\n')


def test_a_run_without_a_template_is_served_with_one(tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    copy.mkdir()
    Tokenizer.bytes_level().save(run / "tokenizer.json")
    assert soak.with_template(run, copy) == copy
    tokenizer = Tokenizer.load(copy / "tokenizer.json")
    assert tokenizer.special.chat_template == soak.TEMPLATE
    tokenizer.save(run / "tokenizer.json")
    assert soak.with_template(run, copy) == run
