"""The kernels of decoding, called as a layer calls them, with other weights or pages every time: for tune.py.

Letters: B rows, K summed, N outputs, V vocabulary, E rows of the head, P pages, Z entries per page, M pages per group.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.infer.head_kernel import HeadTile, sample_head
from mor_jax.infer.product_kernel import TICKETS, Tile, product, tile_for
from mor_jax.infer.sampling import SamplingRows
from mor_jax.kernels.decode_attention import Reads, decode_attention

_FEW = ((16, 128, 4, 4), (16, 64, 4, 4), (16, 256, 4, 3), (16, 64, 4, 8), (32, 64, 4, 5), (32, 128, 4, 4),
        (32, 128, 8, 3), (64, 64, 4, 4))  # fmt: skip
"""Outputs, depth, warps and stages of tiles of 32 rows, where there are no more."""
_MANY = ((32, 32, 128, 4, 4), (32, 64, 64, 4, 4), (64, 16, 128, 4, 4), (64, 32, 64, 4, 4), (64, 32, 128, 4, 3),
         (64, 64, 64, 4, 4), (64, 32, 64, 8, 6), (128, 16, 64, 4, 4), (128, 32, 64, 4, 3), (128, 32, 64, 8, 4),
         (128, 64, 64, 8, 3))  # fmt: skip
"""Rows, outputs, depth, warps and stages of tiles where there are more."""
EPSILON = 1e-5


@dataclass(frozen=True)
class Product:
    """One of a layer's matrix products."""

    kind: str
    outputs: int
    """N (of gate and of up each)."""
    depth: int
    """K."""
    splits: bool
    """Whether the sum may be split over programs: what follows no norm, and adds a residual."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (2, self.outputs, self.depth) if self.kind == "gate_up" else (self.outputs, self.depth)


def products(config: ModelConfig) -> tuple[Product, ...]:
    """Return the products of a layer."""
    width, inner = config.d_model, config.num_heads * config.head_dim
    return (
        Product("qkv", inner + 2 * config.num_kv_heads * config.head_dim, width, splits=False),
        Product("output", width, inner, splits=True),
        Product("gate_up", config.d_ff, width, splits=False),
        Product("down", width, config.d_ff, splits=True),
    )


def tiles(case: Product, rows: int, processors: int, size: int = 2) -> list[Tile]:
    """Return the tiles worth trying: what the code chooses now first, then all that fill the card without many rounds.

    Args:
        case: the product.
        rows: B.
        processors: multiprocessors of the card.
        size: bytes of a value.
    """
    found = [tile_for(rows, case.outputs, case.depth, splits=case.splits, size=size)]
    shapes = [(32, *rest) for rest in _FEW] if rows <= 32 else _MANY
    for height, outputs, depth, warps, stages in shapes:
        for parts in (1, 2, 4) if case.splits else (1,):
            programs = math.ceil(case.outputs / outputs) * math.ceil(rows / height) * parts
            fills = 3 * programs >= processors and (parts == 1 or programs <= 2 * processors)
            tile = Tile(height, outputs, depth, parts, warps, stages)
            if fills and tile not in found:
                found.append(tile)
    return found


class ProductRun:
    """Calls one product with one weight after the other.

    Args:
        case: the product.
        rows: B.
        copies: weights.
        dtype: of rows and weights.
        interpret: run the kernel's program on the CPU, to test it.
    """

    def __init__(self, case: Product, rows: int, copies: int, dtype: str, *, interpret: bool = False) -> None:
        self.case, self._interpret = case, interpret
        keys = iter(jax.random.split(jax.random.key(0), copies + 2))
        draw = lambda *shape: jax.random.normal(next(keys), shape, dtype)  # noqa: E731
        self.x_BK, self.residual_BN = draw(rows, case.depth), draw(rows, case.outputs)
        self.weights = [draw(*case.shape) * case.depth**-0.5 for _ in range(copies)]
        self.scale_K, self._tickets_X = jnp.ones(case.depth), jnp.zeros(TICKETS, jnp.int32)

    def __call__(self, tile: Tile) -> list[jax.Array]:
        """Return the outputs [B, N]."""
        found = []
        for weight in self.weights:
            options: dict[str, Any] = {"scale": self.scale_K, "epsilon": EPSILON}
            if self.case.splits:
                options = {"residual_BN": self.residual_BN, "tickets_X": self._tickets_X}
            out_BN, tickets_X = product(self.x_BK, weight, tile=tile, interpret=self._interpret, **options)
            self._tickets_X = self._tickets_X if tickets_X is None else tickets_X
            found.append(out_BN)
        return found


class AttentionRun:
    """Calls decode attention with one pool after the other; every call appends in the same places.

    Args:
        config: the model.
        rows: B.
        held: entries of a row on average; they are spread evenly from 1 on.
        page_size: Z.
        copies: pools.
        interpret: run the kernel's program on the CPU, to test it.
    """

    def __init__(
        self, config: ModelConfig, rows: int, held: int, page_size: int, copies: int, *, interpret: bool = False
    ) -> None:
        rng = np.random.default_rng(0)
        self.visible_B = np.linspace(1, 2 * held - 1, rows).round().astype(np.int32)
        pages = math.ceil((2 * held) / page_size)
        self.table_BM = rng.permutation(rows * pages).reshape(rows, pages).astype(np.int32)
        heads = config.num_heads + 2 * config.num_kv_heads
        keys = iter(jax.random.split(jax.random.key(0), 1 + 2 * copies))
        draw = lambda *shape: jax.random.normal(next(keys), shape, config.dtype)  # noqa: E731
        self.projected_BMH = draw(rows, heads, config.head_dim)
        pool = (rows * pages, page_size * config.num_kv_heads * config.head_dim)
        self.pools = [(draw(*pool), draw(*pool)) for _ in range(copies)]
        half = (rows, config.head_dim // 2)
        self.angles = (jnp.ones(half), jnp.zeros(half))
        self._interpret, self.page_size = interpret, page_size

    def __call__(self, reads: Reads) -> list[jax.Array]:
        """Return the outputs [B, N, H]."""
        attend = _in_place(reads, self.page_size, self._interpret)
        group_B, count_B = np.arange(len(self.visible_B), dtype=np.int32), np.ones_like(self.visible_B)
        sizes = (self.table_BM, group_B, self.visible_B - count_B, count_B, self.visible_B)
        found = []
        for index, pool in enumerate(self.pools):
            out_BNH, self.pools[index] = attend(self.projected_BMH, self.angles, pool, *sizes)
            found.append(out_BNH)
        return found


@functools.cache
def _in_place(reads: Reads, page_size: int, interpret: bool) -> Any:
    """Decode attention that takes its pools over: else they would be copied first, which would fill the caches."""
    attend = functools.partial(decode_attention, page_size=page_size, reads=reads, interpret=interpret)
    return jax.jit(attend, donate_argnums=2)


class HeadRun:
    """Calls head and sampling with one output head after the other.

    Args:
        config: the model.
        rows: E.
        copies: heads.
        interpret: run the kernel's program on the CPU, to test it.
    """

    def __init__(self, config: ModelConfig, rows: int, copies: int, *, interpret: bool = False) -> None:
        keys = iter(jax.random.split(jax.random.key(0), copies + 1))
        draw = lambda *shape: jax.random.normal(next(keys), shape, config.dtype)  # noqa: E731
        self.x_ED, self.scale_D = draw(rows, config.d_model), jnp.ones(config.d_model)
        self.heads = [draw(config.vocab_size, config.d_model) for _ in range(copies)]
        nth_E = np.arange(rows)
        self.rows = SamplingRows(
            jnp.ones(rows), jnp.zeros(rows, jnp.int32), jnp.ones(rows), jnp.asarray(nth_E, jnp.uint32)
        )
        self.position_E, self._interpret = jnp.asarray(nth_E, jnp.int32), interpret

    def __call__(self, tile: HeadTile) -> list[tuple[jax.Array, jax.Array]]:
        """Return tokens and log-probabilities [E]."""
        run = _head(tile, self._interpret)
        return [run(self.x_ED, self.scale_D, head_VD, self.rows, self.position_E) for head_VD in self.heads]


@functools.cache
def _head(tile: HeadTile, interpret: bool) -> Any:
    return jax.jit(functools.partial(sample_head, epsilon=EPSILON, tile=tile, interpret=interpret))
