"""Next-token cross-entropy in chunks of the sequence, without ever holding ``[B, T, V]`` logits.

The gradient is made in the forward chunk, so the backward pass recomputes nothing of the output head. On a mesh every
device walks over chunks of its own tokens (``loss_shards``). Letters: B batch, T positions, C positions of one chunk,
I chunks, D model, V vocabulary; inside ``local`` they are a device's share of each.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from mor_jax.config import ModelConfig
from mor_jax.kernels.cross_entropy import VocabularyShard, chunk_gradient, chunk_nll
from mor_jax.mesh.axes import on_shards
from mor_jax.model.loss_shards import (
    HEAD,
    HIDDEN,
    SCALAR,
    TOKENS,
    sum_head_gradient,
    sum_over_tokens,
    whole_width,
)

IGNORED = -100
"""Label of a token after which nothing is predicted."""


@struct.dataclass
class CrossEntropy:
    """Weighted sums over the positions of a batch, float32 scalars.

    ``loss_sum`` carries the gradient. Without a z-loss ``nll_sum`` is the same value and carries it too; with one,
    ``nll_sum`` and ``z_sum`` are reports that carry none.
    """

    nll_sum: jax.Array
    """Sum of weight x negative log-likelihood, in nats."""
    z_sum: jax.Array
    """Sum of weight x squared log-sum-exp of the logits."""
    loss_sum: jax.Array
    """nll_sum + z_coefficient x z_sum."""


def target_mask(model: ModelConfig, segment_ids: Any, *, within_documents: bool = False) -> Any:
    """Which targets of a packed row count.

    Args:
        model: says whether attention, and so prediction, crosses document borders.
        segment_ids: int [B, T+1], 1-based, 0 = padding; numpy or jax.
        within_documents: whether to count as a model with masked documents does, to compare another with it.

    Returns:
        bool [B, T]: the target is no padding and, unless attention crosses borders, of its input's document.
    """
    inputs, targets = segment_ids[:, :-1], segment_ids[:, 1:]
    crosses = model.attend_across_documents and not within_documents
    return (targets != 0) if crosses else (targets != 0) & (inputs == targets)


def batch_labels(model: ModelConfig, batch: Mapping[str, Any], *, within_documents: bool = False) -> tuple[Any, Any]:
    """What is to be predicted after every token but the last, and where it counts.

    Args:
        model: of ``target_mask``.
        batch: int [B, T+1] ``tokens``, ``segment_ids`` and, if other tokens than the next ones are to be predicted,
            ``labels``: its entry t+1 after token t, IGNORED where there is none.
        within_documents: of ``target_mask``.

    Returns:
        (int [B, T], 0 where a label is IGNORED; bool [B, T]: those of ``target_mask`` that are not).
    """
    mask_BT = target_mask(model, batch["segment_ids"], within_documents=within_documents)
    if "labels" not in batch:
        return batch["tokens"][:, 1:], mask_BT
    labels_BT = batch["labels"][:, 1:]
    return labels_BT * (labels_BT != IGNORED), mask_BT & (labels_BT != IGNORED)


def _chunked(x_BTX: jax.Array, chunk: int) -> jax.Array:
    """Pad T with zeros to a multiple of ``chunk`` and put the chunks first: [I, B, C, ...]."""
    batch, length, *rest = x_BTX.shape
    chunks = -(-length // chunk)
    padding = [(0, 0), (0, chunks * chunk - length)] + [(0, 0)] * len(rest)
    return jnp.moveaxis(jnp.pad(x_BTX, padding).reshape(batch, chunks, chunk, *rest), 1, 0)


def _unchunked(x_IBCX: jax.Array, length: int) -> jax.Array:
    """Undo ``_chunked``: [B, T, ...]."""
    chunks, batch, chunk, *rest = x_IBCX.shape
    return jnp.moveaxis(x_IBCX, 0, 1).reshape(batch, chunks * chunk, *rest)[:, :length]


def _chunk_logits(hidden_BCD: jax.Array, head_VD: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Logits, accumulated in float32, kept in ``dtype``."""
    return jnp.einsum("BCD,VD->BCV", hidden_BCD, head_VD, preferred_element_type=dtype)


def fused_cross_entropy(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunk: int,
    z_coefficient: float = 0.0,
    logits_dtype: DTypeLike = jnp.float32,
    fused: bool = False,
) -> CrossEntropy:
    """Sum the weighted cross-entropy of a batch, one chunk of positions at a time.

    Matrix products run in the dtype of ``hidden_BTD`` and accumulate in float32; logits are float32 and live for one
    chunk only. Differentiable in ``hidden_BTD`` and ``head_VD``; the head's gradient is accumulated in float32.

    Args:
        hidden_BTD: final hidden states, float [B, T, D].
        head_VD: output head, float [V, D].
        targets_BT: token to predict at each position, int [B, T].
        weights_BT: float [B, T]; 0 leaves a position out.
        chunk: positions per chunk, of a device's share of each row; T need not be a multiple.
        z_coefficient: weight of the squared log-sum-exp of the logits.
        logits_dtype: how the logits of a chunk lie in memory: bfloat16 rounds them, and moves half the bytes.
        fused: when differentiated, softmax and gradient of a chunk in one kernel for GPUs (``chunk_gradient``) where
            each device holds the whole vocabulary; the value alone, and split vocabularies, are XLA's in any case.

    Returns:
        ``CrossEntropy`` of float32 scalars.

    References:
        Chowdhery et al., PaLM (2022), section 5, for the logit z-loss.
    """
    with jax.named_scope("head_loss"):
        settings = (chunk, float(z_coefficient), jnp.dtype(logits_dtype), fused)
        sums = _cross_entropy(settings, hidden_BTD, head_VD, targets_BT, weights_BT)
    nll_sum, z_sum, loss_sum = sums
    return CrossEntropy(nll_sum=nll_sum, z_sum=z_sum, loss_sum=loss_sum)


def _cross_entropy_sums(settings, hidden_BTD, head_VD, targets_BT, weights_BT):
    chunk, z_coefficient, logits_dtype, _ = settings

    def local(hidden_BTD, head_VD, targets_BT, weights_BT):
        head = whole_width(head_VD.astype(hidden_BTD.dtype))
        vocabulary = VocabularyShard(head.shape[0])

        def step(sums, inputs):
            hidden_BCD, targets_BC, weights_BC = inputs
            logits_BCV = _chunk_logits(hidden_BCD, head, logits_dtype)
            nll_BC, lse_BC = chunk_nll(logits_BCV, targets_BC, vocabulary)
            return (sums[0] + jnp.sum(nll_BC * weights_BC), sums[1] + jnp.sum(lse_BC**2 * weights_BC)), None

        zero = jnp.zeros((), jnp.float32)
        inputs = tuple(_chunked(x, chunk) for x in (hidden_BTD, targets_BT, weights_BT))
        return sum_over_tokens(jax.lax.scan(step, (zero, zero), inputs)[0])

    arguments = (hidden_BTD, head_VD, targets_BT, weights_BT.astype(jnp.float32))
    nll_sum, z_sum = on_shards(local, (HIDDEN, HEAD, TOKENS, TOKENS), (SCALAR, SCALAR))(*arguments)
    return nll_sum, z_sum, nll_sum + z_coefficient * z_sum


def _cross_entropy_forward(settings, hidden_BTD, head_VD, targets_BT, weights_BT):
    chunk, z_coefficient, logits_dtype, fused = settings
    dtype = hidden_BTD.dtype

    def local(hidden_BTD, head_VD, targets_BT, weights_BT):
        head = whole_width(head_VD.astype(dtype))
        vocabulary = VocabularyShard(head.shape[0])

        def step(carry, inputs):
            nll_sum, z_sum, grad_head_VD = carry
            hidden_BCD, targets_BC, weights_BC = inputs
            logits_BCV = _chunk_logits(hidden_BCD, head, logits_dtype)
            tokens = (logits_BCV, targets_BC, weights_BC)
            grad_BCV, nll_BC, lse_BC = chunk_gradient(*tokens, vocabulary, dtype, z_coefficient, fused=fused)
            grad_BCD = jnp.einsum("BCV,VD->BCD", grad_BCV, head, preferred_element_type=jnp.float32).astype(dtype)
            grad_head_VD += jnp.einsum("BCV,BCD->VD", grad_BCV, hidden_BCD, preferred_element_type=jnp.float32)
            nll_sum += jnp.sum(nll_BC * weights_BC)
            z_sum += jnp.sum(lse_BC**2 * weights_BC)
            return (nll_sum, z_sum, grad_head_VD), grad_BCD

        zero = jnp.zeros((), jnp.float32)
        inputs = tuple(_chunked(x, chunk) for x in (hidden_BTD, targets_BT, weights_BT))
        carry = (zero, zero, jnp.zeros(head.shape, jnp.float32))
        (nll_sum, z_sum, grad_head_VD), grad_IBCD = jax.lax.scan(step, carry, inputs)
        grad_BTD = vocabulary.sum(_unchunked(grad_IBCD, hidden_BTD.shape[1]))
        gradients = sum_head_gradient(grad_BTD, grad_head_VD)
        return *sum_over_tokens((nll_sum, z_sum)), *gradients

    arguments = (hidden_BTD, head_VD, targets_BT, weights_BT.astype(jnp.float32))
    sharded = on_shards(local, (HIDDEN, HEAD, TOKENS, TOKENS), (SCALAR, SCALAR, HIDDEN, HEAD))
    nll_sum, z_sum, grad_BTD, grad_head_VD = sharded(*arguments)
    return (nll_sum, z_sum, nll_sum + z_coefficient * z_sum), (grad_BTD, grad_head_VD.astype(head_VD.dtype))


def _cross_entropy_backward(settings, residuals, cotangents):
    _, z_coefficient, *_ = settings
    grad_BTD, grad_head_VD = residuals
    nll_cotangent, _, cotangent = cotangents
    if z_coefficient == 0.0:
        cotangent = cotangent + nll_cotangent  # the two sums are one value
    return grad_BTD * cotangent.astype(grad_BTD.dtype), grad_head_VD * cotangent.astype(grad_head_VD.dtype), None, None


_cross_entropy: Any = jax.custom_vjp(_cross_entropy_sums, nondiff_argnums=(0,))
_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def token_nll(hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, *, chunk: int) -> jax.Array:
    """Return the negative log-likelihood of every target in nats, float32 [B, T]; for evaluation, not for gradients.

    Args:
        hidden_BTD: final hidden states, float [B, T, D].
        head_VD: output head, float [V, D].
        targets_BT: token to predict at each position, int [B, T].
        chunk: positions per chunk; T need not be a multiple.
    """
    nll = lambda logits, targets, vocabulary: chunk_nll(logits, targets, vocabulary)[0]  # noqa: E731
    return _by_chunk(nll, TOKENS, hidden_BTD, head_VD, targets_BT, chunk)


def token_scores(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Return what ``token_nll`` does, and the most likely token at every position, int32 [B, T]; the same arguments."""

    def scores(logits_BCV: jax.Array, targets_BC: jax.Array, vocabulary: VocabularyShard) -> Any:
        return chunk_nll(logits_BCV, targets_BC, vocabulary)[0], vocabulary.argmax(logits_BCV)

    return _by_chunk(scores, (TOKENS, TOKENS), hidden_BTD, head_VD, targets_BT, chunk)


def _by_chunk(
    score: Callable[[jax.Array, jax.Array, VocabularyShard], Any],
    axes: Any,
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
) -> Any:
    """Apply ``score`` (logits [B, C, V], targets [B, C], vocabulary -> arrays [B, C] of ``axes``) chunk by chunk."""

    def local(hidden_BTD, head_VD, targets_BT):
        head = whole_width(head_VD.astype(hidden_BTD.dtype))
        vocabulary = VocabularyShard(head.shape[0])

        def one_chunk(inputs):
            return score(_chunk_logits(inputs[0], head), inputs[1], vocabulary)

        scores_IBC = jax.lax.map(one_chunk, (_chunked(hidden_BTD, chunk), _chunked(targets_BT, chunk)))
        return jax.tree.map(lambda a_IBC: _unchunked(a_IBC, hidden_BTD.shape[1]), scores_IBC)

    return on_shards(local, (HIDDEN, HEAD, TOKENS), axes)(hidden_BTD, head_VD, targets_BT)
