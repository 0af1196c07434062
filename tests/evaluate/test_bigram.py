"""The byte bigram against literal counts, and on exactly the targets of the model."""

import math

import numpy as np
import pytest
from evaluation_examples import Bytes, HeldOut, batch, config, weights

from mor_jax.evaluate.bigram import END, SYMBOLS, ByteBigram, ByteRows, bigram_bits_per_byte, count_bigrams
from mor_jax.evaluate.validation import validation_losses

A, B = ord("a"), ord("b")


class Pairs(Bytes):
    """257 more tokens: 257 stands for "ab"."""

    vocab_size = 258

    def token_bytes(self, token: int) -> bytes:
        return b"ab" if token == 257 else super().token_bytes(token)


def test_probabilities_are_witten_bell():
    bigram = ByteBigram()
    bigram.add(np.array([A, B, A, B, A, A]))
    p = bigram.probabilities()
    np.testing.assert_allclose(p.sum(axis=1), 1.0)
    unigram_b = (2 + 1) / (5 + SYMBOLS)
    np.testing.assert_allclose(p[A, B], (2 + 2 * unigram_b) / (3 + 2))  # "a" was followed by two different symbols
    np.testing.assert_allclose(p[ord("z"), B], unigram_b)  # never seen before
    assert p.min() > 0


def test_a_learned_text_costs_less_than_a_uniform_model():
    bigram = ByteBigram()
    bigram.add(np.tile([A, B], 500))
    bits = -np.log2(bigram.probabilities()[A, B])
    assert bits < 0.1


def test_rows_are_spelled_in_bytes_with_document_ends():
    symbols, mask = ByteRows(Pairs()).symbols(np.array([257, A, 256, B]), np.array([False, True, True, False]))
    assert symbols.tolist() == [A, B, A, END, B]
    assert mask.tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("across", [True, False])
def test_it_predicts_exactly_the_bytes_that_the_model_predicts(across):
    cfg = config("none", across=across)
    rows = HeldOut(batch(0), batch(1, padding=3))
    bits = bigram_bits_per_byte(cfg.model, ByteBigram(), rows.batches, rows.tokenizer, 4)
    losses = validation_losses(weights(cfg), cfg.perf, rows, 4)
    assert bits.bytes == losses["validation_bytes"]
    np.testing.assert_allclose(bits.bits, losses["validation_tokens"] * math.log2(SYMBOLS))  # nothing was counted
    assert bits.value == bits.bits / bits.bytes


def test_counting_reads_the_rows_asked_for():
    rows = HeldOut(batch(0), batch(1))
    model = config("none").model
    one, three = (count_bigrams(model, rows.batches, rows.tokenizer, n).counts.sum() for n in (1, 3))
    assert (one, three) == (16, 48)
    counts = count_bigrams(model, rows.batches, rows.tokenizer, 4).counts
    tokens = batch(0)["tokens"]
    assert counts[tokens[0, 0], tokens[0, 1]] >= 1
