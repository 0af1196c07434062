"""A byte-bigram language model to compare with: Witten-Bell interpolation with an add-one unigram model.

P(b | a) = (c(ab) + d(a) P(b)) / (c(a) + d(a)), where d(a) is how many different symbols followed a, and
P(b) = (c(b) + 1) / (n + 257). The 257th symbol ends a document. References: Witten and Bell, The zero-frequency
problem (1991).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.evaluate.passes import Tokenizer
from mor_jax.model.loss import target_mask

END = 256
SYMBOLS = 257


@dataclass(frozen=True)
class BitsPerByte:
    """Loss of a model on held-out text."""

    bits: float
    """Bits of all predicted symbols, document ends included."""
    bytes: int
    """Predicted bytes, document ends excluded."""

    @property
    def value(self) -> float:
        """Bits per byte."""
        return self.bits / self.bytes


class ByteRows:
    """Turns packed rows of tokens back into the symbols that they stand for.

    Args:
        tokenizer: of the rows; its ``eos_id`` becomes ``END``.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = [
            np.array([END], np.int64)
            if i == tokenizer.eos_id
            else np.frombuffer(tokenizer.token_bytes(i), np.uint8).astype(np.int64)
            for i in range(tokenizer.vocab_size)
        ]

    def symbols(self, tokens_T: np.ndarray, mask_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Spell a row.

        Args:
            tokens_T: int tokens.
            mask_T: bool, which tokens count as predictions.

        Returns:
            (symbols int64 [S], bool [S]: the same of every symbol).
        """
        pieces = [self._pieces[token] for token in tokens_T]
        return np.concatenate(pieces), np.repeat(mask_T, [len(piece) for piece in pieces])


class ByteBigram:
    """Counts of adjacent symbols and the probabilities made of them."""

    def __init__(self) -> None:
        self.counts = np.zeros((SYMBOLS, SYMBOLS), np.int64)

    def add(self, symbols: np.ndarray) -> None:
        """Count the pairs of a text, int64 symbols 0..256."""
        pairs = symbols[:-1] * SYMBOLS + symbols[1:]
        self.counts += np.bincount(pairs, minlength=SYMBOLS**2).reshape(SYMBOLS, SYMBOLS)

    def probabilities(self) -> np.ndarray:
        """P(next | previous): float64 [257, 257], rows adding up to 1."""
        followers = self.counts.sum(axis=0)
        unigram = (followers + 1) / (followers.sum() + SYMBOLS)
        total = self.counts.sum(axis=1, keepdims=True)
        different = np.maximum((self.counts > 0).sum(axis=1, keepdims=True), 1)
        return (self.counts + different * unigram[None, :]) / (total + different)


def count_bigrams(model: ModelConfig, batches: Iterable[Any], tokenizer: Tokenizer, rows: int) -> ByteBigram:
    """Count the first ``rows`` rows of packed training batches (int [B, T+1], as the trainer reads them)."""
    bigram, spell = ByteBigram(), ByteRows(tokenizer)
    for tokens, _ in _rows(model, batches, rows):
        bigram.add(spell.symbols(tokens, np.ones(len(tokens), bool))[0])
    return bigram


def bigram_bits_per_byte(
    model: ModelConfig, bigram: ByteBigram, batches: Iterable[Any], tokenizer: Tokenizer, rows: int
) -> BitsPerByte:
    """Measure the bigram model on exactly the target tokens that ``validation_losses`` counts.

    Args:
        model: says which targets count.
        bigram: counted on training text.
        batches: packed held-out batches, int [B, T+1].
        tokenizer: of the rows.
        rows: rows to measure.
    """
    bits_table = -np.log2(bigram.probabilities())
    spell, bits, count = ByteRows(tokenizer), [], 0
    for tokens, mask in _rows(model, batches, rows):
        symbols, predicted = spell.symbols(tokens, mask)
        keep = predicted[1:]
        bits.append(float(bits_table[symbols[:-1], symbols[1:]][keep].sum()))
        count += int(np.count_nonzero(symbols[1:][keep] != END))
    return BitsPerByte(bits=math.fsum(bits), bytes=count)


def _rows(model: ModelConfig, batches: Iterable[Any], rows: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Yield (tokens, whether each is a target) of every row, padding cut off."""
    done = 0
    for batch in batches:
        segments = np.asarray(batch["segment_ids"])
        mask = np.concatenate([np.zeros((len(segments), 1), bool), np.asarray(target_mask(model, segments))], axis=1)
        for tokens_T, segments_T, mask_T in zip(np.asarray(batch["tokens"]), segments, mask, strict=True):
            if done == rows:
                return
            done += 1
            yield tokens_T[segments_T > 0], mask_T[segments_T > 0]
