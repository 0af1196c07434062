"""Damage every file of a checkpoint, one at a time, and see whether restoring notices."""

import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mor_jax.config import Config
from mor_jax.errors import UserError
from mor_jax.mesh.mesh import make_mesh
from mor_jax.runs.checkpoint import Checkpoints
from mor_jax.runs.fingerprint import fingerprints
from mor_jax.runs.state import abstract_train_state

Damage = Callable[[Path, random.Random], None]


def flip_bit(path: Path, generator: random.Random) -> None:
    """Flip one bit anywhere."""
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, generator: random.Random) -> None:
    """Cut the file off anywhere."""
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def empty(path: Path, generator: random.Random) -> None:
    """Leave nothing of the file."""
    path.write_bytes(b"")


def delete(path: Path, generator: random.Random) -> None:
    """Remove the file."""
    path.unlink()


DAMAGES: tuple[Damage, ...] = (flip_bit, flip_bit, flip_bit, truncate, empty, delete)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def damage_rounds(straight: Path, config: Config, seed: int) -> list[dict[str, Any]]:
    """Damage the newest of the two last checkpoints in every way, and restore.

    Args:
        straight: folder of a finished run.
        config: of the run.
        seed: of the places of the damage.

    Returns:
        Per damage: file, kind, outcome (``detected``: named, and the step before was used; ``equal``: the restored
        state and data position are what was saved; ``silent``: neither), and what the warning said.
    """
    generator = random.Random(seed)
    checkpoints = straight / "run" / "checkpoints"
    steps = sorted(int(path.name) for path in checkpoints.iterdir())[-2:]
    original = straight / "two"
    for step in steps:
        shutil.copytree(checkpoints / str(step), original / str(step))
    abstract = abstract_train_state(config, make_mesh(config.mesh))
    wanted = _restore(original, straight, abstract)
    results = []
    for file in sorted(path for path in (original / str(steps[1])).rglob("*") if path.is_file()):
        for damage in DAMAGES:
            if file.stat().st_size == 0 and damage is not delete:
                continue
            copy = straight / "copy"
            shutil.copytree(original, copy)
            damage(copy / file.relative_to(original), generator)
            found = _restore(copy, straight, abstract)
            shutil.rmtree(copy)
            if found["step"] == steps[0] and f"checkpoint {steps[1]} is damaged" in found["said"]:
                outcome = "detected"
            else:
                outcome = "equal" if _same(found, wanted) else "silent"
            entry = {"file": str(file.relative_to(original)), "damage": damage.__name__, "outcome": outcome}
            results.append(entry | {"said": found["said"][:300]})
    return results


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return {**found, "said": ""} == {**wanted, "said": ""}


def _restore(folder: Path, base: Path, abstract: Any) -> dict[str, Any]:
    import jax

    warnings = _Warnings()
    logger = logging.getLogger("mor_jax")
    logger.addHandler(warnings)
    try:
        manager = Checkpoints(folder, keep=2)
        try:
            restored = manager.restore(abstract)
        finally:
            manager.close()
    except UserError as error:
        return {"step": None, "prints": None, "data": None, "said": f"UserError: {error}".replace(str(base), "")}
    finally:
        logger.removeHandler(warnings)
        shutil.rmtree(base / "checkpoints-damaged", ignore_errors=True)
    assert restored is not None
    tree = {**vars(restored.state), "key": jax.random.key_data(restored.state.key)}
    return {
        "step": int(restored.state.step),
        "prints": jax.tree.leaves(jax.device_get(fingerprints(tree))),
        "data": (restored.data_step, restored.data_hash),
        "said": "; ".join(warnings.texts).replace(str(base), ""),
    }
