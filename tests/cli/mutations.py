"""Seeded damage to small valid inputs: bytes that flip, files that end early, and JSON values of the wrong kind."""

import codecs
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

_MARK = "@@{}@@"
_RAW = (  # JSON texts that `json.dumps` does not write, or not quickly
    "NaN",
    "-Infinity",
    "1e999",
    "-1e-999",
    "9" * 30,
    "9" * 6000,
    "-" + "9" * 400,
    "9" * 400,
    "2147483647",
    "18446744073709551616",
    '"\\ud800"',
    '"\\u0000"',
    "[" * 60 + "]" * 60,
    "[" * 100_000 + "]" * 100_000,
    '{"a":' * 100_000 + "1" + "}" * 100_000,
    "'single'",
    "undefined",
    "1_000",
    "",
)
_VALUES = (None, True, False, 0, 1, -1, 3, 0.5, -0.0, 2**31, 2**53, "", "x", "1", "text\nof lines", "ö" * 300)
_CONTAINERS: tuple[Callable[[], Any], ...] = (list, dict, lambda: [None], lambda: [1, "a"], lambda: {"": {}})


def damaged_bytes(random: Random, data: bytes) -> bytes:
    """Damage bytes of any kind in one to three places."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = random.choice(_BYTES)(random, data)
    return data


def damaged_json(random: Random, value: Any) -> str:
    """Return the JSON of a value with one to three of its values, keys or sizes changed."""
    value, raw = json.loads(json.dumps(value)), []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _change(random, value, raw)
    text = json.dumps(value, indent=random.choice((None, None, 1)))
    for number, replacement in enumerate(raw):
        text = text.replace(json.dumps(_MARK.format(number)), replacement)
    if random.random() < 0.1 and text.startswith("{") and text != "{}":
        text = text[:-1].rstrip() + ", " + text[1:]  # every key twice
    return text


def damaged_safetensors(random: Random, data: bytes) -> bytes:
    """Damage a safetensors file: its bytes, or its header while the lengths still fit."""
    if random.random() < 0.4:
        return damaged_bytes(random, data)
    (length,) = struct.unpack("<Q", data[:8])
    header = damaged_json(random, json.loads(data[8 : 8 + length])).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _change(random: Random, value: Any, raw: list[str]) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        kind = random.random()
        if kind < 0.1:
            return {name: entry for name, entry in value.items() if name != key}
        if kind < 0.15:
            return {**value, random.choice((key + "s", "", "\0", "x" * 300)): value[key]}
        return {**value, key: _change(random, value[key], raw)}
    if isinstance(value, list) and value and random.random() < 0.8:
        place = random.randrange(len(value))
        kind = random.random()
        if kind < 0.1:
            return value[:place] + value[place + 1 :]
        if kind < 0.2:
            return value[:place] + [value[place]] * 3 + value[place + 1 :]
        return [*value[:place], _change(random, value[place], raw), *value[place + 1 :]]
    kind = random.random()
    if kind < 0.4:
        raw.append(random.choice(_RAW))
        return _MARK.format(len(raw) - 1)
    if kind < 0.5 and isinstance(value, int | float):
        return random.choice((-value, value + 1, value * 1000, str(value)))
    return random.choice(_CONTAINERS)() if kind < 0.6 else random.choice(_VALUES)


def _flip(random: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 4, 40))):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _insert(random: Random, data: bytes) -> bytes:
    pieces = (b"\0", b"\xff", b"\xed\xa0\x80", b"\xc3", codecs.BOM_UTF8, b"\n", b"\r", b'"', b"{", b"\\", b"\x1a")
    place = random.randint(0, len(data))
    return data[:place] + random.choice((*pieces, random.randbytes(9), bytes(5000))) + data[place:]


def _slice(random: Random, data: bytes) -> tuple[int, int]:
    start = random.randint(0, len(data))
    return start, random.randint(start, min(len(data), start + 64))


def _delete(random: Random, data: bytes) -> bytes:
    start, end = _slice(random, data)
    return data[:start] + data[end:]


def _repeat(random: Random, data: bytes) -> bytes:
    start, end = _slice(random, data)
    return data[:end] + data[start:]


def _overwrite(random: Random, data: bytes) -> bytes:
    start, end = _slice(random, data)
    return data[:start] + random.choice((b"\0", b"\xff", b"9", b" ")) * (end - start) + data[end:]


_BYTES: tuple[Callable[[Random, bytes], bytes], ...] = (
    _flip,
    _flip,
    _insert,
    _delete,
    _repeat,
    _overwrite,
    lambda random, data: data[: random.randint(0, len(data))],
    lambda random, data: codecs.BOM_UTF8 + data,
    lambda random, data: data.decode("latin-1").encode(random.choice(("utf-16", "utf-16-le", "utf-32"))),
    lambda random, data: data + random.choice((data, b"\0" * 9, b"garbage", b"\n\n")),
)
