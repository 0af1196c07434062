"""Special tokens as `transformers` reads them: the files beside an exported model's tokenizer.json.

What the model came with is written back as it was; what is missing is filled in, so that whoever opens the folder knows
what begins and ends a text.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor_jax.data.published_tokens import ADDED, CONFIG, GENERATION, TOKENIZER_CONFIG, TOKENS_MAP
from mor_jax.data.special_tokens import SpecialTokens
from mor_jax.data.tokenizer import Tokenizer


def token_ids(special: SpecialTokens) -> dict[str, Any]:
    """Return the keys about tokens of config.json."""
    said = special.files.get(CONFIG)
    return {**_ids(special, said), **{name: value for name, value in (said or {}).items() if name.endswith("_id")}}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context_length: int) -> None:
    """Write tokenizer.json and what `transformers` looks for beside it.

    Args:
        folder: exists.
        tokenizer: of the model.
        context_length: of the model.
    """
    special, files = tokenizer.special, tokenizer.special.files
    (folder / "tokenizer.json").write_text(tokenizer.exported(), encoding="utf-8")
    names = {name: tokenizer.token_text(i) for name, i in _named(special).items()}
    said, listed = files.get(TOKENIZER_CONFIG, {}), files.get(TOKENS_MAP, {})
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, **said}
    if not (said or listed):
        config, listed = config | names, names
    elif said.get("eos_token") is None and listed.get("eos_token") is None:
        config["eos_token"] = names["eos_token"]
    _write_json(folder / TOKENIZER_CONFIG, config)
    if listed:
        _write_json(folder / TOKENS_MAP, listed)
    _write_json(folder / GENERATION, {**_ids(special, files.get(GENERATION)), **files.get(GENERATION, {})})
    for name, text in files.items():
        if name.endswith(".jinja"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    if ADDED in files:
        _write_json(folder / ADDED, files[ADDED])


def _ids(special: SpecialTokens, said: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a file must name; padding only where there was none."""
    stops = list(special.stop_ids)
    ids = {"bos_token_id": special.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops}
    return ids if special.pad_id is None or said is not None else {**ids, "pad_token_id": special.pad_id}


def _named(special: SpecialTokens) -> dict[str, int]:
    ids = {"bos_token": special.bos_id, "eos_token": special.eos_id, "pad_token": special.pad_id}
    return {name: i for name, i in {**ids, "unk_token": special.unk_id}.items() if i is not None}


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
