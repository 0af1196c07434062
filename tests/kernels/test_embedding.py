"""Embedding rows: what is looked up, and a gradient that many places of one word do not spoil."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.kernels.embedding import look_up

WORDS, PLACES, WIDTH = 5, 4096, 8


def test_rows_are_those_of_the_table_and_outside_its_nearest() -> None:
    table_VD = jnp.arange(WORDS * WIDTH, dtype=jnp.float32).reshape(WORDS, WIDTH)
    found = look_up(table_VD, jnp.array([[3, 0, WORDS + 7, -2]]))
    np.testing.assert_array_equal(found, table_VD[jnp.array([[3, 0, WORDS - 1, 0]])])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_of_a_frequent_word_is_the_sum_over_its_places(dtype: str) -> None:
    generator = np.random.default_rng(0)
    tokens_BT = jnp.asarray(generator.integers(-1, WORDS + 1, size=(4, PLACES // 4)))
    gradient_BTD = jnp.asarray(generator.normal(0.3, 1.0, (4, PLACES // 4, WIDTH)), dtype)
    expected_VD = np.zeros((WORDS, WIDTH))
    np.add.at(expected_VD, np.clip(np.asarray(tokens_BT), 0, WORDS - 1), np.asarray(gradient_BTD, np.float64))

    _, transpose = jax.vjp(lambda table_VD: look_up(table_VD, tokens_BT), jnp.zeros((WORDS, WIDTH), dtype))
    (found_VD,) = transpose(gradient_BTD)
    assert found_VD.dtype == dtype
    error = np.linalg.norm(np.asarray(found_VD, np.float64) - expected_VD) / np.linalg.norm(expected_VD)
    assert error < {"float32": 1e-5, "bfloat16": 3e-3}[dtype]  # summed in bfloat16: 0.03
