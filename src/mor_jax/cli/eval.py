"""``mor eval RUN``: held-out loss of a run's newest checkpoint under both selection modes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from mor_jax.cli.options import parse
from mor_jax.evaluate.inspect import evaluate_run
from mor_jax.evaluate.validation import summary
from mor_jax.paths import to_path
from mor_jax.train.loop import enable_compilation_cache


@dataclass(frozen=True)
class EvalArguments:
    """Arguments of ``mor eval``."""

    run: Annotated[str, tyro.conf.Positional]
    """Run folder, local or `gs://`."""
    rows: int | None = None
    """Rows of held-out text; None is the run's train.eval_rows."""
    json: bool = False
    """Print JSON, with all router statistics."""


def run(arguments: Sequence[str]) -> int:
    """Measure and print."""
    options = parse(EvalArguments, arguments, "eval", "Measure a run on its held-out text.")
    enable_compilation_cache()
    restored, losses = evaluate_run(to_path(options.run), rows=options.rows)
    if options.json:
        print(json.dumps({"run": options.run, "step": restored.step, **losses}, indent=2))
    else:
        print(f"step {restored.step}, {losses['validation_tokens']} held-out tokens")
        print(summary(restored.config.model, losses))
    return 0
