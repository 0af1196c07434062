"""What a corpus is made from: files, the embedded prose, or a TFDS text set, behind one small protocol."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mor_jax.data.embedded import EmbeddedSource, docs_source
from mor_jax.data.files import file_hash
from mor_jax.data.readers import TEXT_FIELD, Document, is_corpus_file, read_documents, text_size
from mor_jax.errors import UserError, require

TFDS_PREFIX = "tfds:"


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
    """One text, jsonl or parquet file."""

    def __init__(self, path: Path) -> None:
        require(path.is_file(), f"input {path}: no such file")
        self.path = path
        self.name = path.name
        self.size = text_size(path)

    @property
    def hash(self) -> str:
        """SHA-256 of the file."""
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
            raise UserError(f"data.source={self.name!r} needs tensorflow-datasets: install mor-jax[tfds]") from error
        try:
            builder: Any = tfds.builder_from_directory(name) if Path(name).is_dir() else tfds.builder(name)
            self._rows: Any = builder.as_data_source(split="train")
        except Exception as error:  # TFDS raises a different kind for every way a set can be missing
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"data.source={self.name!r} is not a set prepared as array_record ({reason})") from error
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
        for row in self._rows:
            value = row[self._field]
            text = value.decode("utf-8") if isinstance(value, bytes) else str(value)
            if text.strip():
                yield Document(text)


def open_sources(inputs: Sequence[str]) -> list[Source]:
    """Return the sources that the inputs name.

    Args:
        inputs: ``embedded``, ``docs``, ``tfds:NAME``, files, or folders (searched for files of a known kind).

    Raises:
        UserError: nothing is given, or an input does not exist or holds nothing that can be read.
    """
    require(len(inputs) > 0, "prepare: no input given (a file, a folder, 'embedded', 'docs' or 'tfds:NAME')")
    sources: list[Source] = []
    for name in inputs:
        if name == "embedded":
            sources.append(EmbeddedSource())
        elif name == "docs":
            sources.append(docs_source())
        elif name.startswith(TFDS_PREFIX):
            sources.append(TfdsSource(name.removeprefix(TFDS_PREFIX)))
        else:
            sources += _file_sources(Path(name))
    return sources


def _file_sources(path: Path) -> list[FileSource]:
    if not path.is_dir():
        return [FileSource(path)]
    files = sorted(file for file in path.rglob("*") if file.is_file() and is_corpus_file(file))
    require(len(files) > 0, f"input {path} is a folder without text, jsonl or parquet files")
    return [FileSource(file) for file in files]


def sources_hash(sources: Sequence[Source]) -> str:
    """Return one hash of several sources, whatever their order."""
    return hashlib.sha256("\n".join(sorted(source.hash for source in sources)).encode()).hexdigest()
