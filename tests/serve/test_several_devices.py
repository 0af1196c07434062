"""The server over two copies of an engine that share two devices each: every answer is that of one device."""

import concurrent.futures
import dataclasses

import jax
import pytest
from live_server import MODEL, running

from mor_jax.data.tokenizer import Tokenizer
from mor_jax.infer.compilations import compilations
from mor_jax.infer.engine_options import EngineMesh
from mor_jax.infer.language_model import LanguageModel
from mor_jax.infer.replicas import Replicas
from mor_jax.model.transformer import init_params

WIDER = dataclasses.replace(MODEL, vocab_size=258)
"""257 do not divide."""


def _model(mesh):
    params = jax.jit(lambda: init_params(WIDER, jax.random.key(1)))()
    return LanguageModel(WIDER, params, Tokenizer.bytes_level(), mesh=mesh)


@pytest.mark.slow
def test_answers_are_those_of_one_device():
    prompts = [[i + 1] * (1 + 5 * i % 17) for i in range(12)]
    ask = lambda client, prompt: client.complete(prompt=prompt, max_tokens=9, temperature=0, show_depth=True)  # noqa: E731
    with running(_model(EngineMesh())) as client:
        want = [ask(client, prompt).json["choices"][0]["tokens"] for prompt in prompts]
    with running(_model(EngineMesh(data=2, tensor=2))) as client:
        before = compilations()
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as threads:
            answers = list(threads.map(lambda prompt: ask(client, prompt), prompts))
        assert [answer.status for answer in answers] == [200] * len(prompts)
        assert compilations() == before
        replicas = client.server.service._thread._engine
        assert isinstance(replicas, Replicas)
        assert all(engine.statistics.tokens > 0 for engine in replicas.engines)
        assert client.metric("mor_pages") == 2 * sum(pages for _, pages in replicas.engines[0].pages_held())
    for answer, tokens in zip(answers, want, strict=True):
        got = answer.json["choices"][0]["tokens"]
        assert [(t["id"], t["depth"]) for t in got] == [(t["id"], t["depth"]) for t in tokens]
