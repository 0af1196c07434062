"""One tokenizer type: bytes, a byte-level BPE trained on the spot, or any tokenizer.json.

Documents and prompts are encoded differently. In a document, text that spells a special token is plain text, so that
it cannot forge the end-of-text token. A prompt is encoded as `transformers` does it: special tokens are recognised, and
BOS is put where the tokenizer puts it.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mor_jax.data.byte_tokens import byte_level_bytes, byte_vocabulary, metaspace_bytes
from mor_jax.data.published_tokens import added_around, build_backend, find_special_tokens, read_published
from mor_jax.data.special_tokens import RECORD, SpecialTokens
from mor_jax.errors import UserError, require, require_text

END_OF_TEXT = "<|endoftext|>"
_BYTES = {"kind": "bytes"}
_BYTE_END = 256
_SMALLEST_BPE = 257
_LARGEST_BPE = 2**20
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """Text to token ids and back.

    Args:
        definition: the text of a tokenizer.json, or ``{"kind": "bytes"}``: ids 0 to 255 are bytes, 256 is end-of-text.
        where: name of the file, for messages.
        files: what stands beside it, of ``read_published``.
        special: its special tokens, if they are known; None finds them in definition and files.

    Attributes:
        kind: ``"bytes"`` or ``"json"``.
        vocab_size: one more than the largest id.
        special: its special tokens.
        eos_id: id of the one that ends a document.
        hash: SHA-256 of the definition in canonical JSON.

    Raises:
        UserError: the definition is not that of a tokenizer, or nothing says which token ends a text.
    """

    def __init__(
        self,
        definition: str,
        where: str = "tokenizer",
        *,
        files: Mapping[str, Any] | None = None,
        special: SpecialTokens | None = None,
    ) -> None:
        self._files = special.files if special is not None else files or {}
        try:
            values = json.loads(definition)
            self.kind = "bytes" if values == _BYTES else "json"
            self._model = None if self.kind == "bytes" else build_backend(definition, self._files)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{where}: not a tokenizer definition ({error})") from error
        self._definition = definition
        self.hash = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        if self._model is None:
            self.vocab_size = _BYTE_END + 1
            self.special = special or SpecialTokens(_BYTE_END, (_BYTE_END,))
            self.eos_id = self.special.eos_id
            return
        self.vocab_size = max(self._model.get_vocab().values(), default=-1) + 1
        self.special = special or find_special_tokens(self._model, values, self._files, where)
        self.eos_id = self.special.eos_id
        self._model.encode_special_tokens = True

    @property
    def identity(self) -> str:
        """What decides the tokens of documents: the hash, and where special tokens are more than that file's end."""
        special = self.special
        if not (special.before or special.after or special.files):
            return self.hash
        around = [special.before, special.after, special.eos_id, dict(special.files)]
        return hashlib.sha256(json.dumps([self.hash, around], sort_keys=True).encode()).hexdigest()

    def describe(self, special: SpecialTokens) -> None:
        """Take over what is known of the same tokenizer elsewhere, but for what stands around prepared documents."""
        own = self.special
        self.special = dataclasses.replace(special, eos_id=own.eos_id, before=own.before, after=own.after)

    def encode(self, text: str, *, around: bool = True) -> list[int]:
        """Return the ids that `transformers` gives for a text, such as a prompt: special tokens are recognised in it.

        Args:
            text: any.
            around: whether to put what the tokenizer adds around a text.

        Raises:
            UserError: the text holds a lone surrogate.
        """
        require_text(text, "text to encode")
        if self._model is None:
            ids = list(text.encode("utf-8"))
        else:
            ids = self._prompts.encode(text, add_special_tokens=False).ids
        return [*self.special.before, *ids, *self.special.after] if around else ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of several texts as they stand in documents, without any special token, as int32 arrays.

        Raises:
            UserError: a text holds a lone surrogate.
        """
        for text in texts:
            require_text(text, "text to encode")
        if self._model is None:
            return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) for text in texts]
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of whole documents: BOS where the tokenizer adds it, the text, end-of-text."""
        special = self.special
        end = special.after if special.eos_id in special.after else (*special.after, special.eos_id)
        parts = [np.asarray(ids, np.int32) for ids in (special.before, end)]
        return [np.concatenate([parts[0], tokens, parts[1]]) for tokens in self.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special tokens vanish, bytes that are not UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        if self._model is None:
            return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        return self._model.decode(ids, skip_special_tokens=True)

    def may_change(self, ids: Sequence[int]) -> bool:
        """Whether what follows can change the text of these tokens beyond an unfinished character at its end.

        With byte fallback a row of byte tokens becomes text only as a whole: one byte that does not fit turns all of
        them into U+FFFD.
        """
        last = next((i for i in reversed(ids) if i not in self._special_ids), None)
        return last in self._byte_pieces

    def token_text(self, token_id: int) -> str:
        """Return how a token, special or not, is spelled; empty where it has no spelling."""
        if self._model is None:
            return END_OF_TEXT if token_id == _BYTE_END else ""
        return self._model.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that one token stands for (none for a special token).

        Raises:
            UserError: the id is outside the vocabulary.
        """
        require(0 <= token_id < self.vocab_size, f"token id {token_id} is outside 0..{self.vocab_size - 1}")
        if self._model is None:
            return bytes([token_id]) if token_id < 256 else b""
        return self._bytes_of.get(token_id, b"")

    def save(self, path: Path) -> None:
        """Write the definition as a file that ``load`` (and, unless the kind is bytes, ``tokenizers``) reads.

        The special tokens are written beside it.
        """
        path.write_text(self._definition, encoding="utf-8")
        self.special.save(path.with_name(RECORD))

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json, or what ``save`` wrote, with what stands beside it.

        Raises:
            UserError: the file is missing or is not a tokenizer, or what stands beside it cannot be used.
        """
        try:
            definition = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a readable tokenizer file ({error})") from error
        record = path.with_name(RECORD)
        if record.is_file():
            return cls(definition, str(path), special=SpecialTokens.load(record))
        if not _is_older_folder(path.parent):
            return cls(definition, str(path), files=read_published(path.parent))
        loaded = cls(definition, str(path))
        loaded.special = dataclasses.replace(loaded.special, before=(), after=())  # its model never saw them
        return loaded

    @classmethod
    def bytes_level(cls) -> "Tokenizer":
        """Return the tokenizer whose tokens are bytes (vocabulary of 257)."""
        return cls(json.dumps(_BYTES))

    def exported(self) -> str:
        """Return a tokenizer.json for other readers: bytes as a vocabulary, with what this object adds."""
        if self._model is None:
            return byte_vocabulary(END_OF_TEXT)
        if added_around(self._model) == (self.special.before, self.special.after):
            return self._definition
        return json.dumps({**json.loads(self._definition), "post_processor": None}, ensure_ascii=False)

    @cached_property
    def _prompts(self) -> tokenizers.Tokenizer:
        """Recognises special tokens; ``encode_special_tokens`` is a property of the object, which threads share."""
        return build_backend(self._definition, self._files)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = {} if self._model is None else self._model.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @cached_property
    def _byte_pieces(self) -> frozenset[int]:
        if self._model is None or "ByteFallback" not in repr(self._model.decoder):
            return frozenset()
        return frozenset(i for token, i in self._model.get_vocab().items() if _BYTE_PIECE.fullmatch(token))

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        model = cast(Any, self._model)
        byte_level = '"ByteLevel"' in self._definition
        return {
            i: byte_level_bytes(token) if byte_level else metaspace_bytes(token)
            for token, i in model.get_vocab().items()
            if i not in self._special_ids
        }


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: training documents.
        vocab_size: size of the vocabulary: end-of-text (id 0), 256 bytes and the merges. Where the texts hold too few
            merges, reserved tokens fill it up.

    Raises:
        UserError: the vocabulary is too small to hold all bytes.
    """
    require(vocab_size >= _SMALLEST_BPE, f"tokenizer=bpe:{vocab_size} is below {_SMALLEST_BPE}: 256 bytes, end of text")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.add_special_tokens([f"<|reserved_{i}|>" for i in range(model.get_vocab_size(), vocab_size)])
    return Tokenizer(model.to_str())


def parse_spec(spec: str) -> tuple[str, int | Path | None]:
    """Split a tokenizer specification.

    Args:
        spec: ``bytes``, ``bpe:SIZE`` or the path of a tokenizer.json.

    Returns:
        ``("bytes", None)``, ``("bpe", size)`` or ``("file", path)``.

    Raises:
        UserError: it is none of the three.
    """
    if spec == "bytes":
        return "bytes", None
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        valid = size.isdecimal() and _SMALLEST_BPE <= int(size) <= _LARGEST_BPE
        rule = f"the size after 'bpe:' must be a number in {_SMALLEST_BPE}..{_LARGEST_BPE}"
        require(valid, f"tokenizer={spec!r}: {rule}")
        return "bpe", int(size)
    path = Path(spec)
    require(path.is_file(), f"tokenizer={spec!r} is neither 'bytes', 'bpe:SIZE' nor an existing tokenizer.json")
    return "file", path


def spec_identity(spec: str) -> str:
    """Return a specification with the path of a tokenizer.json replaced by the tokenizer's identity.

    Raises:
        UserError: as ``parse_spec`` and ``Tokenizer.load``.
    """
    _, value = parse_spec(spec)
    return Tokenizer.load(value).identity if isinstance(value, Path) else spec


def _is_older_folder(folder: Path) -> bool:
    """Whether this project wrote it before there were records: a corpus, a run, or converted weights."""
    if (folder / "manifest.json").is_file() or (folder / "checkpoints").is_dir():
        return True
    try:
        return "format" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False
