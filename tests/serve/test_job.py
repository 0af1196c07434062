"""What a request's client gets of the tokens that were there before the request failed."""

import asyncio

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.infer.growing_text import GrowingText
from mor_jax.infer.request import Request
from mor_jax.serve.http_errors import ApiError
from mor_jax.serve.job import Job, Piece, PromptSequence, Update


def _taken(update, error):
    """Tokens that come out of a job of one sequence, and the error after them."""
    job, tokens, request = Job(0.0), [], Request((1,), 9)
    job.sequences = [PromptSequence(job, 0, request, GrowingText(Tokenizer.bytes_level()))]

    async def take():
        job.add(0, update)
        job.fail(error)
        async for updates in job.updates():
            tokens.extend(piece.token for piece in updates[0].pieces)

    try:
        asyncio.run(take())
    except ApiError as raised:
        return tokens, raised
    return tokens, None


ENDED = ApiError(503, "the server has shut down")


def test_tokens_come_before_the_error():
    assert _taken(Update([Piece("a", 7, 1, -0.5, 0.0)]), ENDED) == ([7], ENDED)


def test_what_was_finished_does_not_fail():
    assert _taken(Update([Piece("a", 7, 1, -0.5, 0.0)], finish="length"), ENDED) == ([7], None)
