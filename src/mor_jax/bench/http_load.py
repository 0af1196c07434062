"""``mor bench http``: puts load on an OpenAI-compatible server, closed loop or open, and reports what came of it.

Closed loop: a fixed number of requests in flight, each followed by the next. Open loop: requests come as a Poisson
process whether or not earlier ones are answered, and latencies count from the moment at which each was due.
"""

import contextlib
import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from mor_jax.bench.http_client import NO_ANSWER, HttpClient, Reply
from mor_jax.bench.http_prompts import Draft, arrivals, draw, fingerprint
from mor_jax.bench.http_report import summarize_replies
from mor_jax.bench.http_settings import HttpSettings
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError, reason, require, shown, suggest
from mor_jax.versions import installed_versions


@dataclass(frozen=True)
class Target:
    """A server that has answered."""

    client: HttpClient
    model: str
    fields: Mapping[str, Any]
    """Of every request."""

    def body(self, draft: Draft) -> bytes:
        """Write a request."""
        fixed = {"model": self.model, "prompt": draft.prompt, "max_tokens": draft.max_tokens, "stream": True}
        return json.dumps(fixed | {"stream_options": {"include_usage": True}} | dict(self.fields)).encode()


def bench_http(
    url: str,
    settings: HttpSettings,
    *,
    model: str | None,
    key: str,
    command: Sequence[str],
    done: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure a server under every load that the settings name.

    Args:
        url: of the server.
        settings: of all measurements.
        model: its name at the server; None takes the only one.
        key: for `Authorization`; empty sends none.
        command: what the user ran, for the record.
        done: called with the whole record after every measurement.

    Returns:
        JSON-ready record.

    Raises:
        UserError: the server cannot be reached, does not know the model, does not stream, or counts no tokens.
    """
    tokenizer = None if settings.tokenizer is None else Tokenizer.load(settings.tokenizer)
    with contextlib.closing(HttpClient(url, key, settings.timeout)) as client:
        models, server = _ask_models(client, model)
        target = Target(client, _choose(models, model, client.url), settings.further_fields)
        tells_usage = _warm_up(target, draw(settings, -1, tokenizer), models, tokenizer)
        record: dict[str, Any] = {
            "command": shlex.join(command),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "url": client.url,
            "model": target.model,
            "server": server,
            "settings": asdict(settings) | {"tokenizer": settings.tokenizer and str(settings.tokenizer)},
            "token_counts": "usage" if tells_usage else "tokenizer",
            "versions": {"python": platform.python_version(), **installed_versions(("mor-jax",))},
            "machine": {"system": platform.platform(), "cpus": os.cpu_count()},  # the client's
            "measurements": [],
        }
        for number, (kind, value) in enumerate(settings.loads):
            drafts = draw(settings, number, tokenizer)
            due = arrivals(settings, number, value) if kind == "rate" else None
            record["measurements"].append(
                {kind: value, **_measure(target, drafts, due, int(value), settings, tokenizer)}
            )
            done(record)
    return record


def _measure(
    target: Target,
    drafts: Sequence[Draft],
    due: Sequence[float] | None,
    at_once: int,
    settings: HttpSettings,
    tokenizer: Tokenizer | None,
) -> dict[str, Any]:
    requests = [(target.body(draft), draft.max_tokens) for draft in drafts]
    begin, work = time.perf_counter(), time.process_time()
    replies = put_load(target.client, requests, due=due, at_once=at_once, seconds=settings.seconds)
    share = (time.process_time() - work) / (time.perf_counter() - begin)
    for reply, draft in zip(replies, drafts, strict=False):  # those beyond settings.seconds were not sent
        if tokenizer is not None and reply.output_tokens is None and not reply.error:
            reply.prompt_tokens = len(tokenizer.encode(draft.prompt))
            reply.output_tokens = len(tokenizer.encode(reply.text, around=False))
    sent = fingerprint(drafts[: len(replies)])
    return {**summarize_replies(replies, begin), "client_cpu": share, "prompts_sha256": sent}


def put_load(
    client: HttpClient,
    requests: Sequence[tuple[bytes, int]],
    *,
    due: Sequence[float] | None,
    at_once: int,
    seconds: float | None,
) -> list[Reply]:
    """Send requests and wait for all that were sent.

    Args:
        client: of the server.
        requests: bodies, and the tokens that each asks for, in order.
        due: seconds from now at which each is sent; None sends the next when one is answered.
        at_once: requests in flight, if `due` is None.
        seconds: after these no more are sent; None sends all.

    Returns:
        Replies of those sent, in order.
    """
    begin = time.perf_counter()
    limit = float("inf") if seconds is None else begin + seconds

    def one(index: int, when: float | None) -> Reply | None:
        if when is None and time.perf_counter() > limit:
            return None
        return client.complete(*requests[index], when)

    futures = []
    pool = ThreadPoolExecutor(at_once if due is None else len(requests))  # a thread is started if none is free
    try:
        for index in range(len(requests)):
            when = None if due is None else begin + due[index]
            if when is not None:
                if when > limit:
                    break
                time.sleep(max(0.0, when - time.perf_counter()))
            futures.append(pool.submit(one, index, when))
        return [reply for reply in (future.result() for future in futures) if reply is not None]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for what is under way
        client.close()
        pool.shutdown()


def _ask_models(client: HttpClient, model: str | None) -> tuple[list[str], dict[str, Any]]:
    """Ask what is served: names of models, and what the server tells about itself."""
    try:
        status, headers, body = client.get("/v1/models")
        found, _, release = client.get("/version")  # vLLM tells it here
    except NO_ANSWER as error:
        raise UserError(f"{client.url} cannot be reached: {reason(error)}") from error
    entries = body.get("data") if isinstance(body, dict) else None
    entries = [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    if status in (401, 403):
        raise UserError(f"{client.url}: HTTP {status}: it wants a key, which is taken from OPENAI_API_KEY")
    if status != 200 and model is None:
        raise UserError(f"{client.url}/v1/models: HTTP {status}: no server of OpenAI's form, or name its --model")
    told = {"server": headers.get("Server"), "version": release if found == 200 else None, "models": entries[:8]}
    return [str(entry["id"]) for entry in entries if "id" in entry], told


def _choose(models: list[str], model: str | None, url: str) -> str:
    if model is not None:
        return model
    require(bool(models), f"{url}/v1/models names no model: name it by --model")
    require(len(models) == 1, f"{url} has {len(models)} models: choose one by --model ({', '.join(models[:8])})")
    return models[0]


def _warm_up(target: Target, drafts: Sequence[Draft], models: list[str], tokenizer: Tokenizer | None) -> bool:
    """Send the first requests; whether the server tells `usage`, and an error if it cannot be measured."""
    first, *rest = drafts
    reply = target.client.complete(target.body(first), first.max_tokens)
    if reply.error:
        known = "" if target.model in models or not models else f" (it has {', '.join(models[:8])})"
        known += suggest(target.model, models) if known else ""
        if "ignore_eos" in reply.detail and "ignore_eos" in target.fields:
            known += "; --no-ignore-eos leaves that field out"
        raise UserError(f"{target.client.url}, model {shown(target.model)}: {reply.detail}{known}")
    usage = reply.output_tokens is not None
    require(
        usage or tokenizer is not None,
        f"{target.client.url} sends no `usage` with a stream: give the model's --tokenizer to count tokens",
    )
    for draft in rest:
        target.client.complete(target.body(draft), draft.max_tokens)
    return usage
