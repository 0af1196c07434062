"""Exact counts against the parameter tree and the compiled train step, and both against figures worked out by hand."""

import dataclasses
import math
from typing import Any

import jax
import pytest

from mor_jax.config import (
    Config,
    KvStrategy,
    ModelConfig,
    PerfConfig,
    RecursionConfig,
    RelaxationConfig,
    RoutingConfig,
    TrainConfig,
)
from mor_jax.mesh.mesh import make_mesh
from mor_jax.model.flops import (
    LayerPass,
    block_parameters,
    count_parameters,
    forward_flops,
    kv_bytes_per_token,
    layer_passes,
    paper_flops_per_token,
    train_flops,
)
from mor_jax.model.transformer import init_params
from mor_jax.plan.hlo import parse
from mor_jax.plan.hlo_flops import matrix_flops
from mor_jax.train.step import compile_train_step

EXPERT = RoutingConfig("expert")
TOKEN = RoutingConfig("token", score="softmax")
ROWS = 2


def _model(recursions: int, routing: RoutingConfig | None = None, strategy: KvStrategy = "recursion") -> ModelConfig:
    """Eight layers (as many unrolled) in which matrix products dominate."""
    recursion = RecursionConfig(recursions, "middle_cycle", kv_strategy=strategy)
    return ModelConfig(
        vocab_size=384, num_layers=8, d_model=96, num_heads=6, num_kv_heads=2, head_dim=16, d_ff=256,
        context_length=96, dtype="float32", recursion=recursion if recursions > 1 else RecursionConfig(),
        routing=routing or RoutingConfig(),
    )  # fmt: skip


def _compiled_flops(model: ModelConfig, execution: Any) -> float:
    """Matrix products of one row's training step, read off the compiled program."""
    config = Config(
        model=model,
        train=TrainConfig(steps=100, batch_size=ROWS),
        perf=PerfConfig(execution=execution, attention_backend="xla", loss_chunk=32),
    )
    program: Any = compile_train_step(config, make_mesh(config.mesh, jax.devices()[:1]))
    module = parse(program.as_text())
    assert module.unknown_loops == ()
    flops = matrix_flops(module)
    assert set(flops.opaque_calls) <= {"TopK"}
    return flops.total / ROWS


slow = pytest.mark.slow
CASES = {
    "vanilla": (_model(1), "gather", ()),
    "recursive": (_model(3), "gather", slow),
    "recursive-shared": (_model(3, None, "shared"), "gather", slow),
    "expert-recursion": (_model(3, EXPERT), "gather", slow),
    "expert-shared": (_model(3, EXPERT, "shared"), "gather", ()),
    "expert-shared_update": (_model(3, EXPERT, "shared_update"), "gather", slow),
    "token-recursion": (_model(3, TOKEN), "gather", slow),
    "token-shared": (_model(3, TOKEN, "shared"), "gather", slow),
    "scan-recursive": (_model(3), "scan", slow),
    "scan-recursive-shared": (_model(3, None, "shared"), "scan", slow),
    "scan-expert-recursion": (_model(3, EXPERT), "scan", slow),
    "scan-expert-shared": (_model(3, EXPERT, "shared"), "scan", slow),
    "scan-expert-shared_update": (_model(3, EXPERT, "shared_update"), "scan", slow),
    "scan-token-recursion": (_model(3, TOKEN), "scan", slow),
    "scan-token-shared": (_model(3, TOKEN, "shared"), "scan", slow),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=case[2]) for name, case in CASES.items()])
def test_the_exact_count_is_what_the_compiled_step_executes(name):
    """To 0.1%: what is left out is a router's matrix times vector, which XLA makes a multiply and reduce."""
    model, execution, _ = CASES[name]
    counted = sum(train_flops(model, execution=execution, attention="full").values())
    assert _compiled_flops(model, execution) == pytest.approx(counted, rel=0.001)


def _tree(recursion: RecursionConfig, routing: RoutingConfig | None = None, **fields: Any) -> ModelConfig:
    """A model whose sizes are all different, so that no two counts can be mistaken for each other."""
    return ModelConfig(
        vocab_size=101, num_layers=8, d_model=24, num_heads=6, num_kv_heads=3, head_dim=10, d_ff=70,
        context_length=16, dtype="float32", recursion=recursion, routing=routing or RoutingConfig(), **fields,
    )  # fmt: skip


MIDDLE = RecursionConfig(3, "middle_cycle")
RELAXED = RelaxationConfig(lora_rank=5, encoding=True)
TREES = {
    "vanilla": _tree(RecursionConfig()),
    "vanilla, norms apart": _tree(RecursionConfig(share_norms=False)),
    "untied head": _tree(MIDDLE, tie_embeddings=False),
    **{name: _tree(RecursionConfig(2, name)) for name in ("cycle", "sequence", "middle_cycle", "middle_sequence")},
    "layers dropped by rounding": _tree(RecursionConfig(4, "middle_cycle")),
    "base depth": _tree(RecursionConfig(2, "cycle", base_depth=2)),
    "norms apart": _tree(RecursionConfig(2, "middle_cycle", share_norms=False)),
    "sequence, norms apart": _tree(RecursionConfig(2, "middle_sequence", share_norms=False)),
    "low-rank updates and encoding": _tree(RecursionConfig(3, "cycle", share_norms=False, relaxation=RELAXED)),
    "low-rank updates of some": _tree(
        RecursionConfig(2, "sequence", relaxation=RelaxationConfig(3, ("key_value", "down")))
    ),
    "linear": _tree(MIDDLE, EXPERT),
    "shared keys and values": _tree(RecursionConfig(3, "middle_cycle", kv_strategy="shared"), EXPERT),
    "mlp": _tree(MIDDLE, RoutingConfig("expert", router="mlp")),
    "wide mlp": _tree(MIDDLE, RoutingConfig("expert", router="wide_mlp")),
    "mlp of its own width": _tree(MIDDLE, RoutingConfig("expert", router="mlp", router_expansion=3)),
    "auxiliary router": _tree(MIDDLE, RoutingConfig("expert", router="mlp", sampling="aux_router")),
    "token": _tree(MIDDLE, TOKEN),
    "token, mlp": _tree(MIDDLE, RoutingConfig("token", router="mlp", score="softmax")),
}


@pytest.mark.parametrize("name", TREES)
def test_parameters_are_the_entries_of_the_tree(name):
    model = TREES[name]
    tree = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    sizes = {part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves)) for part, leaves in tree.items()}
    count = count_parameters(model)
    assert count.total == sum(sizes.values())
    assert count.embedding == sizes["embedding"] + sizes.get("head", 0)
    assert block_parameters(model) == sizes["block"]


BY_HAND = ModelConfig(
    vocab_size=100, num_layers=8, d_model=10, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=20, context_length=12,
    recursion=RecursionConfig(3, "middle_cycle"), routing=EXPERT,
)  # fmt: skip


def _with(strategy: KvStrategy, routing: RoutingConfig = EXPERT, sharing: Any = "middle_cycle") -> ModelConfig:
    return dataclasses.replace(BY_HAND, recursion=RecursionConfig(3, sharing, kv_strategy=strategy), routing=routing)


@pytest.mark.parametrize(
    ("model", "execution", "expected"),
    [  # layers, tokens computed, tokens projected to keys and values, keys per query
        (_with("recursion"), "gather", [(2, 12, 12, 12), (2, 8, 8, 8), (2, 4, 4, 4)]),
        (_with("shared"), "gather", [(2, 12, 12, 12), (2, 8, 0, 12), (2, 4, 0, 12)]),
        (_with("shared_update"), "gather", [(2, 12, 12, 12), (2, 8, 8, 12), (2, 4, 4, 12)]),
        (_with("recursion", TOKEN), "gather", [(2, 12, 12, 12), (2, 10, 10, 10), (2, 5, 5, 5)]),
        (_with("shared", RoutingConfig()), "gather", [(2, 12, 12, 12), (2, 12, 0, 12), (2, 12, 0, 12)]),
        (_with("shared"), "scan", [(2, 12, 12, 12)] * 3),
        (_with("shared", RoutingConfig(), "middle_sequence"), "gather", [(2, 12, 12, 12), (4, 12, 0, 12)]),
        (_with("recursion", RoutingConfig(), "middle_sequence"), "gather", [(2, 12, 12, 12), (4, 12, 12, 12)]),
    ],
)
def test_layer_passes_of_a_row(model, execution, expected):
    unique = LayerPass(1, 12, 12, 12)
    assert layer_passes(model, 12, execution) == [unique, *(LayerPass(*group) for group in expected), unique]


def test_parts_of_the_forward_pass_by_hand():
    """Tokens computed, over layers: 2 x 12 + 2 x (12 + 8 + 4) = 72. Pairs: 2 x 144 + 2 x (144 + 64 + 16) = 736."""
    parts = forward_flops(BY_HAND, attention="full")
    query_output, key_value, feed_forward = 2 * 2 * 10 * 16, 2 * 2 * 10 * 8, 2 * 3 * 10 * 20
    assert parts["block"] == 72 * (query_output + key_value + feed_forward)
    assert parts["attention"] == 736 * 4 * 16  # scores and weighted values of 4 heads of 4
    assert parts["router"] == (12 + 12 + 8) * 2 * 10  # each scores the tokens still active
    assert parts["head"] == 12 * 2 * 10 * 100
    shared = forward_flops(_with("shared"), attention="full")
    assert shared["block"] == 72 * (query_output + feed_forward) + 48 * key_value
    assert shared["attention"] == (2 * 144 + 2 * 12 * (12 + 8 + 4)) * 4 * 16


def test_attention_work():
    """Causality needs (S + 1) / 2 keys per query; a flash kernel makes the scores again: 7 products instead of 6."""
    full, causal, flash = (train_flops(BY_HAND, attention=work) for work in ("full", "causal", "flash"))
    assert causal["attention"] == 3 * 4 * 16 * (2 * 78 + 2 * (78 + 36 + 10))
    assert full["attention"] == 3 * 4 * 16 * 736
    assert flash["attention"] == pytest.approx(causal["attention"] * 7 / 6)
    assert {name: value for name, value in flash.items() if name != "attention"} == {
        name: value for name, value in causal.items() if name != "attention"
    }


@pytest.mark.parametrize(
    ("routing", "expected"),
    [
        ({"router": "mlp"}, (12 + 12 + 8) * 2 * (10 * 20 + 20)),
        ({"router": "wide_mlp"}, (12 + 12 + 8) * 2 * (10 * 40 + 40)),
        ({"sampling": "aux_router"}, 2 * (12 + 12 + 8) * 2 * 10),
        ({"kind": "token", "score": "softmax"}, 12 * 2 * 10 * 3),
        ({"kind": "none"}, 0),
    ],
)
def test_router(routing, expected):
    model = dataclasses.replace(BY_HAND, routing=RoutingConfig(**{"kind": "expert", **routing}))
    assert forward_flops(model)["router"] == expected


def test_the_papers_count_by_hand():
    """Capacity c of a layer: c x 2 x (4 d^2 + 3 d f) and c^2 x 4 d x S / 2; shared: c instead of c^2, no K and V."""
    layer, scores = 2 * (4 * 100 + 3 * 200), 4 * 10 * 12 / 2
    shares = (1, 2 / 3, 1 / 3)
    expected = 2 * (layer + scores) + 2 * sum(c * layer + c**2 * scores for c in shares)
    assert paper_flops_per_token(BY_HAND) == pytest.approx(expected)
    expected = 2 * (layer + scores) + 2 * sum(c * layer + c * scores for c in shares) - 2 * (2 / 3 + 1 / 3) * 4 * 100
    assert paper_flops_per_token(_with("shared")) == pytest.approx(expected)


def test_cache_sizes_are_those_of_table_2():
    """Of 2 x 3 layers recursion-wise caching holds (3 + 1) / 6, recursive sharing 1 / 3; two layers are unique."""
    per_layer = 2 * 2 * 4 * 2  # keys and values, 2 heads of 4, 2 bytes
    assert kv_bytes_per_token(BY_HAND) == pytest.approx(per_layer * (2 + 6 * 4 / 6))
    assert kv_bytes_per_token(_with("shared")) == pytest.approx(per_layer * (2 + 6 / 3))
    assert kv_bytes_per_token(_with("recursion", RoutingConfig())) == pytest.approx(per_layer * 8)
    assert kv_bytes_per_token(BY_HAND, (1.0, 0.5, 0.0)) == pytest.approx(per_layer * (2 + 2 * 1.5))
