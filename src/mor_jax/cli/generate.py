"""``mor generate CHECKPOINT --prompt TEXT``: continue texts with a trained model."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mor_jax.cli.options import parse
from mor_jax.compilation_cache import enable_compilation_cache
from mor_jax.errors import UserError, reason, require, require_text
from mor_jax.infer.engine_options import EngineMesh, KvDtype

if TYPE_CHECKING:
    from mor_jax.infer.language_model import Completion, LanguageModel


@dataclass(frozen=True)
class GenerateArguments:
    """Arguments of ``mor generate``."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """Run folder, converted weights, or a Hugging Face or official folder."""
    prompt: tuple[str, ...] = ()
    """One text or several; without one, and without --file, standard input is the prompt."""
    file: Path | None = None
    """File with one prompt per line (UTF-8)."""
    max_tokens: int = 64
    """Tokens to generate at most."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw among so many of the most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the most likely tokens that together have this probability."""
    seed: int = 0
    """Of the draws."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    max_depth: int | None = None
    """Passes over the shared block that a token may take at most."""
    max_length: int | None = None
    """Tokens of prompt and completion; None is the model's context."""
    kv_dtype: KvDtype = "model"
    """Keys and values: in the model's dtype, or in int8 with a scale per entry and head."""
    boundaries: tuple[float, ...] | None = None
    """Expert-choice: raw-score boundary of every recursion, as `mor eval --calibrate` prints; None is the model's."""
    show_depth: bool = False
    """Also print each token with the passes behind it."""
    json: bool = False
    """Print one JSON line per prompt."""
    mesh: EngineMesh = field(default_factory=EngineMesh)


def run(arguments: Sequence[str]) -> int:
    """Generate: a single text as it grows, several when all are there."""
    options = parse(GenerateArguments, arguments, "generate", "Continue texts with a trained model.")
    prompts = _prompts(options)
    from mor_jax.infer.language_model import Completion, Speed, load

    enable_compilation_cache()
    model, speed = load(options.checkpoint, boundaries=options.boundaries, mesh=options.mesh), Speed()
    names = ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop", "max_depth", "max_length", "kv_dtype")
    stream = model.stream(prompts, **{name: getattr(options, name) for name in names})
    completions = [Completion(prompt) for prompt in prompts]
    live = len(prompts) == 1 and not options.json
    if live:
        print(prompts[0], end="", flush=True)
    for piece in stream:
        speed.count(piece.time)
        completions[piece.prompt] = piece.completion
        if live:
            print(piece.text, end="", flush=True)
    for completion in completions:
        _print(model, completion, options, live)
    print(speed.summary(), file=sys.stderr)
    return 0


def _prompts(options: GenerateArguments) -> list[str]:
    require(not options.prompt or options.file is None, "--prompt and --file exclude each other")
    if options.prompt:
        return [require_text(text, f"prompt {number}") for number, text in enumerate(options.prompt, start=1)]
    if options.file is None:
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not {error.encoding} text ({reason(error)})") from error
        return [require_text(text.removeprefix("\ufeff"), "standard input")]
    try:
        text = options.file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--file {options.file}: not a readable UTF-8 text ({reason(error)})") from error
    lines = text.removesuffix("\n").split("\n")  # splitlines would cut at form feeds and U+2028 as well
    require(bool(text), f"--file {options.file} holds no line")
    return lines


def _print(model: "LanguageModel", completion: "Completion", options: GenerateArguments, live: bool) -> None:
    if options.json:
        print(json.dumps(dataclasses.asdict(completion), allow_nan=False))
        return
    print("" if live else completion.prompt + completion.text)
    if options.show_depth:
        shown = (repr(model.tokenizer.decode([token]))[1:-1] for token in completion.tokens)
        print("depths: " + " ".join(f"{text}|{depth}" for text, depth in zip(shown, completion.depths, strict=True)))
