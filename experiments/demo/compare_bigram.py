"""Print a run's held-out bits per byte beside a byte-bigram model counted on the same training text.

python experiments/demo/compare_bigram.py runs/demo
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mor_jax.config import Config
from mor_jax.config import io as config_io
from mor_jax.data.pipeline import make_dataset
from mor_jax.errors import UserError
from mor_jax.evaluate.bigram import bigram_bits_per_byte, count_bigrams
from mor_jax.evaluate.validation import first_rows
from mor_jax.runs.metrics import read_metrics

KEYS = {
    "threshold": "MoR, threshold (causal)",
    "topk": "MoR, topk (looks ahead)",
    "": "model without a router",
}


def compare(run: Path) -> dict[str, float]:
    """Return bits per byte on held-out text of the bigram model and of the run's last validation.

    Raises:
        UserError: there is no run there, or it was never validated.
    """
    config = config_io.load(Config, run / "config.json")
    last = next((line for line in reversed(read_metrics(run / "metrics.jsonl")) if "validation_bytes" in line), None)
    if last is None:
        raise UserError(f"{run}/metrics.jsonl holds no validation loss")
    model, train = config.model, config.train
    shared: dict[str, Any] = {"context_length": model.context_length, "vocab_size": model.vocab_size}
    rows = min(train.eval_rows, train.batch_size // train.accumulation)  # a batch of the trainer's validation
    text = make_dataset(config.data, split="train", batch_size=1, **shared)
    held_out = make_dataset(config.data, split="validation", batch_size=rows, **shared)
    batches = list(first_rows(held_out, train.eval_rows))
    bigram = count_bigrams(model, text, text.tokenizer, text.rows)
    measured = bigram_bits_per_byte(model, bigram, batches, held_out.tokenizer, rows * len(batches))
    text.close()
    if measured.bytes != last["validation_bytes"]:
        raise UserError(
            f"{run} was validated on {last['validation_bytes']} bytes, but its data now gives {measured.bytes}"
        )
    report = {"step": last["step"], "held_out_bytes": measured.bytes, "bigram": measured.value}
    for mode in KEYS:
        key = f"validation_{mode}_bits_per_byte" if mode else "validation_bits_per_byte"
        if key in last:
            report[mode or "model"] = last[key]
    return report


def main() -> int:
    """Print the comparison, write it as JSON, and fail if the margin is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, help="JSON file to write (default: RUN/bigram.json)")
    parser.add_argument("--margin", type=float, default=0.7, help="bits per byte by which the model must be better")
    arguments = parser.parse_args()
    try:
        report = compare(arguments.run)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{report['held_out_bytes']} held-out bytes, step {report['step']}; bits per byte:")
    print(f"  {'byte bigram (Witten-Bell)':28s} {report['bigram']:.4f}")
    margins = []
    for mode, name in KEYS.items():
        if (mode or "model") in report:
            bits = report[mode or "model"]
            margins.append(report["bigram"] - bits)
            better = "better" if margins[-1] >= 0 else "worse"
            print(f"  {name:28s} {bits:.4f}  ({abs(margins[-1]):.4f} {better})")
    out = arguments.out or arguments.run / "bigram.json"
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0 if min(margins) >= arguments.margin else 1


if __name__ == "__main__":
    sys.exit(main())
