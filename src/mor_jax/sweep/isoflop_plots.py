"""Figures of a sweep: isoFLOP parabolas, the compute-optimal path, and quality against compute; PNG and SVG each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from mor_jax.evaluate.plots import write_figure
from mor_jax.sweep.fit import IsoFlopFit, Points

_CURVE_POINTS = 100
_NARROW = 2.0
"""Largest cost over the smallest up to which an axis is linear."""


def plot_isoflop(path: Path, points: Points, fit: IsoFlopFit, title: str) -> list[Path]:
    """Draw the runs, the parabola of every budget, and the compute-optimal path with its band.

    Args:
        path: file to write, without a suffix.
        points: runs per budget.
        fit: of these points.
        title: of the figure.

    Returns:
        The files written.
    """
    figure = Figure(figsize=(10 if fit.path else 5.5, 4.4), layout="constrained")
    figure.suptitle(title)
    panels = figure.subplots(1, 2 if fit.path else 1, squeeze=False)[0]
    colours = mpl.colormaps["cividis"](np.linspace(0.05, 0.85, len(fit.parabolas)))
    for colour, (budget, parabola) in zip(colours, fit.parabolas.items(), strict=True):
        sizes, losses = (np.array(values) for values in zip(*points[budget], strict=True))
        grid = np.geomspace(sizes.min(), sizes.max(), _CURVE_POINTS)
        panels[0].plot(sizes, losses, "o", color=colour, markersize=5)
        panels[0].plot(grid, parabola(grid), color=colour, label=f"{budget:.2g} FLOPs")
        panels[0].plot(parabola.size, parabola.loss, "*", color=colour, markersize=12)
        if budget in fit.size_bands:
            band = fit.size_bands[budget]
            panels[0].axvspan(band.low, band.high, color=colour, alpha=0.08)
    panels[0].set(xscale="log", xlabel="parameters", ylabel="loss (nats/token)", title="loss by size")
    _few_ticks(panels[0].xaxis)
    panels[0].legend()
    if fit.path is not None:
        _draw_path(panels[1], fit)
    return write_figure(figure, path)


def _few_ticks(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5, as matplotlib's own labels meet where an axis is short."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(EngFormatter())
    axis.set_minor_formatter(NullFormatter())


def _budget_ticks(axes: Axes, budgets: Sequence[float]) -> None:
    """Label the budgets, and nothing else."""
    axes.set_xticks(budgets, [f"{budget:.2g}" for budget in budgets])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_path(axes: Axes, fit: IsoFlopFit) -> None:
    assert fit.path is not None
    budgets = np.array(list(fit.parabolas))
    grid = np.geomspace(budgets.min() / 2, budgets.max() * 2, _CURVE_POINTS)
    if fit.samples:
        curves = np.array([sample(grid) for sample in fit.samples])
        low, high = np.quantile(curves, [0.05, 0.95], axis=0)
        axes.fill_between(grid, low, high, alpha=0.2, color="#0072b2", label="90% of the bootstrap")
    axes.plot(grid, fit.path(grid), color="#0072b2", label=f"N* ~ C^{fit.path.exponent:.2f}")
    axes.plot(budgets, [p.size for p in fit.parabolas.values()], "*", color="#d55e00", markersize=12, label="optima")
    axes.set(xscale="log", yscale="log", xlabel="budget (FLOPs)", ylabel="best size (parameters)", title="path")
    _budget_ticks(axes, budgets.tolist())
    _few_ticks(axes.yaxis)
    axes.legend()


def plot_losses(path: Path, fits: Mapping[str, IsoFlopFit]) -> list[Path]:
    """Draw the loss at the best size by budget, a line and its bootstrap band per family.

    Args:
        path: file to write, without a suffix.
        fits: by family; a fit of one budget is a point.

    Returns:
        The files written.
    """
    figure = Figure(figsize=(6.5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, fit) in enumerate(fits.items()):
        colour = mpl.colormaps["tab10"](index)
        budgets = np.array(list(fit.parabolas))
        axes.plot(budgets, [p.loss for p in fit.parabolas.values()], "*", color=colour, markersize=11)
        if fit.losses is None:
            axes.plot([], [], "*", color=colour, label=name)
            continue
        grid = np.geomspace(budgets.min(), budgets.max(), _CURVE_POINTS)
        axes.plot(grid, fit.losses(grid), color=colour, label=f"{name}: L* ~ C^{fit.losses.exponent:.3f}")
        if fit.loss_samples:
            low, high = np.quantile([sample(grid) for sample in fit.loss_samples], [0.05, 0.95], axis=0)
            axes.fill_between(grid, low, high, alpha=0.15, color=colour)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="causal loss at the best size (nats/token)")
    _budget_ticks(axes, sorted({budget for fit in fits.values() for budget in fit.parabolas}))
    axes.grid(alpha=0.3)
    axes.legend()
    return write_figure(figure, path)


def plot_frontiers(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> list[Path]:
    """Draw loss against cost, one panel per kind of cost, one colour and Pareto front per family.

    Args:
        path: file to write, without a suffix.
        panels: label of the cost: family: (cost, causal loss) of its runs.

    Returns:
        The files written.
    """
    figure = Figure(figsize=(5 * len(panels), 4.4), layout="constrained")
    for axes, (xlabel, families) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for index, (name, points) in enumerate(families.items()):
            colour = mpl.colormaps["tab10"](index)
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=3, alpha=0.5)
            axes.plot(*zip(*pareto_front(points), strict=True), color=colour, label=name)
        axes.set(xscale="log", xlabel=xlabel, ylabel="causal loss (nats/token)")
        _few_ticks(axes.xaxis)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    return write_figure(figure, path)


def plot_pareto(path: Path, panels: Mapping[str, Sequence[tuple[str, float, float]]], ylabel: str) -> list[Path]:
    """Draw quality against cost, one panel per kind of cost, with the Pareto front as a line.

    Args:
        path: file to write, without a suffix.
        panels: label of the cost: (name, cost, loss) of every model.
        ylabel: of the loss.

    Returns:
        The files written.
    """
    figure = Figure(figsize=(6 * len(panels), 4.6), layout="constrained")
    for axes, (xlabel, models) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        front = pareto_front([(cost, loss) for _, cost, loss in models])
        axes.plot(*zip(*front, strict=True), color="#999999", linewidth=1, zorder=0)
        for index, (name, cost, loss) in enumerate(models):
            axes.plot(cost, loss, **_mark(index), label=name)
        costs = [cost for _, cost, _ in models]
        low, high = min(costs), max(costs)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if high > _NARROW * low:
            axes.set_xscale("log")
        else:  # a comparison at equal cost
            axes.set_xlim(low * 0.95, high * 1.05)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return write_figure(figure, path)


def _mark(index: int) -> dict[str, Any]:
    """Colour and marker of a model: no two of 80 have both in common."""
    colours = mpl.colormaps["tab20"]
    return {"color": colours(index % colours.N), "marker": "os^D"[index // colours.N % 4]}


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the (cost, loss) that no other point beats in both, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def plot_depth_curves(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]], xlabel: str) -> list[Path]:
    """Draw loss against the cap on passes (test-time scaling), one line per model.

    Args:
        path: file to write, without a suffix.
        curves: per model (cap, loss).
        xlabel: of the cap.
    """
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, curve) in enumerate(curves.items()):
        axes.plot(*zip(*curve, strict=True), **_mark(index), markersize=4, label=name)
    axes.set(xlabel=xlabel, ylabel="causal loss (nats/token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return write_figure(figure, path)


def plot_curves(path: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> list[Path]:
    """Draw figures over the tokens of training, one panel per figure and one line per model.

    Args:
        path: file to write, without a suffix.
        panels: label of the figure: per model (tokens, value).
    """
    figure = Figure(figsize=(6 * len(panels), 4.2), layout="constrained")
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    for axes, (ylabel, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, curve in curves.items():
            if curve:
                colour = mpl.colormaps["tab10"](names.index(name) % 10)
                axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.2, label=name)
        axes.set(xlabel="tokens of training", ylabel=ylabel)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    return write_figure(figure, path)
