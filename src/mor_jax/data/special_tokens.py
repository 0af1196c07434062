"""Special tokens as one record that travels with a model: what begins, ends, pads a text, and which files said so."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mor_jax.config import io as config_io
from mor_jax.errors import require

RECORD = "special_tokens.json"
"""Stands beside the tokenizer.json of a run, of converted weights and of a prepared corpus."""
MOST_STOP_IDS = 8
"""Tokens that may end a completion; the engine's arrays have room for so many."""
_TEMPLATE = "chat_template.jinja"
_TEMPLATES = "additional_chat_templates/"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens, and where they stand."""

    eos_id: int
    """Ends a document."""
    stop_ids: tuple[int, ...]
    """Each of them ends a completion."""
    bos_id: int | None = None
    """Begins a document; None where the tokenizer has none."""
    pad_id: int | None = None
    unk_id: int | None = None
    before: tuple[int, ...] = ()
    """Put before every text: BOS, where the tokenizer adds it."""
    after: tuple[int, ...] = ()
    """Put behind every text: EOS, where the tokenizer adds it."""
    files: Mapping[str, Any] = field(default_factory=dict)
    """Published files that say so, by name, for export: JSON objects (of config.json the keys about tokens), texts."""

    @property
    def start_id(self) -> int:
        """What stands before a text of no tokens: BOS, or else the token that ends the document before."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @property
    def chat_template(self) -> Any:
        """The template or, by name, the templates; None is none. Files of their own go before tokenizer_config.json."""
        found = {name.removeprefix(_TEMPLATES).removesuffix(".jinja"): text for name, text in self.files.items()
                 if name.startswith(_TEMPLATES)}  # fmt: skip
        if _TEMPLATE in self.files:
            found["default"] = self.files[_TEMPLATE]
        if found:
            return found["default"] if set(found) == {"default"} else found
        said = self.files.get("tokenizer_config.json", {}).get("chat_template")
        return {entry["name"]: entry["template"] for entry in said} if isinstance(said, list) else said

    def save(self, path: Path) -> None:
        """Write the record."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "SpecialTokens":
        """Read what ``save`` wrote.

        Raises:
            UserError: the file is no such record; names the field.
        """
        values = read_object(path)
        names = {each.name for each in dataclasses.fields(cls)}
        require(set(values) == names, f"{path}: holds {', '.join(sorted(values)) or 'nothing'}, not {sorted(names)}")
        require(_is_id(values["eos_id"]), f"{path}: eos_id={values['eos_id']!r} is not a token id")
        for name in ("bos_id", "pad_id", "unk_id"):
            value = values[name]
            require(value is None or _is_id(value), f"{path}: {name}={value!r} is neither a token id nor null")
        for name in ("stop_ids", "before", "after"):
            value = values[name]
            listed = isinstance(value, list) and all(map(_is_id, value))
            require(listed, f"{path}: {name}={value!r} is not a list of token ids")
            values[name] = tuple(value)
        require(isinstance(values["files"], dict), f"{path}: files={values['files']!r} is not an object")
        check_stop_ids(values["stop_ids"], f"{path}: stop_ids")
        return cls(**values)


def check_stop_ids(ids: tuple[int, ...], where: str) -> None:
    """Raise ``UserError`` if more tokens end a completion than the engine has room for."""
    require(len(ids) <= MOST_STOP_IDS, f"{where} names {len(ids)} tokens that end a text, more than {MOST_STOP_IDS}")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file cannot be read, or is none.
    """
    values = config_io.read_json(path, "JSON file")
    require(isinstance(values, dict), f"{path}: not a JSON object")
    return values


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0
