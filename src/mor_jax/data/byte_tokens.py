"""Which bytes a token stands for: the byte-level alphabet, and sentencepiece's pieces."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a token of a byte-level vocabulary."""
    return bytes(_BYTE_OF[character] for character in token) if all(c in _BYTE_OF for c in token) else token.encode()


def metaspace_bytes(token: str) -> bytes:
    """Return the bytes of a sentencepiece token."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode("utf-8")


def byte_vocabulary(end: str) -> str:
    """Return a tokenizer.json whose tokens are the bytes, by their values, and one that ends a text."""
    model = tokenizers.Tokenizer(models.BPE(vocab=_BYTE_OF | {end: len(_BYTE_OF)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([end])
    return model.to_str()


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of every character of the byte-level alphabet: printable bytes stand for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
