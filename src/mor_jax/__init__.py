"""Mixture-of-Recursions language models in JAX (Bae et al., 2025, arXiv 2507.10524): the public names."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mor_jax.data.pipeline import make_dataset
    from mor_jax.infer.language_model import load
    from mor_jax.model.forward import ModelOutput, forward
    from mor_jax.runs.state import TrainState, init_train_state
    from mor_jax.train.step import train_step

__all__ = ["ModelOutput", "TrainState", "forward", "init_train_state", "load", "make_dataset", "train_step"]

_HOME = {
    "ModelOutput": "model.forward",
    "TrainState": "runs.state",
    "forward": "model.forward",
    "init_train_state": "runs.state",
    "load": "infer.language_model",
    "make_dataset": "data.pipeline",
    "train_step": "train.step",
}


def __getattr__(name: str) -> Any:
    """Import a public name's module when it is first asked for: decoding needs no data pipeline, and so on."""
    if name not in _HOME:
        raise AttributeError(f"module 'mor_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mor_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value
