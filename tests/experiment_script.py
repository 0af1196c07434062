"""Scripts of experiments/ as modules: they are no package, and other scripts import them by their bare names."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def load_script(name: str) -> Any:
    """Run a script, ``folder/name`` below experiments/ without its suffix, as the module ``name``."""
    path = EXPERIMENTS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
