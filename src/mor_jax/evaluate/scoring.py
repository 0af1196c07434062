"""Log-likelihood of every target token, causally and whatever else is in the batch.

The selection is causal: `threshold` for expert-choice, and token-choice without seats (execution `scan`), so that
neither later tokens nor padding nor other rows can change a score. Letters: B rows, T positions, C positions of a
chunk, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from flax import struct

from mor_jax.config import MeshConfig, Mode, ModelConfig, PerfConfig, ResolvedPerf
from mor_jax.errors import require
from mor_jax.evaluate.passes import evaluation_perf, spread
from mor_jax.evaluate.validation import threshold_refusal
from mor_jax.mesh.mesh import make_mesh, replicated
from mor_jax.mesh.processes import to_host
from mor_jax.model.loss import batch_labels, token_scores
from mor_jax.model.parameters import Weights, head_matrix
from mor_jax.model.rows import Rows
from mor_jax.model.transformer import apply_trunk

_CHUNK = 128


@struct.dataclass
class TokenScores:
    """What a model says of every target, [B, T]."""

    nll_BT: Any
    """float32: negative log-likelihood in nats."""
    greedy_BT: Any
    """int32: the most likely token."""


def causal_mode(weights: Weights) -> Mode:
    """Return the selection mode under which no token depends on later ones.

    Raises:
        UserError: expert-choice without a boundary has none.
    """
    if weights.config.routing.kind != "expert":
        return "topk"  # nothing compares tokens
    refusal = threshold_refusal(weights)
    require(refusal is None, f"this model cannot be scored causally: {refusal}")
    return "threshold"


def scoring_perf(model: ModelConfig, perf: PerfConfig, mode: Mode) -> ResolvedPerf:
    """Return how to execute a pass that must not depend on the length of its rows.

    Seats of token-choice under `gather` are a share of the row's length, so it runs as `scan`; `threshold` does so in
    any case.
    """
    execution = perf.execution if mode == "topk" and model.routing.kind != "token" else "scan"
    return dataclasses.replace(evaluation_perf(perf), execution=execution)


@partial(jax.jit, static_argnames=("perf", "mode"))
def score_rows(weights: Weights, perf: ResolvedPerf, mode: Mode, rows: Rows, targets_BT: jax.Array) -> TokenScores:
    """Score the targets of rows of inputs, both [B, T]; ``perf`` is of ``scoring_perf``."""
    hidden_BTD = apply_trunk(weights, perf, rows, mode=mode).hidden_BTD
    head_VD, chunk = head_matrix(weights.config, weights.params), min(_CHUNK, targets_BT.shape[1])
    return TokenScores(*token_scores(hidden_BTD, head_VD, targets_BT, chunk=chunk))


class RowScorer(Protocol):
    """What scores rows: ``Scorer``, or a stand-in for it."""

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        ...

    @property
    def devices(self) -> int:
        """Devices that the rows of a batch are split over."""
        ...

    def __call__(self, batch: Mapping[str, np.ndarray]) -> TokenScores:
        """Score a batch of rows."""
        ...


class Scorer:
    """A model ready to score rows of tokens.

    Args:
        weights: the model.
        perf: of its run; see ``scoring_perf``.
        mode: selection mode; None is the causal one.
        all_devices: whether rows are split over all devices (of all processes, each of which passes all rows).

    Raises:
        UserError: no causal mode (see ``causal_mode``).
    """

    def __init__(
        self, weights: Weights, perf: PerfConfig, *, mode: Mode | None = None, all_devices: bool = True
    ) -> None:
        self.mode: Mode = causal_mode(weights) if mode is None else mode
        self._weights, self._perf = weights, scoring_perf(weights.config, perf, self.mode)
        self.devices = len(jax.devices()) if all_devices else 1
        if self.devices > 1:
            self._weights = jax.device_put(weights, replicated(make_mesh(MeshConfig())))

    @property
    def model(self) -> ModelConfig:
        """The model's configuration."""
        return self._weights.config

    def __call__(self, batch: Mapping[str, np.ndarray]) -> TokenScores:
        """Score a batch of rows, int32 [B, T+1] as ``batch_totals`` takes them: numpy [B, T]."""
        batch = spread(self._weights.params, batch)
        labels_BT, _ = batch_labels(self.model, batch)
        return to_host(score_rows(self._weights, self._perf, self.mode, Rows.of_batch(batch), labels_BT))
