"""What ``mor bench http`` reports of a measurement: rates, latencies and errors, as JSON and as text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mor_jax.bench.http_client import Reply

_BUSY = 0.7
_LATENCIES = {
    "time_to_first_token_seconds": "time to first token",
    "time_per_output_token_seconds": "time per output token",
    "time_between_events_seconds": "time between events",
    "end_to_end_seconds": "end to end",
    "send_delay_seconds": "sent late by",
}


def summarize_replies(replies: Sequence[Reply], begin: float) -> dict[str, Any]:
    """Add the replies of one measurement up.

    Args:
        replies: of all requests sent.
        begin: when the measurement began, of ``time.perf_counter``.

    Returns:
        JSON-ready: counts, rates over the time from `begin` to the last answer, and mean, p50, p90 and p99 of
        latencies in seconds. Requests that failed count in `errors` and in the time alone.
    """
    good = [reply for reply in replies if not reply.error]
    seconds = max((reply.end for reply in replies), default=begin) - begin
    prompt, output, cached = (
        sum(getattr(reply, name) or 0 for reply in good) for name in ("prompt_tokens", "output_tokens", "cached_tokens")
    )
    events = sum(len(reply.texts) for reply in good)
    return {
        "seconds": seconds,
        "requests": len(replies),
        "completed": len(good),
        "errors": _errors(replies),
        "prompt_tokens": prompt,
        "cached_prompt_tokens": cached if any(reply.cached_tokens is not None for reply in good) else None,
        "output_tokens": output,
        "ended_early": sum((reply.output_tokens or 0) < reply.asked for reply in good),
        "tokens_per_event": output / events if events else None,
        "requests_per_second": len(good) / seconds if good else 0.0,
        "input_tokens_per_second": prompt / seconds if good else 0.0,
        "output_tokens_per_second": output / seconds if good else 0.0,
        "mean_in_flight": sum(reply.end - reply.sent for reply in replies) / seconds if replies else 0.0,
        "time_to_first_token_seconds": _spread([r.texts[0] - r.due for r in good if r.texts]),
        "time_per_output_token_seconds": _spread(
            [(r.end - r.texts[0]) / (n - 1) for r in good if r.texts and (n := r.output_tokens or 0) > 1]
        ),
        "time_between_events_seconds": _spread(np.concatenate([np.diff(r.texts) for r in good] or [[]])),
        "end_to_end_seconds": _spread([r.end - r.due for r in good]),
        "send_delay_seconds": _spread([r.sent - r.due for r in replies]),
        "replies": [_row(reply, begin) for reply in replies],
    }


def measurement_text(result: Mapping[str, Any]) -> str:
    """Lay one measurement out for a terminal."""
    load = (
        f"open loop, {result['rate']:g} requests/s"
        if "rate" in result
        else f"closed loop, {result['concurrency']} in flight"
    )
    cached = "" if result["cached_prompt_tokens"] is None else f" ({result['cached_prompt_tokens']:,} cached)"
    lines = [
        f"{load}: {result['completed']} of {result['requests']} requests in {result['seconds']:.2f} s",
        f"  {result['requests_per_second']:.2f} requests/s, {result['input_tokens_per_second']:,.0f} input tokens/s, "
        f"{result['output_tokens_per_second']:,.0f} output tokens/s",
        f"  {result['prompt_tokens']:,} input tokens{cached}, {result['output_tokens']:,} output tokens, "
        f"{result['tokens_per_event'] or 0:.2f} an event, {result['mean_in_flight']:.1f} requests in flight on average",
        f"  {'ms':24s}" + "".join(f"{name:>10s}" for name in ("mean", "p50", "p90", "p99")),
    ]
    for name, shown in _LATENCIES.items():
        if result[name] and (name != "send_delay_seconds" or "rate" in result):
            lines.append(f"  {shown:24s}" + "".join(f"{value * 1e3:10.2f}" for value in result[name].values()))
    for kind, error in result["errors"].items():
        lines.append(f"  failed: {error['count']} x {kind}, such as: {error['example']}")
    if result["ended_early"]:
        lines.append(f"  note: {result['ended_early']} completions are shorter than asked")
    if result["client_cpu"] > _BUSY:
        lines.append(
            f"  note: this client was busy {result['client_cpu']:.0%} of the time: it may be what limits the figures"
        )
    return "\n".join(lines)


def _errors(replies: Sequence[Reply]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for reply in replies:
        if reply.error:
            found.setdefault(reply.error, {"count": 0, "example": reply.detail})["count"] += 1
    return found


def _spread(values: Sequence[float] | np.ndarray) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    return {"mean": float(np.mean(values))} | {f"p{q}": float(np.percentile(values, q)) for q in (50, 90, 99)}


def _row(reply: Reply, begin: float) -> dict[str, Any]:
    """One request, for those who want to see more than percentiles."""
    row: dict[str, Any] = {"sent": round(reply.sent - begin, 6), "seconds": round(reply.end - reply.due, 6)}
    if reply.error:
        return row | {"error": reply.error}
    first = round(reply.texts[0] - reply.due, 6) if reply.texts else None
    return row | {
        "first_token": first, "prompt_tokens": reply.prompt_tokens, "output_tokens": reply.output_tokens
    }  # fmt: skip
