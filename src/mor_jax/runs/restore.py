"""Open a run for evaluation: its configuration, tokenizer and the weights of its newest checkpoint, on one device."""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from mor_jax.array_types import Params
from mor_jax.config import Config, MeshConfig, ModelConfig
from mor_jax.config import io as config_io
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError, require
from mor_jax.mesh.devices import Device
from mor_jax.model.cut import cut_params
from mor_jax.model.parameters import Weights
from mor_jax.model.routing.boundaries import listed
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.state import abstract_model_state

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RestoredRun:
    """A run as evaluation needs it."""

    config: Config
    """Of the run; inside a stage of ``train.growth``, as if it trained that stage's model throughout."""
    params: Params
    router_bias_R: jax.Array
    """float32 [R]: loss-free bias of token-choice; zeros otherwise."""
    tokenizer: Tokenizer
    step: int
    """Optimiser steps behind the parameters."""
    boundaries_R: jax.Array | None = None
    """float32 [R]: running boundaries of expert-choice; None where training kept none."""

    @property
    def weights(self) -> Weights:
        """The model to evaluate."""
        return Weights(self.config.model, self.params, self.router_bias_R, self.boundaries_R)

    @property
    def boundaries(self) -> tuple[float, ...] | None:
        """What `threshold` of expert-choice compares with, as `--boundaries` takes it; None where 0 was trained."""
        routing = self.config.model.routing
        if routing.boundaries is not None or self.boundaries_R is None:
            return routing.boundaries
        return tuple(listed(self.config.model, self.boundaries_R))


def restore_run(run_folder: Path, *, device: Device | None = None) -> RestoredRun:
    """Restore the weights of a run that ``mor train`` wrote, whatever it was trained on.

    The optimiser's state is not read. Nothing in the folder is changed, so the run may be training meanwhile. A run
    still inside a stage of ``train.growth`` is the model of that stage: of the rest nothing is trained yet.

    Args:
        run_folder: holds config.json, tokenizer.json and checkpoints/.
        device: where the arrays go; None is the first local device.

    Returns:
        The run.

    Raises:
        UserError: no run there, no checkpoint with good weights, or a tokenizer larger than the model's vocabulary.
    """
    require(run_folder.is_dir(), f"{run_folder} is not a run folder")
    folder = run_folder / "checkpoints"
    require(folder.is_dir(), f"{run_folder} holds no checkpoints (a model of another kind: `mor convert` it first)")
    config = config_io.load(Config, run_folder / "config.json")
    tokenizer = load_tokenizer(run_folder, config.model)
    # the kernels that it was trained with need not run here
    perf = dataclasses.replace(config.perf, attention_backend="auto", fusion="auto")
    local = dataclasses.replace(config, mesh=MeshConfig(), perf=perf)
    placement = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
    checkpoints = Checkpoints(folder, keep=1, read_only=True)  # the run may be training
    try:
        state = checkpoints.restore_model(abstract_model_state(config.model, placement))
    finally:
        checkpoints.close()
    if state is None:
        raise UserError(f"{folder} holds no complete checkpoint")
    params, step = state.params, int(state.step)
    stage = config.stage_after(step)
    if stage.model != config.model:
        _log.info("step %d of %d is of a stage of train.growth: %s", step, config.train.steps, stage.description)
        local, params = local.of_stage(stage), cut_params(config.model, stage.model, params)
    boundaries_R = _known(local.model, state.boundaries_R)
    return RestoredRun(local, params, state.router_bias_R, tokenizer, step, boundaries_R)


def _known(model: ModelConfig, boundaries_R: jax.Array) -> jax.Array | None:
    """Running boundaries, or None for a model without, and for a run that trained before they were kept."""
    if not model.routing.keeps_boundaries:
        return None
    if np.all(np.isnan(boundaries_R)):
        _log.info("its training kept no running boundaries: `threshold` is what the auxiliary loss or calibration says")
        return None
    return boundaries_R


def load_tokenizer(folder: Path, model: ModelConfig) -> Tokenizer:
    """Read the tokenizer of a folder.

    Raises:
        UserError: it cannot be read, or is larger than the model's vocabulary.
    """
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    require(
        tokenizer.vocab_size <= model.vocab_size,
        f"{folder / 'tokenizer.json'} has vocab_size={tokenizer.vocab_size}, "
        f"more than model.vocab_size={model.vocab_size}",
    )
    return tokenizer
