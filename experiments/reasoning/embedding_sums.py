"""How far, and how fast, is the embedding's gradient summed in bfloat16 and in float32?

Usage: python experiments/reasoning/embedding_sums.py --out experiments/reasoning/results/embedding_sums.json. Random
gradients of a few words with many places each; errors are shares of the norm of each word's sum, against float64.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.kernels.embedding import look_up
from mor_jax.sweep.results import machine, write_json

PLACES, MEANS, WIDTH = (100, 800, 1500, 5000), (0.0, 0.1, 0.3), 64
LookUp = Callable[[jax.Array, jax.Array], jax.Array]
WAYS: dict[str, LookUp] = {"bfloat16": lambda table_VD, tokens_BT: jnp.take(table_VD, tokens_BT, axis=0, mode="clip")}
WAYS["float32"] = look_up


def errors(way: LookUp, places: Sequence[int], mean: float) -> dict[str, Any]:
    """Return the relative error of the sum of every word, and the seconds of a call."""
    generator = np.random.default_rng(0)
    tokens_BT = generator.permutation(np.repeat(np.arange(len(places)), places))[None]
    gradient_BTD = jnp.asarray(generator.normal(mean, 1.0, (*tokens_BT.shape, WIDTH)), jnp.bfloat16)
    expected_VD = np.zeros((len(places), WIDTH))
    np.add.at(expected_VD, tokens_BT, np.asarray(gradient_BTD, np.float64))

    @jax.jit
    def gradient(table_VD: jax.Array, tokens_BT: jax.Array, gradient_BTD: jax.Array) -> jax.Array:
        return jax.vjp(lambda table_VD: way(table_VD, tokens_BT), table_VD)[1](gradient_BTD)[0]

    arguments = (jnp.zeros((len(places), WIDTH), jnp.bfloat16), jnp.asarray(tokens_BT), gradient_BTD)
    found_VD = np.asarray(gradient(*arguments), np.float64)
    start = time.perf_counter()
    jax.block_until_ready([gradient(*arguments) for _ in range(20)])
    seconds = (time.perf_counter() - start) / 20
    off_V = np.linalg.norm(found_VD - expected_VD, axis=1) / np.linalg.norm(expected_VD, axis=1)
    return {
        "mean": mean,
        "error_by_places": dict(zip(map(str, places), off_V.tolist(), strict=True)),
        "seconds": seconds,
    }


def main() -> int:
    """Measure both ways and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = {name: [errors(way, PLACES, mean) for mean in MEANS] for name, way in WAYS.items()}
    command = f"python experiments/reasoning/embedding_sums.py --out {options.out.name}"
    write_json(options.out, {"summed_in": found, "machine": machine() | {"command": command}})
    for name, rows in found.items():
        for row in rows:
            off = ", ".join(f"{places}: {error:.1%}" for places, error in row["error_by_places"].items())
            print(f"{name}, mean {row['mean']}: {off}; {1e3 * row['seconds']:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
