"""Compare mor_jax with arrays that another implementation computed (letters: B D R T V).

A reference case is a mapping of arrays: ``meta_json`` (the official description and ``training_step``), ``param/NAME``,
``input_ids``, ``labels``, ``attention_mask``, ``num_items_in_batch``, and the results ``train/...``, ``eval/...`` and
``grad/NAME`` (or, for a compact case, ``f64/grad_sumsq`` and ``f64/grad_proj``: per tensor the sum of squares and the
sum of g[i] * cos(i + 1), in the order of ``grad_names``). ``eval/logits`` may be left out where they equal
``train/logits``; hidden states that a case does not hold are not compared.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mor_jax.config import Execution, ModelConfig
from mor_jax.data.packing import Row, expand_row
from mor_jax.interop import official
from mor_jax.model.forward import ModelOutput, forward
from mor_jax.model.loss import IGNORED
from mor_jax.model.routing.capacity import warmup_steps

Arrays = Mapping[str, np.ndarray]

TOLERANCES = {
    "logits": 2e-5,
    "hidden": 3e-5,
    "scores": 3e-5,
    "gates": 3e-5,
    "lm": 1e-5,
    "sampling": 1e-5,
    "balancing": 1e-5,
    "router_z": 1e-5,
    "total": 1e-5,
    "gradients": 2e-5,
}
"""Largest error by quantity: absolute for activations, relative for losses, and for gradients relative to the largest
entry of the tensor. The release itself, in float32 against float64, is off by 6e-6, 2e-7 and 5e-6; the rest is room for
another order of summation. A compact case bounds its two sums by what such gradient errors can change in them."""


@dataclass(frozen=True)
class Report:
    """How far one case is from its reference."""

    errors: dict[str, float]
    """Largest error by quantity, as in TOLERANCES; absent where the case has no such quantity."""
    routing_equal: bool | None
    """Whether every token went where the reference sent it, in training and evaluation; None without a router."""

    @property
    def failures(self) -> list[str]:
        """Quantities beyond their tolerance, in words."""
        found = [
            f"{name}: {error:.2e} > {TOLERANCES[name]:.0e}"
            for name, error in self.errors.items()
            if not error <= TOLERANCES[name]
        ]
        return found + (["routing differs"] if self.routing_equal is False else [])


def packed(tokens_BT: np.ndarray, documents: Sequence[int]) -> dict[str, np.ndarray]:
    """Describe rows as packed ones.

    Args:
        tokens_BT: the rows.
        documents: lengths of the documents in every row; they add up to T.

    Returns:
        ``segment_ids`` and ``positions`` as ``forward`` takes them, int32 [B, T].
    """
    starts = np.cumsum([0, *documents[:-1]])
    row = expand_row(Row(tokens_BT[0], starts), tokens_BT.shape[1])
    return {name: np.broadcast_to(row[name], tokens_BT.shape) for name in ("segment_ids", "positions")}


def compare(case: Arrays, execution: Execution = "gather", documents: Sequence[int] = ()) -> Report:
    """Compute a reference case with mor_jax and measure the differences.

    Args:
        case: arrays as the module's docstring says.
        execution: how to run the model.
        documents: gives every row as packed documents of these lengths, which changes nothing in a released model.

    Returns:
        The report.

    Raises:
        UserError: the case's model cannot be loaded.
    """
    meta = json.loads(str(case["meta_json"]))
    state = {name.removeprefix("param/"): case[name] for name in case if name.startswith("param/")}
    config, params = official.load(meta, state)
    given: dict[str, Any] = {name: case[name] for name in ("labels", "attention_mask")}
    given |= packed(case["input_ids"], documents) if documents else {}
    gradients, output, evaluated = _run(config, params, case, given, meta["training_step"], execution)
    errors: dict[str, float] = {}
    for name, error in (
        *_loss_errors(case, output, evaluated),
        ("logits", _largest(output.logits, case["train/logits"])),
        ("logits", _largest(evaluated.logits, case.get("eval/logits", case["train/logits"]))),
        *_hidden_errors(config, case, output),
        *_router_errors(case, output),
        *_gradient_errors(case, meta["grad_names"], official.export(config, gradients)[1]),
    ):
        errors[name] = max(error, errors.get(name, 0.0))
    routing = _routing_equal(config, case, output, evaluated) if output.trace is not None else None
    return Report(errors=errors, routing_equal=routing)


def _run(
    config: ModelConfig, params: Any, case: Arrays, given: dict[str, Any], step: int | None, execution: Execution
) -> tuple[Any, ModelOutput, ModelOutput]:
    """Gradients and output of training, and output of evaluation (the same function if nothing warms up)."""

    def loss(params: Any, normalizer: float) -> tuple[jax.Array, ModelOutput]:
        options: dict[str, Any] = {"train": True, "step": step, "return_hidden": True, "execution": execution}
        output = forward(config, params, case["input_ids"], **given, loss_normalizer=normalizer, **options)
        # an auxiliary router has a backward pass of its own, which reaches nothing else
        own = output.losses["sampling"] if config.routing.sampling == "aux_router" and output.trace else 0.0
        return output.losses["total"] + own, output

    train = jax.jit(jax.grad(loss, has_aux=True))
    gradients, output = train(params, float(case["num_items_in_batch"]))
    if warmup_steps(config):
        evaluate = jax.jit(lambda p: forward(config, p, case["input_ids"], **given, execution=execution))
        return gradients, output, evaluate(params)
    targets = np.count_nonzero(case["labels"][:, 1:] != IGNORED)
    return gradients, output, train(params, float(targets))[1]


def _largest(ours: Any, theirs: Any) -> float:
    difference = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
    return float(np.max(difference, initial=0.0))


def _relative(ours: Any, theirs: Any) -> float:
    return _largest(ours, theirs) / max(abs(float(theirs)), 1e-30)


def _loss_errors(case: Arrays, output: ModelOutput, evaluated: ModelOutput) -> Iterator[tuple[str, float]]:
    yield "lm", _relative(evaluated.losses["lm"], case["eval/lm_loss"])
    for name, value in output.losses.items():
        yield name, _relative(value, case[f"train/{name}_loss"])


def _hidden_errors(config: ModelConfig, case: Arrays, output: ModelOutput) -> Iterator[tuple[str, float]]:
    stages = output.hidden
    assert stages is not None
    named: dict[str, Any] = {"train/hidden/norm": stages.norm}
    if stages.first is not None:
        named |= {"train/hidden/first": stages.first, "train/hidden/last": stages.last}
    for r, state in enumerate(stages.recursions):
        named |= {f"train/rec{r}/hidden": state, f"train/rec{r}/block_out": state}
    for name, state in named.items():
        if name in case:
            yield "hidden", _largest(state, case[name])
    if "train/hidden_layers" not in case:
        return
    layers = case["train/hidden_layers"]
    offset = 1 if config.recursion.has_middle else 0
    if stages.first is not None:
        yield "hidden", max(_largest(stages.first, layers[0]), _largest(stages.last, layers[-1]))
    for r, state in enumerate(stages.recursions):
        yield "hidden", _largest(state, layers[offset + (r + 1) * config.block_depth - 1])


def _router_errors(case: Arrays, output: ModelOutput) -> Iterator[tuple[str, float]]:
    trace = output.trace
    if trace is None:
        return
    if trace.selected is None:
        yield "scores", _largest(trace.scores, case["train/router_logits"])
        yield "gates", _largest(trace.gates, case["train/gate"])
        return
    for r, (scores, gates) in enumerate(zip(trace.scores, trace.gates, strict=True)):
        yield "scores", _largest(scores, case[f"train/rec{r}/router_logits"])
        yield "gates", _largest(gates, case[f"train/rec{r}/gate"])


def _routing_equal(config: ModelConfig, case: Arrays, output: ModelOutput, evaluated: ModelOutput) -> bool:
    pairs: list[tuple[Any, np.ndarray]] = []
    for split, result in (("train", output), ("eval", evaluated)):
        trace = result.trace
        assert trace is not None
        if config.routing.kind == "token":
            pairs.append((np.asarray(trace.depth_BT) - 1, case[f"{split}/depth"]))
            continue
        assert trace.selected is not None
        pairs += [(rows_BC, case[f"{split}/rec{r}/selected_tokens"]) for r, rows_BC in enumerate(trace.selected)]
    return all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def _gradient_errors(
    case: Arrays, names: list[str], gradients: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, float]]:
    for place, name in enumerate(names):
        ours = gradients[name].astype(np.float64)
        if f"grad/{name}" in case:
            theirs = case[f"grad/{name}"]
            yield "gradients", _largest(ours, theirs) / max(float(np.max(np.abs(theirs))), 1e-30)
            continue
        # an error e in every entry changes the sums by at most e * sum|cos| and 2 e * sum|g|
        flat, waves = ours.ravel(), np.cos(np.arange(ours.size) + 1.0)
        largest = max(float(np.max(np.abs(flat))), 1e-30)
        projected = abs(flat @ waves - case["f64/grad_proj"][place]) / (largest * np.abs(waves).sum())
        squared = abs(flat @ flat - case["f64/grad_sumsq"][place]) / (2 * largest * max(np.abs(flat).sum(), 1e-30))
        yield "gradients", float(max(projected, squared))
