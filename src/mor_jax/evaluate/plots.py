"""loss.png and depth.png, drawn without any global state of matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mor_jax.evaluate.colours import depth_colours
from mor_jax.evaluate.routing import RoutedRow, depth_by_position

_VALIDATION = (
    ("validation_nll", "validation", "#d55e00", "o"),
    ("validation_topk_nll", "validation, topk (looks ahead)", "#e69f00", "s"),
    ("validation_threshold_nll", "validation, threshold (causal)", "#d55e00", "o"),
)

Metrics = Sequence[Mapping[str, Any]]


def plot_loss(path: Path, metrics: Metrics, title: str) -> None:
    """Draw training and validation loss over optimiser steps as a PNG.

    Args:
        path: file to write.
        metrics: lines of metrics.jsonl.
        title: of the figure.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    steps, losses = series(metrics, "loss")
    axes.plot(steps, losses, color="#0072b2", linewidth=1, label="training batch")
    for key, label, colour, marker in _VALIDATION:
        steps, losses = series(metrics, key)
        if len(steps):
            axes.plot(steps, losses, color=colour, marker=marker, markersize=4, linewidth=1.5, label=label)
    axes.set(xlabel="optimiser step", ylabel="negative log-likelihood (nats/token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    _write(figure, path)


def plot_depth(path: Path, metrics: Metrics, rows: Sequence[RoutedRow], mode: str, title: str) -> None:
    """Draw the share of tokens at every depth: over training, where it was recorded, and along the row, as a PNG.

    Args:
        path: file to write.
        metrics: lines of metrics.jsonl; `validation_MODE_tokens_per_depth` is drawn.
        rows: routed text.
        mode: selection mode of both panels.
        title: of the figure.
    """
    steps, shares = series(metrics, f"validation_{mode}_tokens_per_depth")
    figure = Figure(figsize=(10 if len(steps) else 6, 4.2), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2 if len(steps) else 1, sharey=True, squeeze=False)[0]
    starts, by_position = depth_by_position(rows)
    _depth_areas(panels[-1], starts, by_position)
    panels[-1].set(xlabel="position in the row (tokens)", title=f"along the row, {mode}")
    if len(steps):
        _depth_areas(panels[0], steps, shares)
        panels[0].set(xlabel="optimiser step", title=f"over training, held-out text, {mode}")
    panels[0].set_ylabel("share of tokens")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    _write(figure, path)


def series(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps [N], values [N] or [N, R]) of the lines that hold ``key``; the last of two equal steps counts."""
    found = {line["step"]: line[key] for line in metrics if key in line}
    steps = sorted(found)
    return np.array(steps), stacked([found[step] for step in steps], 0.0)


def stacked(values: Sequence[Any], fill: float) -> np.ndarray:
    """Stack numbers, or vectors [R]; those of fewer passes (an earlier stage of growth) are filled up."""
    longest = max((len(value) for value in values if isinstance(value, list)), default=0)
    return np.array([value + [fill] * (longest - len(value)) if longest else value for value in values], float)


def _depth_areas(axes: Axes, x: np.ndarray, shares: np.ndarray) -> None:
    colours = [background for background, _ in depth_colours(shares.shape[1] - 1)]
    labels = [f"{depth} pass{'' if depth == 1 else 'es'}" for depth in range(shares.shape[1])]
    if len(x) == 1:  # an area needs two ends
        x, shares = np.array([x[0], x[0] + 1]), np.repeat(shares, 2, axis=0)
    axes.stackplot(x, shares.T, colors=colours, labels=labels, edgecolor="white", linewidth=0.4)
    axes.set(xlim=(x[0], x[-1]), ylim=(0, 1))


def _write(figure: Figure, path: Path) -> None:
    with path.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def write_figure(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG beside each other.

    Args:
        figure: to write.
        path: without a suffix; its folder is created.

    Returns:
        Both files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    _write(figure, files[0])
    FigureCanvasSVG(figure).print_svg(str(files[1]), metadata={"Date": None})
    return files
