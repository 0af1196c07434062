"""Compile a preset's train step for described TPUs and leave what `mor plan --clock --clock-dump FOLDER` reads.

Run it with PYTHONPATH=WORKTREE/src to read the step of another commit; it uses nothing that 8ae4020 lacks.
"""

import argparse
import dataclasses
import os
from pathlib import Path


def main() -> None:
    """Write FOLDER/step.hlo.txt and the compiler's files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--remat", default="auto")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True)
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={flags.folder} --xla_jf_dump_llo_text=true "
        "--xla_jf_dump_llo_pass_label_regex=final_bundles"
    )  # before libtpu is loaded

    import jax

    from mor_jax import presets
    from mor_jax.config import MeshConfig
    from mor_jax.plan.compile import compile_step
    from mor_jax.plan.topology import describe_topology

    jax.config.update("jax_platforms", "cpu")
    topology = describe_topology(flags.topology)
    config = presets.get(flags.preset).config
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(data=len(topology.devices)),
        model=dataclasses.replace(config.model, attend_across_documents=True),
        train=dataclasses.replace(config.train, batch_size=flags.rows),
        perf=dataclasses.replace(config.perf, remat=flags.remat),
    )
    step = compile_step(config, topology)
    (flags.folder / "step.hlo.txt").write_text(step.text)
    print(f"remat {step.config.perf.remat}, {step.memory.total / 2**30:.2f} GiB, compiled in {step.seconds:.0f} s")


if __name__ == "__main__":
    main()
