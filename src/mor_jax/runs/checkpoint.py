"""Asynchronous checkpoints of a train state and its data position, verified leaf by leaf when they are restored.

A thin wrapper over Orbax: one folder per step, complete or ignored. Beside the arrays lie the shape, dtype and
fingerprint of every leaf, so that a damaged or foreign checkpoint is named instead of silently used. The model's part
of a checkpoint can be restored alone: a third of the bytes, and nothing else of it is read or verified.
"""

import json
import logging
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mor_jax.errors import UserError
from mor_jax.mesh.processes import barrier, gather_texts, is_primary
from mor_jax.paths import is_remote
from mor_jax.runs.fingerprint import fingerprints
from mor_jax.runs.state import ModelState, TrainState

_log = logging.getLogger(__name__)
_LISTED = 8
_LATER_LEAVES = ("boundaries_R",)
"""Leaves that checkpoints of earlier versions lack: float32, filled with NaN, which says that there is nothing yet."""
T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    """What ``Checkpoints.restore`` found."""

    state: TrainState
    """On the shardings that were asked for."""
    data_step: int
    """Next step of the data pipeline."""
    data_hash: str
    """Of the corpus that the run was trained on."""


class DamagedCheckpointError(RuntimeError):
    """A checkpoint that cannot be read or whose bits changed."""


@dataclass(frozen=True)
class _Verified:
    """Arrays of a checkpoint whose fingerprints agree, and its data position."""

    tree: dict[str, Any]
    data_step: int
    data_hash: str


def _storable(state: TrainState) -> dict[str, Any]:
    """Return plain arrays only: the random key as its data."""
    return {**vars(state), "key": jax.random.key_data(state.key)}


def _from_storable(tree: dict[str, Any]) -> TrainState:
    return TrainState(**{**tree, "key": jax.random.wrap_key_data(tree["key"])})


def _abstract_storable(state: TrainState) -> dict[str, Any]:
    shapes = jax.eval_shape(_storable, state)
    keep = {**vars(state), "key": jax.ShapeDtypeStruct(shapes["key"].shape, shapes["key"].dtype)}
    keep["key"] = jax.ShapeDtypeStruct(keep["key"].shape, keep["key"].dtype, sharding=state.key.sharding)
    return keep


def _leaves(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def _describe(tree: Any) -> dict[str, dict[str, Any]]:
    prints = _leaves(jax.device_get(fingerprints(tree)))
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "fingerprint": int(prints[name])}
        for name, x in _leaves(tree).items()
    }


def _checksum(about: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(about, sort_keys=True).encode())


def _tree_differences(saved: dict[str, dict[str, Any]], wanted: dict[str, Any]) -> list[str]:
    """Say in words which leaves a checkpoint lacks, has in excess, or has in another shape or dtype."""
    lines = [f"{name} is missing" for name in wanted if name not in saved]
    lines += [f"{name} is not in the model" for name in saved if name not in wanted]
    for name in wanted.keys() & saved.keys():
        was = (list(saved[name]["shape"]), saved[name]["dtype"])
        now = (list(wanted[name].shape), str(wanted[name].dtype))
        if was != now:
            lines.append(f"{name} is {was[1]}{was[0]} but the model needs {now[1]}{now[0]}")
    return sorted(lines)


def _nothing_yet(leaf: Any) -> jax.Array:
    """NaN in the place of a leaf that was not saved."""
    nans = np.full(leaf.shape, np.nan, leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: nans[index])


def _agreed(read: Callable[[], T]) -> T:
    """Return what ``read`` gives if every process can read it; if one cannot, all raise ``DamagedCheckpointError``."""
    result, error = None, None
    try:
        result = read()
    except DamagedCheckpointError as caught:
        error = caught
    reasons = gather_texts(str(error) if error else "")
    where = next((i for i, reason in enumerate(reasons) if reason), None)
    if where is None:
        return cast(T, result)
    raise error or DamagedCheckpointError(f"process {where} says: {reasons[where]}")


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: created if missing; half-written checkpoints in it are removed.
        keep: newest checkpoints kept.
        pinned_steps: steps never deleted.
        read_only: only read: what is half-written may be the save of a run that is training just now, and what is
            damaged is passed over but stays where it is.
    """

    def __init__(self, folder: Path, *, keep: int, pinned_steps: tuple[int, ...] = (), read_only: bool = False) -> None:
        self.folder = folder if is_remote(folder) else folder.absolute()
        self._read_only = read_only
        policies = [
            ocp.checkpoint_managers.LatestN(keep),
            ocp.checkpoint_managers.CustomSteps(list(pinned_steps)),
        ]
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            ),
            item_handlers={"state": ocp.PyTreeCheckpointHandler(), "about": ocp.JsonCheckpointHandler()},
        )

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, *, data_step: int, data_hash: str) -> None:
        """Start to save; the arrays are copied before this returns, so the state may be donated afterwards.

        Args:
            state: after ``state.step`` steps.
            data_step: next step of the data pipeline.
            data_hash: content hash of the corpus.
        """
        tree = _storable(state)
        about = {"data_step": data_step, "data_hash": data_hash, "leaves": _describe(tree)}
        about["checksum"] = _checksum(about)
        _log.info("saving checkpoint %d", int(state.step))
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(tree), about=ocp.args.JsonSave(about))
        self._manager.save(int(state.step), args=items)

    def restore(self, abstract_state: TrainState) -> Restored | None:
        """Restore the newest good checkpoint onto the shardings of ``abstract_state``.

        A damaged one is named in a warning, the one before it is taken, and the damaged folder is set aside (unless
        ``read_only``). What one process cannot read is damaged for all, so that all continue from the same step.

        Args:
            abstract_state: of ``abstract_train_state``.

        Returns:
            None when the folder holds no checkpoint.

        Raises:
            UserError: the checkpoint belongs to another model or optimiser, none of the checkpoints is good, or the
                processes do not share the folder.
        """
        found = self._newest_good(_abstract_storable(abstract_state))
        return None if found is None else Restored(_from_storable(found.tree), found.data_step, found.data_hash)

    def restore_model(self, abstract_state: ModelState) -> ModelState | None:
        """Restore the model's part of the newest checkpoint in which that part is good, and read no other leaf.

        Args:
            abstract_state: of ``abstract_model_state``.

        Returns:
            None when the folder holds no checkpoint.

        Raises:
            UserError: as ``restore`` does.
        """
        found = self._newest_good(vars(abstract_state), partial=True)
        return None if found is None else ModelState(**found.tree)

    def _newest_good(self, wanted: dict[str, Any], *, partial: bool = False) -> _Verified | None:
        """Restore ``wanted``, all that there is or (``partial``) some of the top-level entries, as ``restore`` says."""
        self._check_shared()
        damaged: list[int] = []
        found = self.steps()
        for step in reversed(found):
            try:
                verified = self._restore_step(step, wanted, partial)
            except DamagedCheckpointError as error:
                _log.warning("checkpoint %d is damaged and skipped: %s", step, str(error))
                damaged.append(step)
                continue
            if not self._read_only:
                self._set_aside(damaged)
            return verified
        if self._read_only and self._moved_on(found):
            return self._newest_good(wanted, partial=partial)
        if damaged:
            raise UserError(f"{self.folder}: all checkpoints are damaged (steps {damaged}); nothing was changed")
        return None

    def _moved_on(self, found: list[int]) -> bool:
        """Whether a run that trains meanwhile has replaced the checkpoints that were found."""
        self._manager.reload()
        return self.steps() != found

    def _restore_step(self, step: int, wanted: dict[str, Any], partial: bool) -> _Verified:
        _log.info("restoring checkpoint %d", step)

        def describe() -> tuple[dict[str, Any], int, str, dict[str, Any], list[str]]:
            about = self._read(step, "about", ocp.args.JsonRestore())
            try:
                if about.pop("checksum") != _checksum(about):
                    raise DamagedCheckpointError("the bits of its description differ from what was saved")
                saved = about["leaves"]
                if partial:
                    saved = {name: leaf for name, leaf in saved.items() if name.split("/")[0] in wanted}
                there = {k: v for k, v in wanted.items() if k not in _LATER_LEAVES or k in saved}
                differences = _tree_differences(saved, _leaves(there))
                return saved, int(about["data_step"]), str(about["data_hash"]), there, differences
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise DamagedCheckpointError(f"its description cannot be used ({error!r})") from error

        saved, data_step, data_hash, there, lines = _agreed(describe)
        if lines:
            more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
            same_model = all(line.startswith("opt_state/") for line in lines)
            what = "optimiser (optimizer.kind)" if same_model else "model"
            raise UserError(f"{self.folder / str(step)} is of another {what}: {'; '.join(lines[:_LISTED])}{more}")
        arguments = ocp.args.PyTreeRestore(
            there, restore_args=ocp.checkpoint_utils.construct_restore_args(there), partial_restore=partial
        )
        tree = _agreed(lambda: self._read(step, "state", arguments))
        changed = [
            name for name, leaf in _describe(tree).items() if leaf["fingerprint"] != saved[name].get("fingerprint")
        ]
        if changed:
            raise DamagedCheckpointError(f"the bits of {', '.join(changed[:_LISTED])} differ from what was saved")
        absent = {name: _nothing_yet(leaf) for name, leaf in wanted.items() if name not in there}
        return _Verified({**tree, **absent}, data_step, data_hash)

    def _read(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # Orbax and TensorStore raise many kinds for unreadable bytes
            reason = str(error).strip().splitlines()
            raise DamagedCheckpointError(
                f"{item} cannot be read ({type(error).__name__}: {reason[0] if reason else ''})"
            ) from error

    def _check_shared(self) -> None:
        seen = gather_texts(str(self.steps()))
        if len(set(seen)) > 1:
            listed = "; ".join(f"process {i}: {steps}" for i, steps in enumerate(seen))
            raise UserError(f"{self.folder} is not a folder that all processes share: they see the steps {listed}")

    def _set_aside(self, steps: list[int]) -> None:
        for step in steps:
            target = self.folder.parent / "checkpoints-damaged" / str(step)
            if is_primary():
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    epath.Path(target).rmtree()
                (self.folder / str(step)).rename(target)
        if steps:
            barrier("damaged checkpoints set aside")
            self._manager.reload()

    def wait(self) -> None:
        """Block until the last save is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Complete the last save and release the threads."""
        self._manager.close()
