"""Open a run for evaluation: its configuration, tokenizer and newest good checkpoint, on one device."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax

from mor_jax import config_io
from mor_jax.array_types import Params
from mor_jax.config import Config, MeshConfig
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError, require
from mor_jax.parallel import make_mesh
from mor_jax.train.checkpoint import Checkpoints
from mor_jax.train.state import abstract_train_state


@dataclass(frozen=True)
class RestoredRun:
    """A run as evaluation needs it."""

    config: Config
    params: Params
    router_bias_R: jax.Array
    """float32 [R]: loss-free bias of token-choice; zeros otherwise."""
    tokenizer: Tokenizer
    step: int
    """Optimiser steps behind the parameters."""


def restore_run(run_folder: Path) -> RestoredRun:
    """Restore a run that ``mor train`` wrote, whatever mesh it was trained on.

    Args:
        run_folder: holds config.json, tokenizer.json and checkpoints/.

    Returns:
        The run, its arrays on the first device.

    Raises:
        UserError: no run there, no good checkpoint, or a tokenizer larger than the model's vocabulary.
    """
    require(run_folder.is_dir(), f"{run_folder} is not a run folder")
    config = config_io.load(Config, run_folder / "config.json")
    tokenizer = Tokenizer.load(run_folder / "tokenizer.json")
    require(
        tokenizer.vocab_size <= config.model.vocab_size,
        f"{run_folder / 'tokenizer.json'} has vocab_size={tokenizer.vocab_size}, "
        f"more than model.vocab_size={config.model.vocab_size}",
    )
    folder = run_folder / "checkpoints"
    require(folder.is_dir(), f"{run_folder} holds no checkpoints")
    local = dataclasses.replace(config, mesh=MeshConfig())
    mesh = make_mesh(local.mesh, jax.local_devices()[:1])
    checkpoints = Checkpoints(folder, keep=config.train.keep, pinned_steps=config.train.pinned_steps)
    try:
        restored = checkpoints.restore(abstract_train_state(local, mesh))
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"{folder} holds no complete checkpoint")
    state = restored.state
    return RestoredRun(local, state.params, state.router_bias_R, tokenizer, int(state.step))
