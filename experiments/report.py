"""Write docs/results.md and its figures from experiments/*/results/*.json.

python experiments/report.py
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "isoflop"))
from outcome import first_screen
from ranked import run_key
from report_claims import claims_table, not_run
from report_figures import DOCS, HERE, depth_figure, figures
from report_tables import Result, depth_table, gap_summary, machines, router_table, runs_table, source_table

SCALES = ("large", "long", "smollm2", "mini", "small")
"""Of the older comparisons, the one that says most first; experiments may have others of their own."""
DRAWN = {"long": "", "large": "-large"}
"""Scales that figures are drawn of, with what the names of the figures end in."""

_HEAD = """# Results

Written by `python experiments/report.py` from the JSON files in `experiments/*/results`; do not edit. Loss is nats per
token on held-out text. **Causal** is what generation attains: selection by threshold. *topk* looks ahead along the row,
as training does and as the paper evaluates; it stands beside it. Effects are differences of loss, negative is better.
An effect [low, high] has the 95% t-interval of the differences seed by seed: runs of one seed see the same batches.
Where the interval holds zero, or there is one seed only, nothing is decided. A mean ± is the standard deviation over
the seeds of its row. Runs in bfloat16 (all on GPUs) summed the gradient of the embedding in bfloat16, too, until
2026-11-30. It is float32 since: in the comparison at 4e15 training FLOPs (but two runs of vanilla, width 224) and four
runs at 1e15 (outer widths of MoR and grown MoR), and in nothing else below.

## Where MoR pays, and where it does not
"""
_APPENDIX = """## Appendix: older comparisons, one shape for each family

The paper's effects are of 360M-parameter models; at equal FLOPs they saw 63 tokens for each parameter without embedding
of its vanilla model and 254 of MoR with three recursions (32 and 85 in its ablations). The models below are six to a
thousand times smaller, and at `large`, counted alike, saw 1.5 and 3.9: at most the direction of an effect can be
compared. None of these scales says which architecture wins after billions of tokens, and none has a baseline at its own
best size. What speaks for and against a figure stands in the folders' outcomes.

### What all of these runs share

- **No baseline stands at its own best size.** Every scale compares models of one unrolled shape at equal training FLOPs
  and few tokens a parameter; there the model that sees the most text wins. At half the FLOPs of `large` (1.48e16, one
  seed, AdamW) a plain Transformer of MoR's four unique layers, each used once, had 3.524 nats, MoR with three
  recursions 3.658 and the vanilla model of eight layers 3.706. At half the width eight layers beat four (3.457 and
  3.478, Muon, 7.4e15).
- **AdamW only.** At 4e15 FLOPs Muon gains 0.11 nats for vanilla and 0.15 for MoR (one seed, each at its best rate;
  [isoflop](../experiments/isoflop/README.md)): what differs between models trained by AdamW may not between models that
  are trained as well as is known.
- **Held-out text was drawn by the document**: 46% of its characters are parts of books and textbooks of which other
  parts were trained on. That lowers every loss and favours models that remember more; the loss by source on a text of
  its own stands beside where it was measured. New corpora hold out whole works.
- **Warm-ups were not shortened with the runs** at `long` (100 steps of 1,020, 10% where 3% was meant; the capacity
  warm-up 29% where 10% was) and hardly at `large`. Runs of another length now keep the share.
- **Random selection kept the router's gates**; the release's random router has random gates, as `routing.random` has
  now.
"""
_GAP_HEAD = """## The gap between topk and threshold

Causal less look-ahead loss of one trained expert-choice model. *As trained*, the boundary of a recursion is a raw score
of 0, which an auxiliary loss (or an auxiliary router) has to make right; *calibrated*, it is put after training where
topk cut the scores of training text (`mor eval --calibrate`), which costs no training.
"""
_CARE = {
    "large": """8 layers of width 768 on one GPU: seven times the parameters of `long`, 31 times its training FLOPs and
4.5 times its tokens. Few runs, all of N_r = 3.

**What its baseline cannot say.** The vanilla model of eight layers saw 1.5 tokens for each parameter without embedding,
the recursive one 3.0, MoR 3.9: the baseline is too large for its budget. That MoR is as good says nothing about the
best plain model: one of four layers beat both, by 0.13 and 0.18 nats, at half these FLOPs.""",
    "long": """8 layers of width 256 on one GPU, past the point where MoR's lead at the start of training is gone
(figure "Loss over training").

**What its baseline cannot say.** The vanilla model saw 2.8 tokens for each parameter without embedding, MoR with three
recursions 7.1, in 1,020 and 1,284 steps: no smaller plain model, which would have seen more text, was run, so neither
an effect against vanilla nor its absence says what families do at their best sizes. Effects within one family
(router, gate, capacity, sharing) do not need a vanilla baseline, but are of one seed.""",
    "smollm2": """SmolLM2-135M-Instruct (30 layers of width 576, imported from 4-bit weights) made recursive and trained
on 13M tokens with one GPU: uptraining of a model that somebody else pretrained. One seed, and what seeds do was not
measured: a few thousandths between two strategies decide nothing.

**What its baseline cannot say.** The strategies are compared with each other, at equal tokens; the original was not
trained on these tokens, so nothing says what recursion costs.""",
    "mini": """8 layers of width 64 on one CPU core, 0.3M tokens: fewer than two a parameter, and the loss still falls
steeply. What it can say: the gap between topk and threshold, which is a difference within one trained model and so free
of what seeds do to the loss (they move the gap too: its own spread stands beside it); how the boundary decides; dead
positions; orderings larger than the spread of seeds.

**What its baseline cannot say.** Whether an effect of a few hundredths of a nat, as most of the paper's are, has that
sign at a useful size; and nothing about vanilla, which is not among the comparisons here.""",
    "small": """14 layers of width 256 on one GPU.

**What its baseline cannot say.** Anything for or against the paper: the vanilla model saw 2.5 tokens for each parameter
without embedding in 800 steps, MoR with three recursions 8.0 in 1,082, and these runs measure the start of training,
where MoR is ahead by ten and more times the paper's effects.""",
}


def load_results(folder: Path, scale: str | None = None) -> dict[str, list[Result]]:
    """Return the results of every experiment, by the name of its folder; ``scale`` is the name of the file."""
    found: dict[str, list[Result]] = {}
    for path in sorted(folder.glob(f"*/results/{scale or '*'}.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, list):
            found.setdefault(path.parent.parent.name, []).extend(values)
    return found


def scales_of(folder: Path, experiment: str = "*") -> list[str]:
    """Return the scales at which an experiment, or any, has results."""
    names = set()
    for path in folder.glob(f"{experiment}/results/*.json"):
        if isinstance(json.loads(path.read_text(encoding="utf-8")), list):
            names.add(path.stem)
    return sorted(names, key=lambda name: (SCALES.index(name) if name in SCALES else len(SCALES), name))


def _other_tables(folder: Path) -> str:
    """Tables of lm-eval and of text by source that lie beside the sweeps' results as JSON objects."""
    parts = []
    for path in sorted(folder.glob("*/results/*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            continue
        name, *_ = path.name.split(".")
        if "tasks" in values:
            parts.append(f"### lm-eval: {name}, {_selected(path, values)}\n\n{_tasks(values)}")
        if "sources" in values:
            window = f"window {values['context']}, stride {values['stride']}"
            parts.append(f"### Loss by source: {name}, scale `{_scale(path)}`, {window}\n\n{_sources(values)}")
    return "\n".join(parts)


def _scale(path: Path) -> str:
    """Scale of a trained model: ``results/NAME.SCALE.WHAT.json``."""
    return path.name.split(".")[1]


def _selected(path: Path, values: Result) -> str:
    """Scale, step and, with a router, how tokens were selected."""
    selection = "" if values["mode"] == "topk" else f", selection {values['mode']}"
    calibrated = ", calibrated boundaries" if values.get("boundaries") else ""
    return f"scale `{_scale(path)}` (step {values['step']}{selection}{calibrated})"


def _tasks(values: Result) -> str:
    lines = ["| task | documents | acc | acc_norm | perplexity |", "|---|---|---|---|---|"]
    for name, row in values["tasks"].items():
        cells = [
            "" if row.get(key) is None else f"{row[key]:.4g}" for key in ("samples", "acc", "acc_norm", "perplexity")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _sources(values: Result) -> str:
    names = [name for name in values["sources"]["all"] if name not in ("tokens", "bytes")]
    lines = ["| source | tokens | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for source, row in values["sources"].items():
        lines.append(f"| {source} | {row['tokens']} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |")
    return "\n".join(lines) + "\n"


_FIGURES = (
    ("Quality against compute, scale `large`", "pareto-large"),
    ("Quality against compute, scale `long`", "pareto"),
    ("Loss over training, scale `large`", "training-large"),
    ("Loss over training, scale `long`", "training"),
    ("Test-time scaling, scale `large`", "test-time-scaling-large"),
    ("Test-time scaling, scale `long`", "test-time-scaling"),
    ("What the depth of a token goes with (MoR, N_r = 3)", "depth-by-expert-r3-s0"),
)


def report(folder: Path = HERE) -> str:
    """Return docs/results.md."""
    compared = [scale for scale in scales_of(folder) if scale in SCALES]
    names = [path.parent.name for path in sorted(folder.glob("*/sweep.*"))]
    missing = [name for name in names if not scales_of(folder, name)]
    parts = [_HEAD, first_screen(folder / "isoflop" / "results"), _APPENDIX]
    for scale in compared:
        parts += [
            f"### The paper's claims and ours, scale `{scale}`\n",
            f"{_CARE[scale]}\n",
            claims_table(load_results(folder, scale)),
        ]
    parts.append(not_run([load_results(folder, scale) for scale in compared]))
    parts += [f"Experiments not run at any scale: {', '.join(missing)}.\n"] if missing else []
    parts += _gaps(folder, [name for name in names if name not in missing])
    for name in names:
        if name not in missing:
            parts += _experiment(folder, name)
    parts += ["## Trained models on tasks and texts\n", _other_tables(folder) or "not run\n"]
    for title, name in _FIGURES:
        drawn = (DOCS / "images" / f"{name}.png").exists()
        parts.append(f"## {title}\n\n" + (f"![{title}](images/{name}.png)\n" if drawn else "not run\n"))
    return "\n".join(part for part in parts if part)


def _gaps(folder: Path, names: Sequence[str]) -> list[str]:
    """Say how wide the gap between topk and threshold is, experiment by experiment, with links to the recipes."""
    lines, seen = [], set()
    for name in names:
        for scale in scales_of(folder, name):
            keyed = {run_key(result["config"]): result for result in load_results(folder, scale)[name]}
            text = gap_summary([result for key, result in keyed.items() if key not in seen])
            seen |= keyed.keys() if text else set()  # runs that several experiments ask for are told once
            lines += [f"- [{name}, scale `{scale}`](#{name}-scale-{scale}): {text}"] if text else []
    return [_GAP_HEAD, "".join(lines)] if lines else []


def _experiment(folder: Path, name: str) -> list[str]:
    """Tables of one experiment, scale by scale."""
    parts = [f"## {name}\n", f"[What, how, outcome](../experiments/{name}/README.md)\n"]
    for scale in scales_of(folder, name):
        mine = load_results(folder, scale)[name]
        parts += [f"### {name}, scale `{scale}`\n", runs_table(mine), router_table(mine)]
        titled = (
            ("Causal loss by source of held-out text:", source_table(mine)),
            ("Causal loss by a cap on the passes of a token:", depth_table(mine)),
        )
        parts += [f"{title}\n\n{table}" for title, table in titled if table]
        parts.append(machines(mine))
    return parts


def main() -> int:
    """Write the page and its figures."""
    drawn = [path for scale, suffix in DRAWN.items() for path in figures(load_results(HERE, scale), suffix)]
    for path in [*drawn, *depth_figure()]:
        print(path)
    (DOCS / "results.md").write_text(report(), encoding="utf-8")
    print(DOCS / "results.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
