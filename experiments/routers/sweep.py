"""Routers and their auxiliary losses: quality, dead tokens and the top-k/threshold gap (tables 13 and 14)."""

from mor_jax.sweep.recipes import expert, seeded, token
from mor_jax.sweep.runs import SweepRun

SEEDS = {"expert-recipe": (0, 1, 2)}
"""Recipes with more seeds than one: the spread that differences between the others are judged by."""


def runs(scale: str) -> list[SweepRun]:
    """Return N_r = 3 models at equal tokens; the paper's recipe first."""
    models = {
        "expert-recipe": expert(scale, 3),
        "expert-loss-0.1": expert(scale, 3, sampling_coefficient=0.1),
        "expert-loss-0.01": expert(scale, 3, sampling_coefficient=0.01),
        "expert-mlp": expert(scale, 3, router="mlp"),
        "expert-tanh": expert(scale, 3, score="tanh"),
        "expert-alpha-1": expert(scale, 3, alpha=1.0),
        "expert-z-loss": expert(scale, 3, z_loss_coefficient=0.001),
        "expert-aux-router": expert(scale, 3, sampling="aux_router"),
        "expert-no-boundary": expert(scale, 3, sampling="none"),
        "expert-random": expert(scale, 3, sampling="none", random=True),
        "token-recipe": token(scale, 3),
        "token-mlp": token(scale, 3, router="mlp"),
        "token-loss-0.01": token(scale, 3, balancing_coefficient=0.01),
        "token-loss-free": token(scale, 3, balancing="loss_free"),
    }
    made = [run for name, config in models.items() for run in seeded(name, config, SEEDS.get(name, (0,)))]
    return sorted(made, key=lambda run: run.config.train.seed)  # every recipe before the second seed of one
