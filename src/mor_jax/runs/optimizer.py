"""AdamW or Muon with decay mask and clipping, and the learning rate schedules (paper appendix B).

An auxiliary router (top-level key `aux_router`) has its own AdamW: `aux_router_ratio` times the learning rate, its own
moments and its own clipping (table 13). Schedules count optimiser steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mor_jax.config import OptimizerConfig
from mor_jax.runs.muon import MOMENTUM, matrix_axes, scale_by_orthogonal

Schedule = Callable[[Any], Any]


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Return the learning rate of the 0-based optimiser step.

    Warm-up is linear and its first step already learns: step s of W takes (s + 1) / W of the peak. `wsd` then stays
    and falls linearly to 0 over the last ``decay_share`` of the steps (0 would be reached at step ``steps``);
    `cosine` falls from the peak to ``min_ratio`` of it.

    Args:
        config: peak, warm-up and shape.
        steps: optimiser steps of the whole run.
    """
    warmup = config.warmup_steps
    decay = round(config.decay_share * steps)

    def schedule(step: Any) -> Any:
        step = jnp.asarray(step, jnp.float32)
        rising = jnp.minimum(1.0, (step + 1) / warmup) if warmup else 1.0
        if config.schedule == "wsd":
            falling = jnp.clip((steps - step) / decay, 0.0, 1.0) if decay else 1.0
        else:
            share = jnp.clip((step - warmup) / max(1, steps - warmup), 0.0, 1.0)
            falling = config.min_ratio + (1 - config.min_ratio) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        return config.learning_rate * rising * falling

    return schedule


def decay_mask(params: Any) -> Any:
    """Mark the leaves that weight decay shrinks: every matrix, so all but the norms' `scale`."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params)


def _group(params: Any) -> Any:
    return jax.tree.map_with_path(lambda path, _: "aux_router" if path[0].key == "aux_router" else "model", params)


def _kind(params: Any) -> Any:
    """Who updates a parameter: Muon has the matrices of the layers.

    Embedding and head have rows that are rarely all in use, routers few columns, and a low-rank update is a product of
    two matrices, of which none is the step that counts: they stay AdamW's, as norms do.
    """
    return jax.tree.map_with_path(lambda path, _: "adamw" if matrix_axes(path) is None else "muon", params)


def _clip(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()


def _adamw(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )


def _muon(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    muon = optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        scale_by_orthogonal(),
        optax.add_decayed_weights(config.weight_decay),  # all of them are matrices
        optax.scale_by_learning_rate(schedule),
    )
    return optax.partition({"muon": muon, "adamw": _adamw(config, schedule)}, _kind)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the optimiser of the model beside AdamW for an auxiliary router.

    Args:
        config: settings of both.
        steps: optimiser steps of the whole run, for the schedules.
    """
    schedule = make_schedule(config, steps)
    model = _muon if config.kind == "muon" else _adamw
    return optax.partition(
        {
            "model": optax.chain(_clip(config), model(config, schedule)),
            "aux_router": optax.chain(
                _clip(config), _adamw(config, lambda step: config.aux_router_ratio * schedule(step))
            ),
        },
        _group,
    )
