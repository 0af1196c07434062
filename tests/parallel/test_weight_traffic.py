"""What `fsdp` moves of a shared block's weights, read from compiled programs: once, however often the block is used."""

import dataclasses

from sharded_programs import config_of, traffic

from mor_jax.config import MeshConfig

MESH = MeshConfig(data=2, fsdp=4)
RECURSIONS = 2


def feed_forward_bytes(whole_block: bool | None, *, middle: bool = False) -> tuple[int, int]:
    """Bytes that a device receives of (weights, gradients) of feed-forwards, per step; of a block, or with its ends."""
    config = config_of("none", recursions=RECURSIONS)
    perf = dataclasses.replace(config.perf, whole_block=whole_block)
    if middle:
        perf, model = dataclasses.replace(perf, remat="full"), config.model
        recursion = dataclasses.replace(model.recursion, sharing="middle_cycle")
        model = dataclasses.replace(model, num_layers=RECURSIONS + 2, recursion=recursion)
        config = dataclasses.replace(config, model=model)
    config = dataclasses.replace(config, perf=perf)
    found, _ = traffic(config, MESH)
    width, hidden = config.model.d_model, config.model.d_ff
    shard, whole = width * 2 * hidden // MESH.fsdp, width * 2 * hidden
    received = {"all-gather": 0, "all-reduce": 0}
    for item in found:
        for shape in item.operands:
            if {2, hidden} <= set(shape.sizes) and shape.elements in (shard, whole) and item.kind in received:
                received[item.kind] += item.total_bytes * shape.bytes // sum(s.bytes for s in item.operands)
    return received["all-gather"], received["all-reduce"]


def test_a_shared_block_is_gathered_once_for_all_recursions():
    """At every use: two recursions, forward and backward. Gradients are summed as before."""
    once, gradients = feed_forward_bytes(None)
    each_use, gradients_before = feed_forward_bytes(False)
    assert once > 0
    assert each_use == 2 * RECURSIONS * once
    assert gradients == gradients_before > 0


def test_the_last_layer_is_gathered_once_where_layers_are_made_again():
    """Of eight gathers, for four layer applications forward and backward, four are left: block, first twice, last."""
    once, gradients = feed_forward_bytes(None, middle=True)
    each_use, gradients_before = feed_forward_bytes(False, middle=True)
    assert each_use == 2 * once > 0
    assert gradients == gradients_before > 0
