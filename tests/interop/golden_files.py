"""The reference cases: compact fixtures in the repository, and the full folder if MOR_GOLDENS names it."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parent.parent / "fixtures" / "goldens"
UNTIED = "mor_expert_mc3_untied_attn_884fa5a"


def names(folder: Path = FIXTURES) -> list[str]:
    """Names of the model cases that can be loaded."""
    found = sorted(path.stem for path in folder.glob("*.npz"))
    return [name for name in found if not name.startswith("init_") and name != UNTIED]


def full_folder() -> Path | None:
    """Folder of the full files, or None."""
    return Path(os.environ["MOR_GOLDENS"]) if "MOR_GOLDENS" in os.environ else None


def read(name: str, folder: Path = FIXTURES) -> dict[str, np.ndarray]:
    """All arrays of one case."""
    with np.load(folder / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def model(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Description and state of one case."""
    case = read(name)
    state = {key.removeprefix("param/"): case[key] for key in case if key.startswith("param/")}
    return json.loads(str(case["meta_json"])), state
