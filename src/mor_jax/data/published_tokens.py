"""What a published tokenizer's files say of its special tokens, read as `transformers` reads them.

The post-processor of tokenizer.json alone decides what is put around a text (`add_bos_token` is for tokenizers without
that file). A token's name comes from tokenizer_config.json, or from special_tokens_map.json where the former lists no
`added_tokens_decoder`, or from the tokenizer's class. What ends a completion stands in generation_config.json, or else
in config.json, or else is the tokenizer's `eos_token`.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers

from mor_jax.data.special_tokens import SpecialTokens, check_stop_ids, read_object
from mor_jax.errors import UserError, require

_log = logging.getLogger(__name__)
CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
TOKENS_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONFIG_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class")
_CLASS_TOKENS: dict[str, dict[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
"""Names that a class of `transformers` takes where the files give none."""
_OTHER_ROLE = re.compile(r"pad|unk|mask|bos|cls|begin|start|reserved|unused", re.IGNORECASE)
_ENDS_TEXT = re.compile(r"[\W_]*(/s|eos|end[\W_]?of[\W_]?(text|sequence|sentence|document))[\W_]*", re.IGNORECASE)


def read_published(folder: Path) -> dict[str, Any]:
    """Read the files of a folder that speak of special tokens.

    Returns:
        Contents by file name: JSON objects (of config.json only what concerns tokens) and chat templates.

    Raises:
        UserError: a file that is there but is no JSON object or no text.
    """
    found: dict[str, Any] = {}
    for name in (TOKENIZER_CONFIG, TOKENS_MAP, ADDED, GENERATION, CONFIG):
        if (folder / name).is_file():
            found[name] = read_object(folder / name)
    if CONFIG in found:
        found[CONFIG] = {key: found[CONFIG][key] for key in _CONFIG_KEYS if key in found[CONFIG]}
    for path in (folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))):
        if path.is_file():
            try:
                found[path.relative_to(folder).as_posix()] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path}: not a readable text ({error})") from error
    return found


def build_backend(definition: str, files: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Make the library's tokenizer from a tokenizer.json and what tokenizer_config.json changes of it."""
    model = tokenizers.Tokenizer.from_str(definition)
    model.no_truncation()
    model.no_padding()
    config = files.get(TOKENIZER_CONFIG, {})
    if _class_of(files) == "LlamaTokenizer" and _is_sentencepiece_bpe(model):
        _prepend_as_llama(model, config)
    listed = config.get("added_tokens_decoder")
    added = listed if isinstance(listed, dict) else {i: {"content": name} for name, i in files.get(ADDED, {}).items()}
    for _, token in sorted((int(i), token) for i, token in added.items() if str(i).isdecimal()):
        if isinstance(token, dict) and isinstance(token.get("content"), str):
            model.add_tokens([_added_token(token)])
    named = [_content(files, name) for name in NAMES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name)
        named += [_text_of(token) for token in more] if isinstance(more, list) else []
    # those that the vocabulary lacks would get ids that no model has been trained with
    known = [token for token in named if token and model.token_to_id(token) is not None]
    special = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
    model.add_special_tokens([AddedToken(token, normalized=False) for token in known if token not in special])
    return model


def find_special_tokens(
    model: tokenizers.Tokenizer, values: Mapping[str, Any], files: Mapping[str, Any], where: str
) -> SpecialTokens:
    """Find a tokenizer's special tokens.

    Args:
        model: of ``build_backend``.
        values: tokenizer.json.
        files: of ``read_published``; empty for a tokenizer.json that stands alone.
        where: path of tokenizer.json, for messages.

    Raises:
        UserError: an entry that is no token or id, or nothing that says which token ends a text.
    """
    before, after = added_around(model)
    ids = {name: _named_id(model, files, name, where) for name in NAMES}
    config, generation = files.get(CONFIG, {}), files.get(GENERATION, {})
    said = {
        (name, key): _ids(source.get(key), model, f"{_beside(where, name)}: {key}")
        for name, source in ((GENERATION, generation), (CONFIG, config))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    first = lambda key: next(iter(said[GENERATION, key] or said[CONFIG, key]), None)  # noqa: E731
    if TOKENIZER_CONFIG not in files and TOKENS_MAP not in files:
        ids |= {"bos_token": first("bos_token_id"), "pad_token": first("pad_token_id")}
    stops = said[GENERATION, "eos_token_id"] or said[CONFIG, "eos_token_id"]
    eos = ids["eos_token"] if ids["eos_token"] is not None else first("eos_token_id")
    eos = _bare_end(model, values, before, after, where) if eos is None else eos
    check_stop_ids(stops, f"{_beside(where, GENERATION if said[GENERATION, 'eos_token_id'] else CONFIG)}: eos_token_id")
    unk = ids["unk_token"]
    unknown = values.get("model", {}).get("unk_token")
    return SpecialTokens(
        eos_id=eos,
        stop_ids=stops or (eos,),
        bos_id=ids["bos_token"],
        pad_id=ids["pad_token"],
        unk_id=model.token_to_id(unknown) if unk is None and isinstance(unknown, str) else unk,
        before=before,
        after=after,
        files=dict(files),
    )


def _class_of(files: Mapping[str, Any]) -> str:
    name = files.get(TOKENIZER_CONFIG, {}).get("tokenizer_class") or files.get(CONFIG, {}).get("tokenizer_class")
    return name.removesuffix("Fast") if isinstance(name, str) else ""


def _is_sentencepiece_bpe(model: tokenizers.Tokenizer) -> bool:
    return type(model.model).__name__ == "BPE" and "ByteLevel" not in f"{model.pre_tokenizer!r}{model.decoder!r}"


def _prepend_as_llama(model: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """`transformers` 5 makes this class's parts anew: a text that begins with a space gets no second one."""
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme: Any = ("always" if config.get("legacy", False) else "first") if prefix else "never"
    model.normalizer = None
    model.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    model.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)


def _added_token(token: Mapping[str, Any]) -> AddedToken:
    flags = {
        name: bool(token[name])
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if name in token
    }
    return AddedToken(token["content"], **flags)


def _text_of(token: Any) -> str | None:
    """A token's text, given as such or as an object with its properties."""
    return token.get("content") if isinstance(token, dict) else token


def token_names(files: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of the tokens that published files name, such as ``bos_token``, as chat templates see them."""
    return {name: content for name in NAMES if (content := _content(files, name)) is not None}


def _content(files: Mapping[str, Any], name: str) -> str | None:
    config = files.get(TOKENIZER_CONFIG, {})
    value = config.get(name, _CLASS_TOKENS.get(_class_of(files), {}).get(name))
    if "added_tokens_decoder" not in config:
        value = files.get(TOKENS_MAP, {}).get(name, value)
    content = _text_of(value)
    return content if isinstance(content, str) else None


def _named_id(model: tokenizers.Tokenizer, files: Mapping[str, Any], name: str, where: str) -> int | None:
    for file in (TOKENIZER_CONFIG, TOKENS_MAP):
        value = files.get(file, {}).get(name)
        valid = value is None or isinstance(_text_of(value), str)
        require(valid, f"{_beside(where, file)}: {name}={value!r} is neither a token's text nor an object with it")
    content = _content(files, name)
    found = None if content is None else model.token_to_id(content)
    said = content is not None and any(name in files.get(file, {}) for file in (TOKENIZER_CONFIG, TOKENS_MAP))
    if said and found is None:
        _log.warning("%s: %s=%r is not in the vocabulary and is left out", where, name, content)
    return found


def _ids(value: Any, model: tokenizers.Tokenizer, where: str) -> tuple[int, ...]:
    listed = [] if value is None else value if isinstance(value, list) else [value]
    require(all(type(i) is int for i in listed), f"{where}={value!r} is not a token id, a list of ids, or null")
    known = tuple(dict.fromkeys(i for i in listed if 0 <= i < 2**32 and model.id_to_token(i) is not None))
    missing = [i for i in listed if i not in known]
    if missing and missing != [-1]:  # which stands for none in old files
        _log.warning("%s=%r: the tokenizer has no token %s", where, value, ", ".join(map(str, missing)))
    return known


def added_around(model: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what the post-processor puts before and behind a text."""
    for probe in ("a", "0", " "):
        plain = model.encode(probe, add_special_tokens=False).ids
        whole = model.encode(probe, add_special_tokens=True).ids
        for start in range(len(whole) - len(plain) + 1 if plain else 0):
            if whole[start : start + len(plain)] == plain:
                return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()


def _bare_end(
    model: tokenizers.Tokenizer,
    values: Mapping[str, Any],
    before: tuple[int, ...],
    after: tuple[int, ...],
    where: str,
) -> int:
    """The end-of-text token of a tokenizer.json that no other file explains."""
    if after:
        return after[-1]
    special = {token.content: i for i, token in model.get_added_tokens_decoder().items() if token.special}
    padding, part = values.get("padding") or {}, values.get("model", {})
    others = {*before, special.get(str(padding.get("pad_token"))), special.get(str(part.get("unk_token")))}
    left = {name: i for name, i in special.items() if i not in others and not _OTHER_ROLE.search(name)}
    ends = [i for name, i in left.items() if _ENDS_TEXT.fullmatch(name)]
    for found in (ends, list(left.values())):
        if len(found) == 1:
            return found[0]
    raise UserError(
        f"{where}: no end-of-text token can be told from its special tokens ({', '.join(special) or 'none'}): "
        f"name it as eos_token in a {TOKENIZER_CONFIG} beside it"
    )


def _beside(where: str, name: str) -> str:
    return str(Path(where).with_name(name)) if where.endswith(".json") else name
