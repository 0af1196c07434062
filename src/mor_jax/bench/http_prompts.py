"""Prompts for ``mor bench http``: words drawn from a fixed list, the same text for every server and machine."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mor_jax.bench.http_settings import HttpSettings, parse_lengths
from mor_jax.data.tokenizer import Tokenizer

WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which one you
were her all she there would their we him been has when who will more no if out so said what up its about into than them
can only other new some could time these two may then do first any my now such like our over man me even most made after
also did many before must through back years where much your way well down should because each just those people how too
little state good very make world still own see men work long get here between both life being under never day same
another know while last might us great old year off come since against go came right used take three
""".split()  # noqa: SIM905
"""Common English words: one token each in most vocabularies."""


@dataclass(frozen=True)
class Draft:
    """One request."""

    prompt: str
    max_tokens: int


def draw(settings: HttpSettings, measurement: int, tokenizer: Tokenizer | None = None) -> list[Draft]:
    """Draw the requests of one measurement; no two measurements share prompts, which a prefix cache would find.

    Args:
        settings: lengths, number and seed.
        measurement: which of them; -1 is the warm-up.
        tokenizer: counts the tokens; None counts words.
    """
    prompt, output = (parse_lengths(getattr(settings, name), name) for name in ("prompt_length", "output_length"))
    prefix = _text(Random(f"{settings.seed}/prefix"), settings.shared_prefix, tokenizer)
    drafts = []
    for index in range(settings.warmup if measurement < 0 else settings.requests):
        rng = Random(f"{settings.seed}/{measurement}/{index}")  # of a text: the same in every version of Python
        own = _text(rng, prompt(rng), tokenizer)
        drafts.append(Draft(f"{prefix} {own}" if prefix else own, output(rng)))
    return drafts


def arrivals(settings: HttpSettings, measurement: int, rate: float) -> list[float]:
    """Draw when the requests come, in seconds, with exponential times in between."""
    rng, time, times = Random(f"{settings.seed}/{measurement}/arrivals"), 0.0, []
    for _ in range(settings.requests):
        time += rng.expovariate(rate)
        times.append(time)
    return times


def fingerprint(drafts: Sequence[Draft]) -> str:
    """SHA-256 of prompts and lengths: equal where two servers were asked the same."""
    digest = hashlib.sha256()
    for draft in drafts:
        digest.update(f"{draft.max_tokens} {draft.prompt}\n".encode())
    return digest.hexdigest()


def _text(rng: Random, length: int, tokenizer: Tokenizer | None) -> str:
    """Draw so many words, or the most of them that have at most so many tokens."""
    words = rng.choices(WORDS, k=length)
    if tokenizer is None or not words:
        return " ".join(words)
    count = lambda n: len(tokenizer.encode(" ".join(words[:n]), around=False))  # noqa: E731
    return " ".join(words[: max(1, bisect_right(range(1, length + 1), length, key=count))])
