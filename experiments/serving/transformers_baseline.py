"""Greedy decoding of the vanilla shape by Hugging Face transformers, to show that our vanilla engine is no straw man.

Usage: python experiments/serving/transformers_baseline.py --out FILE (an NVIDIA GPU; needs torch and transformers).
Weights are random, prompts one token, as in ``mor bench serve``; every sequence gets the same number of new tokens.
"""

import dataclasses
import importlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mor_jax.bench.serving_setup import parse_model
from mor_jax.errors import UserError, require


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    out: Path
    """JSON file for the results."""
    model: str = "vanilla-360m@34"
    """PRESET[@LAYERS]."""
    caches: tuple[Literal["static", "dynamic"], ...] = ("static", "dynamic")
    """Cache implementations; transformers compiles the step of a static one."""
    batch: int = 32
    """Sequences."""
    new_tokens: int = 256
    """Tokens generated for each."""
    repeats: int = 2
    """Timed calls, after one that warms up."""

    def __post_init__(self) -> None:
        for name in ("batch", "new_tokens", "repeats"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")


def measure(torch: Any, model: Any, cache: str, settings: Settings) -> dict[str, Any]:
    """Time ``generate`` with one kind of cache."""
    prompt = torch.randint(0, model.config.vocab_size, (settings.batch, 1), device="cuda")
    count = settings.new_tokens
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    if cache == "static":
        options["cache_implementation"] = "static"
    seconds = []
    for _ in range(1 + settings.repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        assert out.shape == (settings.batch, 1 + count)
    best = min(seconds[1:])
    return {
        "cache": cache,
        "warm_up_seconds": seconds[0],
        "seconds": seconds[1:],
        "tokens_per_second": settings.batch * count / best,
    }


def main() -> int:
    """Run what the arguments say."""
    settings = tyro.cli(Settings, description=__doc__)
    config = parse_model(settings.model)
    try:
        torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: this script needs torch and transformers") from error
    require(torch.cuda.is_available(), "device: torch finds no NVIDIA GPU")
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=settings.new_tokens + 1,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(shape).to("cuda", torch.bfloat16).eval()
    record: dict[str, Any] = {
        "command": ["python", *sys.argv],
        "settings": {**dataclasses.asdict(settings), "out": settings.out.name},
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": [],
    }
    for cache in settings.caches:
        record["results"].append(measure(torch, model, cache, settings))
        print(record["results"][-1], flush=True)
        settings.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
