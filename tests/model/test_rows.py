"""What attention sees of packed rows: positions against a literal table, and what follows from each choice."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import ModelConfig
from mor_jax.errors import UserError
from mor_jax.model.forward import forward
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import init_params

ROW = ModelConfig(
    vocab_size=11, num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=12, context_length=7,
    dtype="float32", init_std=0.3,
)  # fmt: skip
MASKED = dataclasses.replace(ROW, attend_across_documents=False)
PACKED = {
    "tokens": np.array([[3, 1, 4, 1, 5, 9, 2, 0], [6, 5, 3, 5, 8, 0, 0, 0]], np.int32),
    "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 3, 3], [1, 2, 2, 2, 2, 0, 0, 0]], np.int32),
    "positions": np.array([[0, 1, 2, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 0, 0, 0]], np.int32),
}
OF_ROW = [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
OF_DOCUMENT = [[0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 2, 3, 0, 0]]


def _with(config: ModelConfig, positions: str) -> ModelConfig:
    return dataclasses.replace(config, rotary_positions=positions)


def _logits(config: ModelConfig, **given: Any) -> np.ndarray:
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    tokens_BT = PACKED["tokens"][:, :-1]
    return np.asarray(jax.jit(lambda params: forward(config, params, tokens_BT, **given).logits)(params))


@pytest.mark.parametrize(("positions", "table"), [("row", OF_ROW), ("document", OF_DOCUMENT)])
@pytest.mark.parametrize("across", [True, False])
def test_positions_and_documents_of_packed_rows(positions, table, across):
    config = dataclasses.replace(ROW, rotary_positions=positions, attend_across_documents=across)
    view = Rows.of_batch(PACKED).view(config)
    assert view.positions_BC.tolist() == table and view.rows_BC.tolist() == OF_ROW
    assert (view.segments_BC is None) == across


@pytest.mark.parametrize("positions", ["row", "document"])
def test_positions_count_along_the_row_where_no_documents_are_told(positions):
    assert Rows(jnp.asarray(PACKED["tokens"][:, :-1])).view(_with(ROW, positions)).positions_BC.tolist() == OF_ROW


def test_the_choice_matters_only_where_attention_crosses_borders():
    given = {name: PACKED[name][:, :-1] for name in ("segment_ids", "positions")}
    across = [_logits(_with(ROW, positions), **given) for positions in ("row", "document")]
    masked = [_logits(_with(MASKED, positions), **given) for positions in ("row", "document")]
    np.testing.assert_array_equal(across[0], _logits(ROW))  # the release's: one text
    assert np.abs(across[0] - across[1])[:, 3:5].max() > 1e-3
    np.testing.assert_allclose(masked[0], masked[1], atol=1e-5)


def test_documents_without_positions_are_refused_where_these_would_restart():
    with pytest.raises(UserError, match="segment_ids without positions: rotary_positions='document'"):
        _logits(_with(ROW, "document"), segment_ids=PACKED["segment_ids"][:, :-1])
