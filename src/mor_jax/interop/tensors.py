"""Which tensor of the official release fills which part of the parameter tree (letters: D F H K L N R V).

PyTorch stores a matrix as (out, in); the tree stores it as [in..., out...], so every matrix but the embedding is
transposed. A tensor that the release shares between recursions has one name here and the others as aliases.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mor_jax.config import ModelConfig

Path = tuple[str, ...]
Index = tuple[int | slice, ...]
_ALL = slice(None)


@dataclass(frozen=True)
class Tensor:
    """One distinct tensor of the release and its place in our tree."""

    name: str
    """First official state_dict name that holds it."""
    shape: tuple[int, ...]
    """Shape there."""
    path: Path
    """Leaf of our tree."""
    index: Index = ()
    """Part of the leaf."""
    transposed: bool = False
    aliases: tuple[str, ...] = ()
    """Other official names tied to it."""


def tensors(config: ModelConfig) -> list[Tensor]:
    """List every distinct tensor of a model, in the order of the official modules."""
    embedding_shape = (config.vocab_size, config.d_model)
    tied = ("lm_head.weight",) if config.tie_embeddings else ()
    listed = [Tensor("model.embed_tokens.weight", embedding_shape, ("embedding", "embedding"), aliases=tied)]
    if config.recursion.has_middle:
        listed += _layer(config, ("model.layers.0",), ("first",), ())
    for layer in range(config.block_depth):
        listed += _block_layer(config, layer)
    listed += _routers(config)
    if config.recursion.has_middle:
        listed += _layer(config, (f"model.layers.{_last_index(config)}",), ("last",), ())
    listed.append(Tensor("model.norm.weight", (config.d_model,), ("final_norm", "scale")))
    if not config.tie_embeddings:
        listed.append(Tensor("lm_head.weight", embedding_shape, ("head", "kernel"), transposed=True))
    return listed


def router_bias_name(config: ModelConfig) -> str | None:
    """Official name of the loss-free bias [R], a state rather than a parameter; None if the model has none."""
    if not config.routing.is_loss_free:
        return None
    return f"model.layers.{_offset(config)}.router_bias"


def attention_aliases(config: ModelConfig) -> frozenset[str]:
    """Names under which the early release 884fa5a held attention of its own for the later recursions."""
    listed = (name for tensor in tensors(config) for name in tensor.aliases)
    return frozenset(name for name in listed if ".self_attn." in name)


def _offset(config: ModelConfig) -> int:
    return 1 if config.recursion.has_middle else 0


def _last_index(config: ModelConfig) -> int:
    """Module number of the unique last layer: MoR counts routed blocks, other models count unrolled layers."""
    wrapped = {"none": config.unrolled_depth - 2, "expert": config.recursion.num_recursions, "token": 1}
    return 1 + wrapped[config.routing.kind]


def _prefix(config: ModelConfig, recursion: int, layer: int) -> str:
    """Official module of one layer of the shared block in one recursion."""
    recursions, offset = config.recursion.num_recursions, _offset(config)
    if config.routing.kind == "expert":
        return f"model.layers.{offset + recursion}.block.{layer}"
    if config.routing.kind == "token":
        return f"model.layers.{offset}.block_list.{recursion}.{layer}"
    if config.recursion.is_sequence:
        return f"model.layers.{offset + layer * recursions + recursion}"
    return f"model.layers.{offset + recursion * config.block_depth + layer}"


def _block_layer(config: ModelConfig, layer: int) -> Iterator[Tensor]:
    prefixes = tuple(_prefix(config, r, layer) for r in range(config.recursion.num_recursions))
    shares_norms = config.recursion.share_norms
    yield from _layer(config, prefixes, ("block",), (layer,), norms=shares_norms)
    if not shares_norms:
        for recursion, prefix in enumerate(prefixes):
            yield from _norms(config, (prefix,), ("block_norms",), (recursion, layer))


def _norms(config: ModelConfig, prefixes: tuple[str, ...], path: Path, index: Index) -> Iterator[Tensor]:
    for official, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm")):
        name, *aliases = (f"{prefix}.{official}.weight" for prefix in prefixes)
        yield Tensor(name, (config.d_model,), (*path, ours, "scale"), index, aliases=tuple(aliases))


def _layer(
    config: ModelConfig, prefixes: tuple[str, ...], path: Path, index: Index, *, norms: bool = True
) -> Iterator[Tensor]:
    width, d_ff = config.d_model, config.d_ff
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices: tuple[tuple[str, tuple[int, int], Path, Index], ...] = (
        ("self_attn.q_proj", (heads, width), ("attention", "query"), ()),
        ("self_attn.k_proj", (kv_heads, width), ("attention", "key_value"), (_ALL, 0)),
        ("self_attn.v_proj", (kv_heads, width), ("attention", "key_value"), (_ALL, 1)),
        ("self_attn.o_proj", (width, heads), ("attention", "output"), ()),
        ("mlp.gate_proj", (d_ff, width), ("ffn", "gate_up"), (_ALL, 0)),
        ("mlp.up_proj", (d_ff, width), ("ffn", "gate_up"), (_ALL, 1)),
        ("mlp.down_proj", (width, d_ff), ("ffn", "down"), ()),
    )
    for official, shape, ours, part in matrices:
        name, *aliases = (f"{prefix}.{official}.weight" for prefix in prefixes)
        yield Tensor(name, shape, (*path, *ours), (*index, *part), transposed=True, aliases=tuple(aliases))
    if norms:
        yield from _norms(config, prefixes, path, index)


def _routers(config: ModelConfig) -> Iterator[Tensor]:
    routing, recursions, offset = config.routing, config.recursion.num_recursions, _offset(config)
    if routing.kind == "token":
        yield from _router(config, f"model.layers.{offset}.mor_router.router", "router", (), recursions)
    if routing.kind != "expert":
        return
    for r in range(recursions):
        yield from _router(config, f"model.layers.{offset + r}.mor_router.router", "router", (r,), 1)
        if routing.sampling == "aux_router":
            yield from _router(config, f"model.layers.{offset + r}.mlp_router.router", "aux_router", (r,), 1)


def _router(config: ModelConfig, prefix: str, ours: str, index: Index, outputs: int) -> Iterator[Tensor]:
    width = config.d_model
    if config.routing.router == "linear":
        yield Tensor(f"{prefix}.weight", (outputs, width), (ours, "kernel"), index, transposed=True)
        return
    yield Tensor(f"{prefix}.0.weight", (2 * width, width), (ours, "hidden"), index, transposed=True)
    yield Tensor(f"{prefix}.2.weight", (outputs, 2 * width), (ours, "output"), index, transposed=True)
