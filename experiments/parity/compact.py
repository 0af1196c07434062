"""Cut the full golden files down to the fixtures of tests/interop: python experiments/parity/compact.py GOLDENS OUT.

Hidden states, caches and float64 arrays go; gradients stay whole in a few cases, and elsewhere as two float64 sums per
tensor; evaluation logits stay where they differ from the training logits (they are the same function without warm-up).
"""

import json
import sys
from pathlib import Path

import numpy as np

WHOLE_GRADIENTS = ("vanilla_L2_padded", "kv_rec_sequence_nr3_L6", "mor_expert_c3_default", "mor_token_mc3_warmup")
INITIALISATIONS = (
    "init_cycle_nr1_L8_base4",
    "init_cycle_nr3_L10",
    "init_middle_cycle_nr2_L8_noln",
    "init_sequence_nr3_L6",
)
KEPT_META = ("name", "description", "model_kind", "model", "recursive", "kv_sharing", "mor", "training_step",
             "grad_names", "ties")  # fmt: skip
KEPT = ("input_ids", "attention_mask", "labels", "num_items_in_batch", "f64/grad_sumsq", "f64/grad_proj")
DROPPED = ("hidden", "kv_cache", "block_out", "mor_out", "_acc", "top_k", "balancing_ratio", "rec", "aux_backward")
KEPT_BY_RECURSION = ("selected_tokens", "router_logits", "gate")


def keeps(name: str, whole_gradients: bool) -> bool:
    """Whether an array belongs into the fixture."""
    kind, _, rest = name.partition("/")
    if name in KEPT or kind == "param":
        return True
    if kind == "grad":
        return whole_gradients
    if rest.startswith("rec") and rest.rpartition("/")[2] in KEPT_BY_RECURSION:
        return True
    return kind in ("train", "eval") and not any(part in rest for part in DROPPED)


def compact(source: Path, target: Path) -> None:
    """Write one fixture."""
    with np.load(source) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays["meta_json"]))
    kept = {n: a for n, a in arrays.items() if keeps(n, meta["name"] in WHOLE_GRADIENTS)}
    if np.array_equal(arrays["train/logits"], arrays["eval/logits"]):
        del kept["eval/logits"]
    if "untied" in meta["name"]:  # refused: only its tensors matter
        kept = {n: a for n, a in kept.items() if n.startswith("param/")}
    kept["meta_json"] = np.array(json.dumps({key: meta[key] for key in KEPT_META}))
    np.savez_compressed(target, **kept)


def main() -> None:
    """Compact every model case, and copy some cases of initialisation from a full model."""
    goldens, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for source in sorted(goldens.glob("*.npz")):
        if not source.name.startswith("init_"):
            compact(source, out / source.name)
        elif source.stem in INITIALISATIONS:
            (out / source.name).write_bytes(source.read_bytes())


if __name__ == "__main__":
    main()
