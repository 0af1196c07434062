"""Every kind of engine under the worst traffic: pages are scarce, prompts begin alike, clients leave at any time."""

import dataclasses

import jax
import numpy as np
import pytest
from decode_examples import make_params, model_config, router_bias, tokens
from engine_examples import LENGTH, OPTIONS, check_empty, check_tokens, make_requests

from mor_jax.config import MeshConfig, PartsConfig
from mor_jax.infer.cache import kv_layout
from mor_jax.infer.compilations import compilations
from mor_jax.infer.decode_model import prepare_weights
from mor_jax.infer.engine import Engine
from mor_jax.mesh.mesh import make_mesh

REQUESTS, LEAVE = 300, 45
PARTS = PartsConfig(qk_norm=True, value_residual=True)
KINDS = {
    "vanilla": ("none", "none", "recursion", {}),
    "recursive": ("none", "middle_cycle", "recursion", {}),
    "sequence": ("none", "middle_sequence", "shared", {}),
    "expert": ("expert", "middle_cycle", "recursion", {}),
    "expert-shared": ("expert-aux", "cycle", "shared", {}),
    "token": ("token", "cycle", "recursion", {}),
    "token-shared": ("token-bias", "middle_cycle", "shared", {}),
    "parts": ("none", "none", "recursion", {"parts": PARTS}),
    "sharded": ("expert", "middle_cycle", "recursion", {"vocab_size": 32}),
    "sharded-shared": ("token-bias", "middle_cycle", "shared", {"vocab_size": 32}),
}


def _requests(passes):
    """Two thirds begin with one of two long texts, and a few have a budget of passes."""
    common, budgets = tokens(2, LENGTH, seed=98).tolist(), [*[None] * 6, *range(1, passes)]
    requests = make_requests(REQUESTS, seed=11)
    for nth, request in enumerate(requests):
        begin = common[nth % 2][: len(request.prompt) * 3 // 4] if nth % 3 else []
        prompt = (*begin, *request.prompt[len(begin) :])
        requests[nth] = dataclasses.replace(request, prompt=prompt, max_depth=budgets[nth % len(budgets)])
    return requests


def _serve(engine, requests, seed=0):
    """Submit in bursts, and let clients leave whose request waits, is read or decodes: (tokens of each, who left)."""
    rng, found, left, gone = np.random.default_rng(seed), {}, list(requests), set()
    while left or engine.busy:
        burst = int(rng.choice([0, 0, 1, 2, 3, 12]))
        for request in left[:burst]:
            found[engine.submit(request)] = []
        del left[:burst]
        alive = [
            number for number, tokens in found.items() if number not in gone and not (tokens and tokens[-1].finished)
        ]
        if alive and len(gone) < LEAVE and rng.random() < 0.4:
            gone.add(number := int(rng.choice(alive)))
            engine.cancel(number)
        for token in engine.step():
            assert token.request not in gone
            found[token.request].append(token)
    assert not engine.drain()
    return list(found.values()), gone


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_of_300_requests_gets_what_it_would_alone_while_others_come_leave_and_lose_their_pages(kind):
    routing, sharing, kv, fields = KINDS[kind]
    config = model_config(routing, sharing, kv, **fields)
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[1:3]) if "sharded" in kind else None
    model = prepare_weights(config, make_params(config), router_bias_R=router_bias(config), mesh=mesh)
    layout = kv_layout(config)
    longest = -(-LENGTH // OPTIONS.page_size)
    # pools of less than two requests at their longest and deepest
    options = dataclasses.replace(OPTIONS, block_pages=longest * layout.groups * 7 // 4, edge_pages=longest * 7 // 4)
    engine = Engine(model, options)
    engine.warm_up()
    before, requests = compilations(), _requests(layout.passes)
    results, gone = _serve(engine, requests)
    assert compilations() == before
    close = 0
    for number, (request, result) in enumerate(zip(requests, results, strict=True)):
        assert len(result) == request.max_tokens or number in gone
        close += check_tokens(config, request, result, max_depth=request.max_depth)
    assert close == 0 and len(gone) == LEAVE
    total = engine.statistics
    assert total.preemptions > 10 and total.found_prefixes > 10
    check_empty(engine)
