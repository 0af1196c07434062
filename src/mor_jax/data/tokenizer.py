"""One tokenizer type: bytes, a byte-level BPE trained on the spot, or any tokenizer.json.

``Tokenizer`` never adds special tokens of its own, and text that spells a special token is encoded as plain text, so
that a document cannot forge the end-of-text token.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mor_jax.errors import UserError, require, require_text

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
_BYTES = {"kind": "bytes"}
_SMALLEST_BPE = 257


class Tokenizer:
    """Text to token ids and back.

    Args:
        definition: the text of a tokenizer.json, or ``{"kind": "bytes"}``: ids 0 to 255 are bytes, 256 is end-of-text.
        where: name of the file, for messages.

    Attributes:
        kind: ``"bytes"`` or ``"json"``.
        vocab_size: one more than the largest id.
        eos_id: id of the end-of-text token.
        hash: SHA-256 of the definition in canonical JSON.

    Raises:
        UserError: the definition is not that of a tokenizer, or has no recognisable end-of-text token.
    """

    def __init__(self, definition: str, where: str = "tokenizer") -> None:
        try:
            values = json.loads(definition)
            self.kind = "bytes" if values == _BYTES else "json"
            self._model = None if self.kind == "bytes" else tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{where}: not a tokenizer definition ({error})") from error
        self._definition = definition
        self.hash = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        if self._model is None:
            self.vocab_size, self.eos_id = 257, 256
            return
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        self.vocab_size = max(self._model.get_vocab().values(), default=-1) + 1
        self.eos_id = _find_end(values, where)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without an end-of-text token."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of several texts as int32 arrays.

        Raises:
            UserError: a text holds a lone surrogate.
        """
        for text in texts:
            require_text(text, "text to encode")
        if self._model is None:
            return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32) for text in texts]
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special tokens vanish, bytes that are not UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        if self._model is None:
            return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        return self._model.decode(ids, skip_special_tokens=True)

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
        """Write the definition as a file that ``load`` (and, unless the kind is bytes, ``tokenizers``) reads."""
        path.write_text(self._definition, encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a tokenizer.json, or what ``save`` wrote.

        Raises:
            UserError: the file is missing or is not a tokenizer.
        """
        try:
            definition = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a readable tokenizer file ({error})") from error
        return cls(definition, str(path))

    @classmethod
    def bytes_level(cls) -> "Tokenizer":
        """Return the tokenizer whose tokens are bytes (vocabulary of 257)."""
        return cls(json.dumps(_BYTES))

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        model = cast(Any, self._model)
        special = {i for i, token in model.get_added_tokens_decoder().items() if token.special}
        byte_level = '"ByteLevel"' in self._definition
        return {
            i: _byte_level_bytes(token) if byte_level else _metaspace_bytes(token)
            for token, i in model.get_vocab().items()
            if i not in special
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
        valid = size.isdecimal() and int(size) >= _SMALLEST_BPE
        require(valid, f"tokenizer={spec!r}: the size after 'bpe:' must be a number of at least {_SMALLEST_BPE}")
        return "bpe", int(size)
    path = Path(spec)
    require(path.is_file(), f"tokenizer={spec!r} is neither 'bytes', 'bpe:SIZE' nor an existing tokenizer.json")
    return "file", path


def spec_identity(spec: str) -> str:
    """Return a specification with the path of a tokenizer.json replaced by the tokenizer's hash.

    Raises:
        UserError: as ``parse_spec`` and ``Tokenizer.load``.
    """
    _, value = parse_spec(spec)
    return Tokenizer.load(value).hash if isinstance(value, Path) else spec


def _find_end(values: dict[str, Any], where: str) -> int:
    special = {token["content"]: token["id"] for token in values.get("added_tokens", ()) if token.get("special")}
    for name in _END_NAMES:
        if name in special:
            return special[name]
    found = ", ".join(special) or "none"
    raise UserError(f"{where}: no end-of-text token ({' or '.join(_END_NAMES)}) among its special tokens ({found})")


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_BYTE_OF[character] for character in token) if all(c in _BYTE_OF for c in token) else token.encode()


def _metaspace_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of every character of the byte-level alphabet: printable bytes stand for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
