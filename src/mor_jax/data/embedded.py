"""English reference prose that every Python carries: the help topics and the docstrings of its standard library.

Source files are parsed, never imported. A module is one document; its name is the group that the train/validation
split hashes, so no module is on both sides.
"""

import ast
import hashlib
import importlib.util
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from mor_jax.data.readers import Document, reading
from mor_jax.errors import UserError, require

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TOPICS = Path("pydoc_data") / "topics.py"
_DOCS_PACKAGES = {"numpy": True, "jax": True, "scipy": False}  # name: needed


class EmbeddedSource:
    """The embedded default: ``pydoc_data.topics`` and the standard library's docstrings, about 2.2 MB.

    Args:
        packages: name and folder of further packages whose docstrings are added.

    Attributes:
        name: for messages.
        size: bytes of the source files (an upper bound of the text).
    """

    def __init__(self, packages: dict[str, Path] | None = None) -> None:
        stdlib = Path(sysconfig.get_path("stdlib"))
        require(
            (stdlib / _TOPICS).is_file(),
            f"data.source='embedded' needs {_TOPICS} in this Python's standard library; name another source",
        )
        roots = {"": stdlib, **(packages or {})}
        self._files = sorted(file for package, root in roots.items() for file in _modules(package, root))
        self.name = "docs" if packages else "embedded"
        self.size = sum(path.stat().st_size for _, path in self._files)

    @property
    def hash(self) -> str:
        """SHA-256 over the names and contents of the source files: it depends on the Python version."""
        digest = hashlib.sha256()
        for module, path in self._files:
            with reading(path, self._file(path)):
                digest.update(f"{module} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Yield one document per help topic and per module with docstrings, sorted by module."""
        for module, path in self._files:
            with reading(path, self._file(path)):
                if module == "pydoc_data.topics":
                    yield from _topics(path)
                elif text := module_docstrings(path):
                    yield Document(text, group=module)

    def _file(self, path: Path) -> str:
        return f"source {self.name!r}: {path}"


def docs_source() -> EmbeddedSource:
    """Return the embedded source with the docstrings of numpy, jax and (where installed) scipy added.

    Raises:
        UserError: a needed package is not installed.
    """
    packages = {}
    for name, needed in _DOCS_PACKAGES.items():
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            packages[name] = Path(spec.origin).parent
        else:
            require(not needed, f"data.source='docs' needs the package {name}, which is not installed")
    return EmbeddedSource(packages)


def module_docstrings(path: Path) -> str:
    """Return the docstrings of a source file in order, each once, separated by blank lines ('' if there are none)."""
    tree = _parse(path)
    if tree is None:
        return ""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = [tree, *sorted((n for n in ast.walk(tree) if isinstance(n, kinds) and n is not tree), key=_line)]
    texts = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(dict.fromkeys(text.strip() for text in texts if text and _is_utf8(text)))


def _modules(package: str, root: Path) -> Iterator[tuple[str, Path]]:
    for folder, children, files in os.walk(root):
        children[:] = [child for child in children if child not in _LEFT_OUT]
        for name in files:
            if name.endswith(".py"):
                path = Path(folder) / name
                parts = [*([package] if package else []), *path.relative_to(root).with_suffix("").parts]
                yield ".".join(parts).removesuffix(".__init__"), path


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _parse(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in third-party source are not the reader's concern
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # templates and fixtures with the suffix .py
            return None


def _topics(path: Path) -> Iterator[Document]:
    tree = _parse(path)
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", None) == "topics":
            for topic, text in sorted(ast.literal_eval(statement.value).items()):
                yield Document(text, group=f"pydoc_data.topics.{topic}")
            return
    raise UserError(f"{path} does not assign the dictionary 'topics'; name another data.source")
