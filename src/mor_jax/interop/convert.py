"""Turn a model of one format into another: read, write beside the target, check, then rename."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mor_jax.config import Dtype
from mor_jax.errors import UserError, require
from mor_jax.interop import llama, official
from mor_jax.interop import weights_folder as weights
from mor_jax.interop.assemble import Progress
from mor_jax.interop.exported_tokens import token_ids, write_tokenizer
from mor_jax.interop.formats import Target
from mor_jax.interop.sources import LoadedModel, open_model
from mor_jax.interop.tensor_files import write_shards
from mor_jax.interop.tensors import tensors
from mor_jax.model.forward import forward
from mor_jax.model.parameters import ROUTER_STATE
from mor_jax.runs.folder import writing_to

_CHECK_TOKENS = (2, 64)


@dataclass(frozen=True)
class Check:
    """Logits of the converted model beside the original's on random tokens."""

    max_error: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute logit."""


def key_map(loaded: LoadedModel, target: Target) -> list[tuple[str, str]]:
    """List (name in the target, our leaf with its index) of every tensor that a conversion writes.

    Raises:
        UserError: the target cannot express the model.
    """
    model = loaded.model
    if target == "hf":
        llama.check_expressible(model)
        return llama.key_map(model)
    if target == "official":
        official.describe(model)
    listed = tensors(model) if target == "official" else weights.listing(model, loaded.params.get(ROUTER_STATE, ()))
    return [(tensor.name, _place(tensor.path, tensor.index)) for tensor in listed]


def _place(path: tuple[str, ...], index: tuple[Any, ...]) -> str:
    return "/".join(path) + "".join(f"[{i}]" if isinstance(i, int) else "[:]" for i in index)


def write(
    loaded: LoadedModel, target: Target, out: Path, *, dtype: Dtype = "float32", progress: Progress | None = None
) -> None:
    """Write a model as a new folder, complete or not at all.

    Args:
        loaded: from ``open_model``.
        target: `mor` (our weights), `hf` (plain Llama, recursions unrolled) or `official` (the PyTorch release).
        out: must not exist.
        dtype: of the tensors of `hf`; the others hold float32.
        progress: called with every tensor's name.

    Raises:
        UserError: the folder exists or cannot be written, or the target cannot express the model.
    """
    key_map(loaded, target)  # refuses before anything is written
    require(target == "hf" or dtype == "float32", f"dtype={dtype!r} is for target 'hf'; {target!r} holds float32")
    with _new_folder(out) as folder:
        if target == "hf":
            _write_hf(loaded, folder, dtype, progress)
        else:
            {"mor": _write_mor, "official": _write_official}[target](loaded, folder, progress)


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    require(not out.exists(), f"--out {out} exists already")
    partial = out.with_name(out.name + ".partial")
    with writing_to(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(out)


def _write_mor(loaded: LoadedModel, folder: Path, progress: Progress | None) -> None:
    weights.save(folder, loaded.model, loaded.params, loaded.tokenizer, origin=loaded.origin, progress=progress)


def _write_hf(loaded: LoadedModel, folder: Path, dtype: Dtype, progress: Progress | None) -> None:
    model = loaded.model
    tokens = None if loaded.tokenizer is None else token_ids(loaded.tokenizer.special)
    _write_json(folder / "config.json", llama.describe_config(model, tokens=tokens, dtype=dtype))
    tensors_ = llama.unrolled(model, loaded.params, progress)
    write_shards(folder, llama.written_shapes(model), tensors_, dtype=dtype)
    if loaded.tokenizer is not None:
        write_tokenizer(folder, loaded.tokenizer, model.context_length)
    (folder / "README.md").write_text(weights.model_card(model, loaded.origin), encoding="utf-8")


def _write_official(loaded: LoadedModel, folder: Path, progress: Progress | None) -> None:
    description, state = official.export(loaded.model, loaded.params)
    official.write_configuration(folder, description)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save(folder / "tokenizer.json")

    def named() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in state.items():
            yield name, value
            if progress is not None:
                progress(name)

    write_shards(folder, {name: value.shape for name, value in state.items()}, named())


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def check(loaded: LoadedModel, out: Path) -> Check:
    """Read a converted folder again and compare its logits, top-k selection, with the original's on random tokens."""
    again = open_model(out)
    batch, length = _CHECK_TOKENS
    length = min(length, loaded.model.context_length)
    tokens_BT = np.random.default_rng(0).integers(0, loaded.model.vocab_size, (batch, length)).astype(np.int32)
    ours, theirs = (_logits(model, tokens_BT) for model in (loaded, again))
    return Check(max_error=float(np.abs(ours - theirs).max()), scale=float(np.abs(ours).max()))


def _logits(loaded: LoadedModel, tokens_BT: np.ndarray) -> np.ndarray:
    run: Callable[[Any], jax.Array] = jax.jit(lambda params: forward(loaded.model, params, tokens_BT).logits)
    return np.asarray(run(jax.tree.map(np.asarray, loaded.params)), np.float32)


def refuse_mismatch(result: Check, tolerance: float) -> None:
    """Raise if a check found more than rounding.

    Raises:
        UserError: the largest error exceeds ``tolerance`` times the largest logit.
    """
    if not result.max_error <= tolerance * max(result.scale, 1.0):
        raise UserError(f"--check: logits differ by up to {result.max_error:.3g} (largest logit {result.scale:.3g})")
