"""What a run starts from: its data, and a state that is restored, initialised, or made of another model's weights."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mor_jax.config import Config
from mor_jax.data.pipeline import NoHeldOutText
from mor_jax.errors import UserError, require
from mor_jax.mesh.mesh import local_rows
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.state import InitialWeights, TrainState, abstract_train_state, init_train_state, place_weights

_log = logging.getLogger(__name__)

MakeDataset = Callable[..., Any]
"""Signature of ``data.pipeline.make_dataset``."""


def open_data(config: Config, make_dataset: MakeDataset, mesh: Mesh) -> tuple[Any, Any]:
    """Open the training rows, of which this process reads those on its devices, and the held-out rows, or None."""
    shared: dict[str, Any] = {"context_length": config.model.context_length, "vocab_size": config.model.vocab_size}
    mine = local_rows(mesh, config.train.batch_size)
    rows = min(config.train.eval_rows, config.train.batch_size // config.train.accumulation)
    dataset = make_dataset(config.data, split="train", batch_size=config.train.batch_size, rows=mine, **shared)
    try:
        return dataset, make_dataset(config.data, split="validation", batch_size=rows, **shared)
    except NoHeldOutText as error:
        _log.info("no validation, and no pictures of held-out text: %s", error)
        return dataset, None


def load_initial(
    config: Config, load: Callable[[Config], InitialWeights | None] | None, tokenizer: Any
) -> InitialWeights | None:
    """Load the weights that a run starts from, before anything is written.

    Args:
        config: of the run.
        load: ``train``'s ``initial_weights``.
        tokenizer: of the data; it learns the special tokens of the weights' own.

    Raises:
        UserError: there is nothing to load them, or they were trained with another tokenizer.
    """
    source = config.init.source
    if load is None:
        require(not source, f"init.from={source!r} needs train(..., initial_weights=...)")
        return None
    first = load(config)
    if first is None or first.tokenizer_hash is None:
        return first
    what = f"init.from={source!r}" if source else first.origin
    known = first.tokenizer_hash == tokenizer.hash
    require(known, f"{what} was trained with another tokenizer than the one of data.source")
    if first.special is not None:
        tokenizer.describe(first.special)
    return first


def begin(config: Config, mesh: Mesh, first: InitialWeights | None) -> TrainState:
    """Return the state before the first step."""
    state = init_train_state(config, mesh)
    if first is None:
        return state
    _log.info("weights from %s", first.origin)
    return place_weights(state, first)


def restore(config: Config, mesh: Mesh, checkpoints: Checkpoints, dataset: Any) -> tuple[TrainState, int] | None:
    """Return the newest good state and its step, and put the data where it stood; None if there is no such state.

    Raises:
        UserError: the checkpoint is of other data, or beyond the last step.
    """
    restored = checkpoints.restore(abstract_train_state(config, mesh))
    if restored is None:
        return None
    folder = checkpoints.folder.parent
    if restored.data_hash != dataset.hash:
        raise UserError(
            f"{folder} was trained on other data: data.source={config.data.source!r} had the hash "
            f"{restored.data_hash}, now {dataset.hash} (embedded text depends on the Python version)"
        )
    state, start = restored.state, int(restored.state.step)
    if start > config.train.steps:
        raise UserError(f"{folder} is at step {start}, beyond train.steps={config.train.steps}")
    dataset.step = restored.data_step
    routes = config.stage_after(start).model.routing.keeps_boundaries
    if routes and np.all(np.isnan(state.boundaries_R)):
        _log.info("the checkpoint holds no running boundaries: they begin anew")
    return state, start
