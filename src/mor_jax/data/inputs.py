"""What a corpus is made from: files, the embedded prose, or a TFDS text set, behind one small protocol.

``builtin:embedded`` and ``builtin:docs`` always mean the built-in sources. Without the prefix they do as well, but
where someone typed the name and a folder is called so, it is refused (``refuse_ambiguous``).
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mor_jax.data.embedded import EmbeddedSource, docs_source
from mor_jax.data.files import file_hash
from mor_jax.data.folder_files import folder_files
from mor_jax.data.readers import TEXT_FIELD, Document, check_file, read_documents, reading, text_size
from mor_jax.errors import UserError, reason, require, suggest
from mor_jax.paths import is_remote, to_path

TFDS_PREFIX = "tfds:"
BUILTIN_PREFIX = "builtin:"
_BUILTIN: Mapping[str, Callable[[], EmbeddedSource]] = {"embedded": EmbeddedSource, "docs": docs_source}


class Source(Protocol):
    """Documents with a name, an estimate of their size, and a hash of their content."""

    @property
    def name(self) -> str:
        """Name for messages and the manifest."""
        ...

    @property
    def size(self) -> int:
        """Estimated bytes of text."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of the content."""
        ...

    def documents(self) -> Iterator[Document]:
        """Yield every document, in the same order every time."""
        ...


class FileSource:
    """One file of text, JSON or parquet."""

    def __init__(self, path: Path) -> None:
        check_file(path)
        self.path = path
        self.name = path.name
        with reading(path):
            self.size = text_size(path)

    @property
    def hash(self) -> str:
        """SHA-256 of the file."""
        with reading(self.path):
            return file_hash(self.path)

    def documents(self) -> Iterator[Document]:
        """Yield the file's documents (see ``readers.read_documents``)."""
        return read_documents(self.path)


class TfdsSource:
    """The ``train`` split of a TFDS text set stored as array_record, read without TensorFlow.

    Args:
        name: a TFDS name (``set``, ``set/config:version``; looked up where TFDS keeps its data), or the folder of one
            prepared version.

    Raises:
        UserError: tensorflow-datasets is missing, or the set is unknown, not array_record, or has no text.
    """

    def __init__(self, name: str) -> None:
        self.name = f"{TFDS_PREFIX}{name}"
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(f"data.source={self.name!r} needs tensorflow-datasets: pip install -e '.[tfds]'") from error
        try:
            builder: Any = tfds.builder_from_directory(name) if Path(name).is_dir() else tfds.builder(name)
            self._rows: Any = builder.as_data_source(split="train")
        except Exception as error:  # TFDS raises a different kind for every way a set can be missing
            rule = f"is not a set prepared as array_record ({reason(error)})"
            raise UserError(f"data.source={self.name!r} {rule}") from error
        self._field = self._text_field(builder.info.features)
        self.size = builder.info.splits["train"].num_bytes
        self._identity = f"{builder.info.full_name} {builder.info.splits['train'].to_proto()}"

    def _text_field(self, features: Any) -> str:
        texts = [name for name, feature in features.items() if feature.np_dtype in (str, bytes, object)]
        if TEXT_FIELD in texts:
            return TEXT_FIELD
        listed = ", ".join(features)
        rule = f"needs a feature {TEXT_FIELD!r}, or exactly one of strings"
        require(len(texts) == 1, f"data.source={self.name!r} {rule} (it has {listed})")
        return texts[0]

    @property
    def hash(self) -> str:
        """SHA-256 of the set's full name (version included) and the statistics of its split."""
        return hashlib.sha256(self._identity.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        """Yield the text of every example."""
        number = 0
        try:
            for row in self._rows:
                number += 1
                value = row[self._field]
                text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
                if text.strip():
                    yield Document(text)
        except Exception as error:  # of TFDS, array_record and protobuf
            raise UserError(f"data.source={self.name!r}, example {number}: {reason(error)}") from error


def is_made_here(name: str) -> bool:
    """Return whether a source is prepared on first use: a built-in one or a TFDS set."""
    return name.startswith((TFDS_PREFIX, BUILTIN_PREFIX)) or name in _BUILTIN


def refuse_ambiguous(name: str, field: str) -> None:
    """Refuse a typed name of a built-in source where a folder has it, too.

    Raises:
        UserError: with the two spellings that are clear.
    """
    ambiguous = name in _BUILTIN and Path(name).is_dir()
    clear = f"write './{name}' for the folder or '{BUILTIN_PREFIX}{name}' for the built-in one"
    require(not ambiguous, f"{field} {name!r} is a built-in source, but a folder {name}/ is here, too: {clear}")


def source_names(source: str) -> list[str]:
    """Split ``data.source`` at its commas; one stays in a path where the parts are no sources, but the whole is.

    Raises:
        UserError: an entry is empty.
    """
    parts = source.split(",")
    names = _joined(parts) or [part.strip() for part in parts]
    require(all(names), f"data.source={source!r} has an empty entry")
    return names


def _joined(parts: Sequence[str]) -> list[str] | None:
    """Join parts until every name is a source, as few as possible; None if there is no way to."""
    for count in range(1, len(parts) + 1):
        name = ",".join(parts[:count]).strip()
        if _is_source(name):
            others = _joined(parts[count:]) if count < len(parts) else []
            if others is not None:
                return [name, *others]
    return None


def _is_source(name: str) -> bool:
    if is_made_here(name):
        return "," not in name or Path(name.removeprefix(TFDS_PREFIX)).is_dir()
    return bool(name) and (is_remote(to_path(name)) or Path(name).is_dir())


def open_sources(inputs: Sequence[str]) -> list[Source]:
    """Return the sources that the inputs name.

    Args:
        inputs: ``embedded``, ``docs`` (or, always the built-in ones, ``builtin:embedded``, ``builtin:docs``),
            ``tfds:NAME``, files, or folders (see ``folder_files``).

    Raises:
        UserError: nothing is given, or an input does not exist, holds nothing that can be read, or may be two things.
    """
    require(len(inputs) > 0, "no input given (a file, a folder, 'embedded', 'docs' or 'tfds:NAME')")
    sources: list[Source] = []
    for name in inputs:
        refuse_ambiguous(name, "input")
        bare = name.removeprefix(BUILTIN_PREFIX)
        known = bare in _BUILTIN or bare == name
        require(known, f"input {name!r} is not one of {', '.join(map(repr, _BUILTIN))}{suggest(bare, _BUILTIN)}")
        if bare in _BUILTIN:
            sources.append(_BUILTIN[bare]())
        elif name.startswith(TFDS_PREFIX):
            sources.append(TfdsSource(name.removeprefix(TFDS_PREFIX)))
        elif Path(name).is_dir():
            sources += [FileSource(file) for file in folder_files(Path(name))]
        else:
            sources.append(FileSource(Path(name)))
    return sources


def sources_hash(sources: Sequence[Source]) -> str:
    """Return one hash of several sources, whatever their order."""
    return hashlib.sha256("\n".join(sorted(source.hash for source in sources)).encode()).hexdigest()
