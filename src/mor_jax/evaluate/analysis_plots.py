"""Figures of the routing analysis, PNG and SVG each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mor_jax.evaluate.colours import depth_colours
from mor_jax.evaluate.correlates import Correlate
from mor_jax.evaluate.plots import stacked, write_figure

_TITLES = {
    "position": "position in the row",
    "frequency": "occurrences in this text",
    "next_surprisal": "surprisal of the next token (nats)",
    "own_surprisal": "surprisal of the token itself (nats)",
    "word_piece": "place in its word",
    "characters": "kind of characters",
}
_ATTENTION_TITLES = {
    "entropy": "entropy (nats)",
    "distance": "distance (tokens back)",
    "first": "share on the first visible token",
    "itself": "share on the token itself",
}
_ROUTER_TITLES = {
    "threshold_accuracy_R": "boundary decides as the selection did",
    "dead_token_ratio": "dead positions in the batch",
    "max_vio": "MaxVio",
    "entropy": "entropy of the loads (nats)",
}


def plot_correlates(path: Path, found: Sequence[Correlate], mode: str) -> list[Path]:
    """Draw the share of tokens at every depth by each property.

    Args:
        path: file to write, without a suffix.
        found: of ``correlates``.
        mode: selection mode, for the title.
    """
    columns = 3
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    figure.suptitle(f"depth of tokens, {mode}")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes, correlate in zip(panels, found, strict=False):
        shares = np.array([group.shares for group in correlate.groups])
        x, bottom = np.arange(len(shares)), np.zeros(len(shares))
        for depth, (colour, _) in enumerate(depth_colours(shares.shape[1] - 1)):
            label = f"{depth} pass{'' if depth == 1 else 'es'}"
            axes.bar(x, shares[:, depth], bottom=bottom, color=colour, width=0.9, label=label)
            bottom += shares[:, depth]
        labels = [group.label for group in correlate.groups]
        axes.set_xticks(x, labels, rotation=35, ha="right", fontsize="x-small")
        rank = "" if correlate.spearman is None else f" (rank correlation {correlate.spearman:+.2f})"
        axes.set_title(_TITLES[correlate.name] + rank, fontsize="medium")
        axes.set_ylim(0, 1)
    for axes in panels[len(found) :]:
        axes.set_axis_off()
    panels[0].set_ylabel("share of tokens")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return write_figure(figure, path)


def plot_router(path: Path, history: Mapping[str, Sequence[Any]]) -> list[Path]:
    """Draw what the router did over training.

    Args:
        path: file to write, without a suffix.
        history: of ``router_history``.
    """
    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2, sharex=True).ravel(), _ROUTER_TITLES.items(), strict=True):
        values = stacked(history[name], np.nan)
        if values.ndim == 2:
            for recursion in range(values.shape[1]):
                axes.plot(history["step"], values[:, recursion], label=f"recursion {recursion + 1}")
            axes.legend(fontsize="small")
        else:
            axes.plot(history["step"], values, color="#0072b2")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    figure.supxlabel("optimiser step")
    return write_figure(figure, path)


def plot_hidden(path: Path, changes: Sequence[Mapping[str, float]]) -> list[Path]:
    """Draw how much every pass changes the hidden states.

    Args:
        path: file to write, without a suffix.
        changes: of ``hidden_changes``.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    passes = np.arange(1, len(changes) + 1)
    for axes, (name, title) in zip(
        figure.subplots(1, 2),
        (("relative_change", "size of the change over the state's"), ("cosine", "cosine of before and after")),
        strict=True,
    ):
        axes.bar(passes, [change[name] for change in changes], color="#0072b2", width=0.6)
        axes.set(xlabel="pass", title=title, xticks=passes)
    return write_figure(figure, path)


def plot_attention(path: Path, passes: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Draw what the heads attend to: a point per head, a line through the means of the layers of each pass.

    Args:
        path: file to write, without a suffix.
        passes: of ``attention_by_pass``.
    """
    figure = Figure(figsize=(9.2, 6.4), layout="constrained")
    depth = len(passes[0]["layers"])
    for axes, (name, title) in zip(figure.subplots(2, 2, sharex=True).ravel(), _ATTENTION_TITLES.items(), strict=True):
        for index, (found, (colour, _)) in enumerate(zip(passes, depth_colours(len(passes))[1:], strict=True)):
            heads_LN = np.array([layer[name] for layer in found["layers"]])
            x_L = index * depth + np.arange(1, depth + 1)
            axes.plot(np.repeat(x_L, heads_LN.shape[1]), heads_LN.ravel(), "o", color=colour, markersize=4, alpha=0.6)
            axes.plot(x_L, heads_LN.mean(axis=1), color=colour, label=f"pass {index + 1}")
            if name == "entropy":
                label = "log of the visible keys" if index == 0 else None
                limit = np.full(depth, np.log(max(found["keys"], 1.0)))
                axes.plot(x_L, limit, "_", color="#999999", markersize=14, label=label)
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in figure.axes[2:]:
        axes.set_xlabel("layer of the shared block, pass after pass")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return write_figure(figure, path)
