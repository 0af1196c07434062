"""Open a model from any folder that holds one: a run, converted weights, Hugging Face, the official release."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from mor_jax.array_types import Params
from mor_jax.config import Config, DataConfig, ModelConfig
from mor_jax.config import io as config_io
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.errors import UserError, require
from mor_jax.interop import llama, official
from mor_jax.interop import weights_folder as weights
from mor_jax.interop.assemble import Progress
from mor_jax.mesh.devices import Device
from mor_jax.model.parameters import ROUTER_STATE, split_router_state
from mor_jax.runs.restore import RestoredRun, load_tokenizer, restore_run
from mor_jax.runs.state import abstract_model_state

Kind = Literal["run", "weights", "hf", "official"]


@dataclass(frozen=True)
class LoadedModel:
    """A model without a run around it."""

    model: ModelConfig
    params: Params
    """float32 parameter tree; with ``router_state`` where token-choice balances without a loss or expert-choice has
    running boundaries."""
    tokenizer: Tokenizer | None
    """None where the folder has none that this project can use."""
    kind: Kind
    origin: str
    """What it is, for messages and model cards."""


def detect(folder: Path) -> Kind:
    """Tell what a folder holds.

    Raises:
        UserError: nothing that can be loaded.
    """
    require(folder.is_dir(), f"{folder} is no folder")
    if weights.is_weights_folder(folder):
        return "weights"
    if (folder / "checkpoints").is_dir():
        return "run"
    if [*folder.glob("*.yaml"), *folder.glob("*.yml")]:
        return "official"
    if _is_hf(folder):
        return "hf"
    raise UserError(
        f"{folder} holds no model: neither a run (checkpoints/), converted weights, a Hugging Face Llama folder "
        f"(config.json with model_type) nor an official run folder (*.yaml)"
    )


def _is_hf(folder: Path) -> bool:
    try:
        return "model_type" in config_io.read_json(folder / "config.json")
    except (UserError, TypeError):
        return False


def open_model(folder: Path | str, *, lazy: bool = False, progress: Progress | None = None) -> LoadedModel:
    """Load a model into host memory (a run's newest good checkpoint).

    Args:
        folder: see ``detect``.
        lazy: whether the leaves of Hugging Face and converted folders shall read their tensors only when asked for.
        progress: called with the name of every tensor read, where tensors are read one by one.

    Raises:
        UserError: nothing there, or files that cannot be used - every tensor that does not fit is named.
    """
    folder = Path(folder)
    kind = detect(folder)
    if kind == "run":
        return _open_run(folder)
    if kind == "official":
        model, params = official.read(folder)
        return LoadedModel(model, params, _tokenizer(folder), kind, f"official release, {folder.name}")
    load = weights.load if kind == "weights" else llama.load
    model, params = load(folder, lazy=lazy, progress=progress)
    words = {"weights": "mor_jax weights", "hf": "Hugging Face Llama folder"}[kind]
    return LoadedModel(model, params, _tokenizer(folder), kind, f"{words} {folder.name}")


def open_run(folder: Path, *, device: Device | None = None) -> RestoredRun:
    """Open what can be evaluated as a run is: the run itself (``restore_run``), or weights that ``mor convert`` wrote.

    Args:
        folder: local, or a run's in a bucket.
        device: where the arrays go; None is the first local device.

    Returns:
        The run. Converted weights are at step 0, and their held-out text is the embedded one.

    Raises:
        UserError: what ``restore_run`` says, or converted weights that cannot be used.
    """
    if not weights.is_weights_folder(folder):
        return restore_run(folder, device=device)
    model = weights.read_config(folder)
    tokenizer = load_tokenizer(folder, model)
    placement = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
    shapes = abstract_model_state(model, placement)
    _, tree = weights.load(folder, shardings=jax.tree.map(lambda x: x.sharding, shapes.params))
    params, bias_R, running_R = split_router_state(tree)
    bias_R = np.zeros(shapes.router_bias_R.shape, np.float32) if bias_R is None else bias_R
    config = Config(preset=folder.name, model=model, data=DataConfig(tokenizer=str(folder / "tokenizer.json")))
    bias_R, running_R = jax.device_put((bias_R, running_R), placement)
    return RestoredRun(config, params, bias_R, tokenizer, step=0, boundaries_R=running_R)


def _open_run(folder: Path) -> LoadedModel:
    run = restore_run(folder, device=_host())
    model, params = run.config.model, jax.tree.map(np.asarray, dict(run.params))
    if model.routing.is_loss_free:
        params[ROUTER_STATE] = {"bias": np.asarray(run.router_bias_R)}
    if run.boundaries_R is not None:
        params[ROUTER_STATE] = {"boundaries": np.asarray(run.boundaries_R)}
    origin = f"run {folder.resolve().name} of preset {run.config.preset}, step {run.step}"
    return LoadedModel(model, params, run.tokenizer, "run", origin)


def _host() -> Any:
    """The processor as a device, so that a large model need not fit one accelerator; None where jax lacks it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None


def _tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    return Tokenizer.load(path) if path.is_file() else None
