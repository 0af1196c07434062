"""Mixture-of-Recursions language models in JAX (Bae et al., 2025, arXiv 2507.10524): the public names."""

from mor_jax.data.pipeline import make_dataset
from mor_jax.forward import ModelOutput, forward
from mor_jax.train.state import TrainState, init_train_state
from mor_jax.train.step import train_step

__all__ = ["ModelOutput", "TrainState", "forward", "init_train_state", "make_dataset", "train_step"]
