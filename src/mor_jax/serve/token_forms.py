"""OpenAI's forms of tokens and their log-probabilities."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.infer.request import PromptScores, Ranked
from mor_jax.serve.job import Piece


class TokenForms:
    """How the tokens of a model are told.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def raw(self, token: int) -> bytes:
        """Bytes of a token; of a special one those of its name."""
        if token >= self._tokenizer.vocab_size:
            return b""  # pads the vocabulary; only a prompt can hold it
        return self._tokenizer.token_bytes(token) or self._tokenizer.token_text(token).encode()

    def name(self, token: int) -> str:
        """Text of a token; of one that is no text its bytes, as OpenAI spells them."""
        raw = self.raw(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def of_completion(self, pieces: Iterable[Piece], offset: int) -> dict[str, list[Any]]:
        """The field ``logprobs`` of a completion's tokens, whose text begins at ``offset``."""
        form: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for piece in pieces:
            form["tokens"].append(self.name(piece.token))
            form["token_logprobs"].append(piece.log_probability)
            form["top_logprobs"].append(self._named((*piece.alternatives, (piece.token, piece.log_probability))))
            form["text_offset"].append(offset)
            offset += len(piece.text)
        return form

    def of_prompt(self, prompt: Sequence[int], scores: PromptScores) -> dict[str, list[Any]]:
        """The same of a prompt: before the first token there is nothing that could foretell it."""
        values = [None, *scores.log_probabilities]
        tops: list[Any] = [None]
        for nth, (token, value) in enumerate(zip(prompt[1:], scores.log_probabilities, strict=True)):
            ranked = scores.alternatives[nth] if scores.alternatives else ()
            tops.append(self._named((*ranked, (token, value))))
        decoder, offset, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
        for token in prompt:
            offsets.append(offset)
            offset += len(decoder.decode(b"" if token >= self._tokenizer.vocab_size else self._plain(token)))
        return {
            "tokens": list(map(self.name, prompt)), "token_logprobs": values, "top_logprobs": tops,
            "text_offset": offsets,
        }  # fmt: skip

    def of_chat(self, pieces: Iterable[Piece], count: int) -> dict[str, Any]:
        """The field ``logprobs`` of a chat's answer, with the ``count`` most likely tokens."""
        content = []
        for piece in pieces:
            tops = [self._entry(token, value) for token, value in piece.alternatives[:count]]
            content.append(self._entry(piece.token, piece.log_probability) | {"top_logprobs": tops})
        return {"content": content, "refusal": None}

    def _plain(self, token: int) -> bytes:
        return self._tokenizer.token_bytes(token)

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self.name(token), "logprob": value, "bytes": list(self.raw(token))}

    def _named(self, ranked: Ranked) -> dict[str, float]:
        """By name; of tokens that share one, the likeliest."""
        form: dict[str, float] = {}
        for token, value in ranked:
            form.setdefault(self.name(token), value)
        return form


def show_token(piece: Piece) -> dict[str, Any]:
    """The extension ``show_depth``."""
    return {"id": piece.token, "text": piece.text, "depth": piece.depth, "logprob": piece.log_probability}
