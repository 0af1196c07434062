"""Print the results as markdown: `python experiments/plan/table.py [--matrix]`. Reads results/*.json only."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from cases import MUON, PAIRS, TOPOLOGIES, Case, cases

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30


def load() -> dict[str, dict[str, Any]]:
    """Return the results by case name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def received(plan: dict[str, Any], key: str) -> float:
    """Bytes that one device receives per step, all kinds of collectives."""
    return sum(kind[key] for kind in plan["collectives_per_device"].values())


def row(case: Case, plan: dict[str, Any]) -> str:
    """One line of the table."""
    slices = "" if case.slices == 1 else f"{case.slices} x "
    start = [f"`{case.preset}`", f"{slices}{case.topology}", case.execution]
    if "error" in plan:
        return f"| {' | '.join(start)} | {plan['error']} |" + " |" * 9
    memory, seconds = plan["memory_per_device"], plan["estimate"]["seconds"]
    figures = [
        plan["attention"],
        f"{(memory['parameters'] + memory['optimiser']) / GIB:.2f}",
        f"{memory['activations'] / GIB:.2f}",
        f"{memory['total'] / GIB:.2f} of {memory['limit'] / GIB:.2f}",
        f"{plan['flops']['per_token'] / 1e9:.3f}",
        f"{received(plan, 'bytes') / 1e9:.2f}",
        f"{received(plan, 'bytes_across') / 1e9:.2f}",
        " / ".join(f"{1e3 * seconds[k]:.0f}" for k in ("arithmetic", "memory", "network", "network_across")),
        f"{plan['estimate']['tokens_per_second_at_most'] / 1e6:.2f}",
        f"{plan['compile_seconds']:.0f}",
    ]
    return f"| {' | '.join([*start, *figures])} |"


def markdown(head: tuple[str, ...], rows: list[str]) -> str:
    """Format a table."""
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows])


def results_table(plans: dict[str, dict[str, Any]]) -> str:
    """Every case that has a result."""
    head = (
        "preset",
        "slices",
        "execution",
        "attention",
        "state GiB",
        "activations GiB",
        "total GiB per chip",
        "GFLOPs per token",
        "GB received on slice",
        "GB received across",
        "ms at peak: arithmetic / memory / network / across",
        "M tokens/s at most",
        "compile s",
    )
    return markdown(head, [row(case, plans[case.name]) for case in cases() if case.name in plans and case != MUON])


def ratio_table(plans: dict[str, dict[str, Any]]) -> str:
    """MoR over vanilla wherever both have a result."""
    head = (
        "size",
        "slices",
        "FLOPs",
        "memory per chip",
        "activations",
        "gathered",
        "summed",
        "received",
        "bound on time",
    )
    rows = []
    for size, presets in PAIRS.items():
        for topology, slices in TOPOLOGIES:
            names = [Case(preset, topology, slices, 1).name for preset in presets]
            pair = [plans[name] for name in names if name in plans and "error" not in plans[name]]
            if len(pair) == 2:
                rows.append(ratio_row(size, topology, slices, pair[0], pair[1]))
    return markdown(head, rows)


def optimizer_table(plans: dict[str, dict[str, Any]]) -> str:
    """AdamW and Muon in one step; what differs is per chip."""
    head = (
        "optimiser",
        "moments and other state, MB",
        "total GiB",
        "its GFLOPs, all chips",
        "of the model's",
        "its GFLOPs on a chip",
        "it moves, GB of the chip's memory",
        "it receives, MB",
        "received in all, GB",
        "bound, ms",
        "compile s",
    )
    rows = []
    for case in (dataclasses.replace(MUON, optimizer="adamw"), MUON):
        plan = plans[case.name]
        memory, optimizer = plan["memory_per_device"], plan["optimizer"]
        cells = (
            optimizer["kind"],
            f"{memory['optimiser'] / 1e6:.0f}",
            f"{memory['total'] / GIB:.2f}",
            f"{optimizer['flops'] / 1e9:,.0f}",
            f"{optimizer['share_of_model_flops']:.2%}",
            f"{optimizer['compiled_flops_per_device'] / 1e9:,.0f}",
            f"{optimizer['bytes_per_device'] / 1e9:.2f}",
            f"{optimizer['received_per_device'] / 1e6:.0f}",
            f"{received(plan, 'bytes') / 1e9:.2f}",
            f"{1e3 * max(plan['estimate']['seconds'].values()):.1f}",
            f"{plan['compile_seconds']:.0f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return markdown(head, rows)


def matrix(plans: dict[str, dict[str, Any]]) -> str:
    """What fits where, for tpu/README.md: cases under `gather`."""
    head = (
        "preset",
        "slice",
        "mesh",
        "GiB per chip",
        "limit",
        "GB received per chip and step",
        "M tokens/s at most",
        "bound by",
    )
    found = (
        (case, plans[case.name])
        for case in cases()
        if case.name in plans and case.execution == "gather" and case != MUON
    )
    return markdown(head, [matrix_row(case, plan) for case, plan in found])


def matrix_row(case: Case, plan: dict[str, Any]) -> str:
    """One line of the matrix."""
    slices = "" if case.slices == 1 else f"{case.slices} x "
    start = f"| `{case.preset}` | {slices}{case.topology} |"
    if "error" in plan:
        return f"{start} fsdp {case.fsdp} | {plan['error']} |" + " |" * 4
    memory, estimate = plan["memory_per_device"], plan["estimate"]
    across = received(plan, "bytes_across") / 1e9
    cells = (
        " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1),
        f"{memory['total'] / GIB:.2f}",
        f"{memory['limit'] / GIB:.2f}",
        f"{received(plan, 'bytes') / 1e9:.2f}" + (f", and {across:.2f} from the other slice" if across else ""),
        f"{estimate['tokens_per_second_at_most'] / 1e6:.2f}",
        estimate["limit"],
    )
    return f"{start} {' | '.join(cells)} |"


def main() -> None:
    """Print all results, MoR against vanilla, AdamW against Muon, and what was not run; or tpu/README.md's matrix."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--matrix", action="store_true", help="print the matrix of tpu/README.md instead")
    plans = load()
    if parser.parse_args().matrix:
        print(matrix(plans))
        return
    missing = [case.name for case in cases() if case.name not in plans]
    print(results_table(plans))
    print(f"\nMoR over vanilla, same mesh and batch:\n\n{ratio_table(plans)}")
    print(f"\n`{MUON.preset}` on {MUON.topology} with AdamW and with Muon:\n\n{optimizer_table(plans)}")
    print(f"\nNot run: {', '.join(missing) or 'nothing'}.")


def summed(plan: dict[str, Any]) -> float:
    """Bytes received by sums."""
    kinds = (plan["collectives_per_device"].get(kind) for kind in ("all-reduce", "reduce-scatter"))
    return sum(kind["bytes"] + kind["bytes_across"] for kind in kinds if kind)


def ratio_row(size: str, topology: str, slices: int, mor: dict[str, Any], vanilla: dict[str, Any]) -> str:
    """Compare MoR's step with vanilla's."""
    figures = (
        lambda plan: plan["flops"]["model"],
        lambda plan: plan["memory_per_device"]["total"],
        lambda plan: plan["memory_per_device"]["activations"],
        lambda plan: plan["collectives_per_device"]["all-gather"]["bytes"],
        summed,
        lambda plan: received(plan, "bytes") + received(plan, "bytes_across"),
        lambda plan: max(plan["estimate"]["seconds"].values()),
    )
    where = topology if slices == 1 else f"{slices} x {topology}"
    return f"| {size} | {where} | " + " | ".join(f"{f(mor) / f(vanilla):.2f}" for f in figures) + " |"


if __name__ == "__main__":
    main()
