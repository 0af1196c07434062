"""What routing moves between devices, read from compiled programs: nothing of a row unless `context` splits rows."""

import dataclasses
import functools

import pytest
from sharded_programs import TOKENS, config_of, step_traffic, traffic

from mor_jax.config import MeshConfig
from mor_jax.plan.collectives import Collective
from mor_jax.plan.hlo_flops import matrix_flops

BATCH, WIDTH, SELECTED, SEATS = 16, 32, TOKENS // 2, 25
"""Expert-choice computes 20 tokens in recursion 2; token-choice has 1.25 x 20 seats there."""
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)


def holds_tokens(item: Collective, rows: int) -> bool:
    """Whether a collective carries something per token of rows: scores, indices or activations."""
    lengths = {times * length for length in (TOKENS, SELECTED, SEATS) for times in (1, rows)}
    return any(lengths & set(shape.sizes) and shape.elements >= rows * SELECTED for shape in item.operands)


def is_dead_token_count(item: Collective) -> bool:
    """Which positions any row selected: one boolean per position however many rows there are, for a metric."""
    one = [(shape.dtype, shape.sizes) for shape in item.operands] == [("pred", (TOKENS,))]
    return one and item.kind == "all-reduce" and item.op_name.endswith("reduce_or")


def of_tokens(router: str, mesh: MeshConfig, execution: str = "gather") -> list[Collective]:
    rows = BATCH // (mesh.slice * mesh.data * mesh.fsdp)
    found = [item for item in traffic(config_of(router, execution=execution), mesh)[0] if holds_tokens(item, rows)]
    return [item for item in found if not is_dead_token_count(item)]


@functools.cache
def reductions_without_router(mesh: MeshConfig) -> list[tuple[int, ...]]:
    """Shapes that the recursive model without a router sums over `tensor`: halves of matrix products."""
    found = of_tokens("none", mesh)
    assert {item.kind for item in found} == {"all-reduce"}
    return sorted(shape.sizes for item in found for shape in item.operands if len(shape.sizes) == 3)


def assert_routing_is_local(router: str, mesh: MeshConfig, execution: str = "gather") -> None:
    found = of_tokens(router, mesh, execution)
    if mesh.tensor == 1:
        assert not found
        return
    # over `tensor` the same halves of matrix products are summed as without a router, of the selected tokens only
    assert {item.kind for item in found} == {"all-reduce"}
    names = {name.split("/")[-1].rstrip(")") for item in found for name in item.op_name.split(":")}
    assert names <= {"dot_general", "gather", "psum"}, names
    mine = sorted(shape.sizes for item in found for shape in item.operands if len(shape.sizes) == 3)
    others = reductions_without_router(mesh)
    assert len(mine) == len(others)
    assert sum(sizes[1] for sizes in mine) <= sum(sizes[1] for sizes in others)


@pytest.mark.parametrize("router", ["expert", "token"])
def test_routing_adds_no_collective_of_tokens(router):
    assert_routing_is_local(router, CUBE)


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_running_boundaries_exchange_counts_and_no_scores(accumulation):
    """Per recursion 15 counts, eight times; then how many scores reach the cut, and the highest of the rest."""
    mesh, config = MeshConfig(data=2, fsdp=2, tensor=2), config_of("expert")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=accumulation))
    found = step_traffic(config, mesh)
    rows = BATCH // 4 // accumulation
    allowed = {"dot_general", "gather", "psum", "scatter-add"}
    tokens = [item for item in found if holds_tokens(item, rows) and not is_dead_token_count(item)]
    names = {name.split("/")[-1].rstrip(")") for item in tokens for name in item.op_name.split(":")}
    assert names <= allowed, names
    counts = [item for item in found if [(s.dtype, s.sizes) for s in item.operands] == [("s32", (2, 15))]]
    assert [(item.kind, item.executions) for item in counts] == [("all-reduce", 8)]


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["gather", "scan"])
@pytest.mark.parametrize("mesh", [MeshConfig(data=8), MeshConfig(data=1, fsdp=8), MeshConfig(slice=2, data=2, fsdp=2)])
@pytest.mark.parametrize("router", ["expert", "token"])
def test_rows_split_over_data_fsdp_and_slice_exchange_nothing(router, mesh, execution):
    assert_routing_is_local(router, mesh, execution)


def test_context_moves_the_selected_tokens_once_each_way_and_shares_them_out():
    """8 rows per device, split into 4: one selection of 20 tokens, 4 moves (there and back, and their gradients)."""
    mesh, rows, shards = MeshConfig(data=2, context=4), 8, 4
    found, module = traffic(config_of("expert"), mesh)
    hidden = [item for item in found if any(len(s.sizes) == 3 and s.sizes[2] == WIDTH for s in item.operands)]
    hidden = [item for item in hidden if item.operands[0].sizes[0] == rows]
    assert sorted((item.kind, item.operands[0].sizes) for item in hidden) == [
        ("all-gather", (rows, SELECTED // shards, WIDTH)),
        ("all-gather", (rows, SELECTED // shards, WIDTH)),
        ("reduce-scatter", (rows, SELECTED, WIDTH)),
        ("reduce-scatter", (rows, SELECTED, WIDTH)),
    ]
    assert sum(item.total_bytes for item in hidden) == 4 * (rows * SELECTED * WIDTH * 4) * (shards - 1) // shards
    # every device computes a quarter of all matrix products: attention, feed-forward and head of its share
    alone = matrix_flops(traffic(config_of("expert"), MeshConfig(data=2))[1]).total
    assert matrix_flops(module).total == alone / shards
