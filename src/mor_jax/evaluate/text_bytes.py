"""Bytes of text that tokens stand for, so that bits per byte count the text and not what a tokenizer adds to it.

A token may stand for other bytes at the beginning of a text than inside it: Llama 2, Metaspace and GPT-2's
`add_prefix_space` put a space before a text, and WordPiece leaves the spaces between words out of its tokens. Letters:
V vocabulary, B rows, T positions.
"""

from typing import Any

import numpy as np

_PROBE = "Ab cd, ef\n\t12  \N{LATIN SMALL LETTER E WITH ACUTE}\N{GRINNING FACE}."
"""Holds what tokenizers change: case, spaces, line ends, characters of several bytes."""


def token_lengths(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """Return the bytes of every token inside a text, and at the beginning of one: int32 [2, V].

    Where the tokens of a text spell it, these are the tokens' own bytes, and added up they are the text's, but for a
    text that begins with a space of its own which the tokenizer does not tell from the one that it adds. Otherwise
    (WordPiece, normalised text) they are the bytes by which a token lengthens the decoded text.

    Args:
        tokenizer: see ``passes.Tokenizer``; with ``decode`` where its tokens do not spell texts.
        vocab_size: of the model; entries beyond the tokenizer's vocabulary count 0, as end-of-text does.
    """
    known = [i for i in range(min(tokenizer.vocab_size, vocab_size)) if i != tokenizer.eos_id]
    lengths_2V = np.zeros((2, vocab_size), np.int32)
    spelled, text = b"".join(map(tokenizer.token_bytes, tokenizer.encode(_PROBE))), _PROBE.encode()
    if spelled in (text, b" " + text):
        added = len(spelled) - len(text)
        for i in known:
            own = tokenizer.token_bytes(i)
            lengths_2V[:, i] = len(own), len(own) - (added if own.startswith(b" ") else 0)
        return lengths_2V
    anchor = [i for i in tokenizer.encode("a") if tokenizer.token_bytes(i)][-1:]  # no special token at its end
    before = _decoded_length(tokenizer, anchor)
    for i in known:
        own = len(tokenizer.token_bytes(i))  # of an incomplete character, which decodes to something else
        inside, first = _decoded_length(tokenizer, [*anchor, i]), _decoded_length(tokenizer, [i])
        lengths_2V[:, i] = own if inside is None or first is None else (max(0, inside - (before or 0)), first)
    return lengths_2V


def _decoded_length(tokenizer: Any, tokens: list[int]) -> int | None:
    text = tokenizer.decode(tokens)
    return None if "\N{REPLACEMENT CHARACTER}" in text else len(text.encode("utf-8"))


def target_bytes(lengths_2V: Any, tokens: Any, positions: Any) -> Any:
    """Return the bytes of every target of a batch.

    Args:
        lengths_2V: of ``token_lengths``.
        tokens: int [B, T+1], numpy or jax.
        positions: int [B, T+1], restarting with every document.

    Returns:
        int32 [B, T]. A text begins with a document's first token, or its second after one without bytes (BOS).
    """
    inside_V, first_V = lengths_2V
    before_BT, targets_BT, position_BT = tokens[:, :-1], tokens[:, 1:], positions[:, 1:]
    begins_BT = (position_BT == 0) | ((position_BT == 1) & (inside_V[before_BT] == 0))
    return first_V[targets_BT] * begins_BT + inside_V[targets_BT] * ~begins_BT
