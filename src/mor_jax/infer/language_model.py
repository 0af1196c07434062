"""A trained model with its tokenizer: load it, and generate text."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax

from mor_jax.array_types import Params
from mor_jax.config import ModelConfig
from mor_jax.errors import UserError, require
from mor_jax.infer.decode_model import DecodeModel, prepare_weights
from mor_jax.infer.engine_options import ONE_DEVICE, EngineMesh, EngineOptions, KvDtype
from mor_jax.infer.growing_text import GrowingText
from mor_jax.infer.replicas import AnyEngine, copy_meshes, make_engine
from mor_jax.infer.request import NOT_FINITE, Request
from mor_jax.infer.sampling import Sampling
from mor_jax.model.parameters import split_router_state

_MOST_RUNNING = 32


@dataclass
class Completion:
    """What was generated for one prompt."""

    prompt: str
    text: str = ""
    """Generated text, without the stop string that ended it."""
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    """Per token the passes of the token before it, from whose state it was read."""
    log_probabilities: list[float] = field(default_factory=list)
    """Per token, in nats, before temperature and cuts."""
    finish: Literal["stop", "length", ""] = ""
    """Why it ended: a token or a string that stops, or max_tokens; empty while it goes on."""


@dataclass(frozen=True)
class Piece:
    """What one generated token adds."""

    prompt: int
    """Number of the prompt."""
    text: str
    """New text that can be shown; may be empty, and may end the text of earlier tokens."""
    token: int
    depth: int
    completion: Completion
    """All of the prompt's completion so far."""
    time: float
    """``time.perf_counter`` when the host saw the token; those of a dispatch come together."""


class LanguageModel:
    """A model that generates text.

    Args:
        config: the model.
        params: its parameter tree.
        tokenizer: ``data.tokenizer.Tokenizer``, or anything like it.
        router_bias_R: bias of loss-free balancing.
        running_R: running boundaries of expert-choice (``Weights.boundaries_R``).
        boundaries: raw-score boundary of every recursion; None takes the model's own (``boundaries_of``).
        mesh: devices to run on.

    Raises:
        UserError: the model cannot decode, there are not so many devices, or they do not divide it.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Any,
        *,
        router_bias_R: jax.Array | None = None,
        running_R: jax.Array | None = None,
        boundaries: Sequence[float] | None = None,
        mesh: EngineMesh = ONE_DEVICE,
    ) -> None:
        self.tokenizer = tokenizer
        self._copies = tuple(
            prepare_weights(
                config,
                params,
                router_bias_R=router_bias_R,
                running_R=running_R,
                boundaries=boundaries,
                mesh=devices,
                known_tokens=tokenizer.vocab_size,
            )
            for devices in copy_meshes(mesh)
        )
        self._engines: dict[EngineOptions, AnyEngine] = {}

    @property
    def model(self) -> DecodeModel:
        """The weights; of several copies the first."""
        return self._copies[0]

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.model.config

    def new_engine(self, options: EngineOptions) -> AnyEngine:
        """Make an engine; on several copies of the weights, each copy has these sizes."""
        return make_engine(self._copies, options)

    def engine(self, options: EngineOptions) -> AnyEngine:
        """Return an idle engine of these sizes, made once."""
        kept = self._engines.get(options)
        if kept is None or kept.busy:
            kept = self._engines[options] = self.new_engine(options)
        return kept

    def generate(self, prompts: str | Sequence[str], **arguments: Any) -> list[Completion]:
        """Generate a completion for every prompt; see ``stream`` for the arguments.

        Returns:
            The completions in the order of the prompts.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        completions = [Completion(prompt) for prompt in prompts]
        for piece in self.stream(prompts, **arguments):
            completions[piece.prompt] = piece.completion
        return completions

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        max_depth: int | None = None,
        max_length: int | None = None,
        kv_dtype: KvDtype = "model",
    ) -> Iterator[Piece]:
        """Generate completions of all prompts at the same time, and yield every token as it comes.

        Args:
            prompts: texts; an empty one begins a new document.
            max_tokens: tokens to generate at most.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: draw among so many of the most likely tokens; 0 is all.
            top_p: draw among the most likely tokens that together have this probability.
            seed: of the draws; prompt i uses seed + i.
            stop: a string or several that end a completion.
            max_depth: passes over the shared block that a token may take at most.
            max_length: tokens of prompt and completion; None is the model's context.
            kv_dtype: what keys and values are kept in, `model` (its dtype) or `int8`.

        Raises:
            UserError: arguments out of range, or a prompt that is too long, at once; later, that the logits are not
                finite.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        require(len(prompts) > 0, "there is no prompt")
        require(max_tokens > 0, f"max_tokens={max_tokens} must be positive")
        special = self.tokenizer.special
        token_lists = [self.tokenizer.encode(prompt) or [special.start_id] for prompt in prompts]
        longest = max(map(len, token_lists)) + max_tokens
        limit = self.config.context_length if max_length is None else max_length
        require(
            longest <= limit,
            f"the longest prompt and max_tokens={max_tokens} make {longest} tokens, more than max_length={limit}",
        )
        per_copy = -(-len(prompts) // len(self._copies))
        running = min(per_copy, _MOST_RUNNING)
        options = EngineOptions(max_running=running, max_length=limit, kv_dtype=kv_dtype)
        engine = self.engine(options)
        requests = [
            Request(
                tuple(map(int, tokens)),
                max_tokens,
                Sampling(temperature, top_k, top_p, (seed + index) % 2**32),
                stop_tokens=special.stop_ids,
                max_depth=max_depth,
            )
            for index, tokens in enumerate(token_lists)
        ]
        for request in requests:
            engine.check(request)
        return self._stream(options, requests, prompts, [stop] if isinstance(stop, str) else stop)

    def _stream(
        self, options: EngineOptions, requests: Sequence[Request], prompts: Sequence[str], stop: Sequence[str]
    ) -> Iterator[Piece]:
        engine = self.engine(options)  # only now: another stream may have begun in between
        numbers = {engine.submit(request): index for index, request in enumerate(requests)}
        completions = [Completion(prompt) for prompt in prompts]
        texts = [GrowingText(self.tokenizer, stop, request.prompt) for request in requests]
        try:
            for token in engine.run():
                index = numbers[token.request]
                completion, text = completions[index], texts[index]
                if completion.finish:
                    continue  # a stop string ended it before the engine knew
                require(token.is_valid, f"prompt {index + 1}, token {len(completion.tokens) + 1}: {NOT_FINITE}")
                ended = token.token in requests[index].stop_tokens
                completion.tokens.append(token.token)
                completion.depths.append(token.depth)
                completion.log_probabilities.append(token.log_probability)
                piece = text.add(token.token, last=token.finished)
                completion.text = text.text
                if ended or text.stopped:
                    completion.finish = "stop"
                elif token.finished:
                    completion.finish = "length"
                if text.stopped and not token.finished:
                    engine.cancel(token.request)
                yield Piece(index, piece, token.token, token.depth, completion, token.time)
        finally:  # the reader may have left
            for number in numbers:
                engine.cancel(number)
            for _ in engine.run():
                pass


def load(
    path: str | Path, *, boundaries: Sequence[float] | None = None, mesh: EngineMesh = ONE_DEVICE
) -> LanguageModel:
    """Load a model for generation.

    Args:
        path: a run folder, or any other that ``interop.sources.open_model`` knows: converted weights, a Hugging Face
            Llama folder, the official release.
        boundaries: raw-score boundary of every recursion (expert-choice); None takes the model's own.
        mesh: devices to run on.

    Raises:
        UserError: there is no model or no tokenizer, the model cannot decode, there are not so many devices, or they do
            not divide the model.
    """
    from mor_jax.interop.sources import open_model  # only here: the engine alone needs no checkpoint library

    copy_meshes(mesh)  # too few devices are known before anything is read
    opened = open_model(Path(path))
    if opened.tokenizer is None:
        raise UserError(f"{path} holds no tokenizer that can be used")
    params, bias_R, running_R = split_router_state(opened.params)
    state: dict[str, Any] = {"router_bias_R": bias_R, "running_R": running_R}
    return LanguageModel(opened.model, params, opened.tokenizer, **state, boundaries=boundaries, mesh=mesh)


@dataclass
class Speed:
    """Tokens per second of a stream; what comes with the first dispatch, which is waited for longest, apart."""

    begin: float = field(default_factory=time.perf_counter)
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    with_first: int = 0

    def count(self, seen: float) -> None:
        """Count a token that came at a time of ``time.perf_counter``."""
        self.first = seen if self.first is None else self.first
        self.last, self.tokens = seen, self.tokens + 1
        self.with_first += seen == self.first

    def summary(self) -> str:
        """Say it in one line; the first tokens' time includes compilation."""
        if self.first is None:
            return "no tokens"
        later = self.tokens - self.with_first
        rate = f", then {later / (self.last - self.first):.1f} tokens/s" if later else ""
        return f"{self.tokens} tokens: {self.with_first} after {self.first - self.begin:.2f} s{rate}"
