"""Open a run for evaluation: its configuration, tokenizer and newest good checkpoint, on one device."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from mor_jax.array_types import Params
from mor_jax.config import Config, DataConfig, MeshConfig, ModelConfig
from mor_jax.config import io as config_io
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError, require
from mor_jax.interop import weights_folder as weights
from mor_jax.mesh.devices import Device
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.parameters import Weights, split_router_state
from mor_jax.model.transformer import init_params
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.state import abstract_train_state


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

    @property
    def weights(self) -> Weights:
        """The model to evaluate."""
        return Weights(self.config.model, self.params, self.router_bias_R)


def restore_run(run_folder: Path, *, device: Device | None = None) -> RestoredRun:
    """Restore a run that ``mor train`` wrote, whatever it was trained on, or weights that ``mor convert`` wrote.

    Nothing in the folder is changed, so the run may be training meanwhile.

    Args:
        run_folder: holds config.json, tokenizer.json and checkpoints/ (or, converted, model.safetensors).
        device: where the arrays go; None is the first local device.

    Returns:
        The run. Converted weights are at step 0, and their held-out text is the embedded one.

    Raises:
        UserError: no run there, no good checkpoint, or a tokenizer larger than the model's vocabulary.
    """
    require(run_folder.is_dir(), f"{run_folder} is not a run folder")
    device = device or jax.local_devices()[0]
    if weights.is_weights_folder(run_folder):
        return _restore_weights(run_folder, device)
    folder = run_folder / "checkpoints"
    require(folder.is_dir(), f"{run_folder} holds no checkpoints (a model of another kind: `mor convert` it first)")
    config = config_io.load(Config, run_folder / "config.json")
    tokenizer = _load_tokenizer(run_folder, config.model)
    # the kernels that it was trained with need not run here
    perf = dataclasses.replace(config.perf, attention_backend="auto", fusion="auto")
    local = dataclasses.replace(config, mesh=MeshConfig(), perf=perf)
    mesh = make_mesh(local.mesh, [device])
    checkpoints = Checkpoints(folder, keep=1, read_only=True)  # the run may be training
    try:
        restored = checkpoints.restore(abstract_train_state(local, mesh))
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"{folder} holds no complete checkpoint")
    state = restored.state
    return RestoredRun(local, state.params, state.router_bias_R, tokenizer, int(state.step))


def _load_tokenizer(folder: Path, model: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    require(
        tokenizer.vocab_size <= model.vocab_size,
        f"{folder / 'tokenizer.json'} has vocab_size={tokenizer.vocab_size}, "
        f"more than model.vocab_size={model.vocab_size}",
    )
    return tokenizer


def _restore_weights(folder: Path, device: Device) -> RestoredRun:
    model = weights.read_config(folder)
    tokenizer = _load_tokenizer(folder, model)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    placement = jax.sharding.SingleDeviceSharding(device)
    _, tree = weights.load(folder, shardings=jax.tree.map(lambda _: placement, shapes))
    params, bias_R = split_router_state(tree)
    if bias_R is None:
        bias_R = np.zeros((model.recursion.num_recursions,), np.float32)
    config = Config(preset=folder.name, model=model, data=DataConfig(tokenizer=str(folder / "tokenizer.json")))
    return RestoredRun(config, params, jax.device_put(bias_R, device), tokenizer, step=0)
