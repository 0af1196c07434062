"""Log-likelihood of every target token, causally and whatever else is in the batch.

The selection is causal: `threshold` for expert-choice, and token-choice without seats (execution `scan`), so that
neither later tokens nor padding nor other rows can change a score. Letters: B rows, T positions, C positions of a
chunk, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mor_jax.array_types import Params
from mor_jax.config import MeshConfig, ModelConfig, PerfConfig
from mor_jax.errors import require
from mor_jax.evaluate.passes import Mode, run_trunk, spread
from mor_jax.evaluate.validation import threshold_refusal
from mor_jax.mesh.mesh import make_mesh, replicated
from mor_jax.mesh.processes import to_host
from mor_jax.model.parameters import head_matrix

_CHUNK = 128


@struct.dataclass
class TokenScores:
    """What a model says of every target, [B, T]."""

    nll_BT: Any
    """float32: negative log-likelihood in nats."""
    greedy_BT: Any
    """int32: the most likely token."""


def causal_mode(model: ModelConfig) -> Mode:
    """Return the selection mode under which no token depends on later ones.

    Raises:
        UserError: expert-choice without a boundary has none.
    """
    if model.routing.kind != "expert":
        return "topk"  # nothing compares tokens
    refusal = threshold_refusal(model)
    require(refusal is None, f"this model cannot be scored causally: {refusal}")
    return "threshold"


def scoring_perf(model: ModelConfig, perf: PerfConfig, mode: Mode) -> PerfConfig:
    """Return how to execute a pass that must not depend on the length of its rows.

    Seats of token-choice under `gather` are a share of the row's length, so it runs as `scan`; `threshold` does so in
    any case.
    """
    execution = perf.execution if mode == "topk" and model.routing.kind != "token" else "scan"
    return dataclasses.replace(perf, execution=execution, remat="none")


@cache
def score_pass(model: ModelConfig, perf: PerfConfig, mode: Mode) -> Any:
    """Return the compiled ``f(params, router_bias_R, inputs, targets_BT) -> TokenScores``; see ``inputs_of``."""

    @jax.jit
    def run(params: Params, router_bias_R: Any, inputs: Any, targets_BT: jax.Array) -> TokenScores:
        key = jax.random.key(0)
        hidden_BTD = run_trunk(model, perf, mode, params, router_bias_R, inputs, key).hidden_BTD
        head_VD = head_matrix(model, params).astype(hidden_BTD.dtype)

        def chunk(arguments: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            hidden_BCD, targets_BC = arguments
            logits_BCV = jnp.einsum("BCD,VD->BCV", hidden_BCD, head_VD, preferred_element_type=jnp.float32)
            picked_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
            nll_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - picked_BC
            return nll_BC, jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32)

        length = targets_BT.shape[1]
        nll_IBC, greedy_IBC = jax.lax.map(chunk, (_chunks(hidden_BTD), _chunks(targets_BT)))
        return TokenScores(nll_BT=_joined(nll_IBC, length), greedy_BT=_joined(greedy_IBC, length))

    return run


def _chunks(x_BTX: jax.Array) -> jax.Array:
    """Pad T to a multiple of the chunk and put the chunks first: [I, B, C, ...]."""
    batch, length, *rest = x_BTX.shape
    size = min(_CHUNK, length)
    padded = jnp.pad(x_BTX, [(0, 0), (0, -length % size)] + [(0, 0)] * len(rest))
    return jnp.moveaxis(padded.reshape(batch, -1, size, *rest), 1, 0)


def _joined(x_IBC: jax.Array, length: int) -> jax.Array:
    return jnp.moveaxis(x_IBC, 0, 1).reshape(x_IBC.shape[1], -1)[:, :length]


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
        model: the model.
        perf: how it is executed; see ``scoring_perf``.
        params: parameter tree.
        router_bias_R: loss-free bias of token-choice, or None.
        mode: selection mode; None is the causal one.
        all_devices: whether rows are split over all devices (of all processes, each of which passes all rows).

    Raises:
        UserError: no causal mode (see ``causal_mode``).
    """

    def __init__(
        self,
        model: ModelConfig,
        perf: PerfConfig,
        params: Params,
        router_bias_R: jax.Array | None = None,
        *,
        mode: Mode | None = None,
        all_devices: bool = True,
    ) -> None:
        self.model = model
        self.mode: Mode = causal_mode(model) if mode is None else mode
        self._run = score_pass(model, scoring_perf(model, perf, self.mode), self.mode)
        self._params, self._bias_R = params, router_bias_R
        self.devices = len(jax.devices()) if all_devices else 1
        if self.devices > 1:
            mesh = make_mesh(MeshConfig())
            self._params, self._bias_R = jax.device_put((params, router_bias_R), replicated(mesh))

    def __call__(self, batch: Mapping[str, np.ndarray]) -> TokenScores:
        """Score a batch of rows, int32 [B, T+1] ``tokens``, ``segment_ids`` and ``positions``: numpy [B, T]."""
        spread_batch = spread(self._params, batch)
        inputs = {name: spread_batch[name][:, :-1] for name in ("tokens", "segment_ids", "positions")}
        return to_host(self._run(self._params, self._bias_R, inputs, spread_batch["tokens"][:, 1:]))
