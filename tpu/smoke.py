"""Is this pod fit to train? Every host reports, every device adds, every host writes to the bucket: `smoke.py gs://BUCKET`.

Run it on all hosts at once (`tpu/run.sh smoke`). Exit code 0 and `smoke: all well` on every host, or a line that says
what failed.
"""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax.config import DistributedConfig
from mor_jax.errors import UserError, require
from mor_jax.mesh.processes import initialize
from mor_jax.paths import to_path


def check_devices() -> None:
    """Name hosts, devices and versions; every host must hold equally many devices of one kind."""
    local, kinds = jax.local_device_count(), {device.device_kind for device in jax.devices()}
    print(
        f"smoke: host {jax.process_index()} of {jax.process_count()}: {local} of {jax.device_count()} x "
        f"{', '.join(sorted(kinds))}; jax {jax.__version__}",
        flush=True,
    )
    require(len(kinds) == 1, f"devices of several kinds: {sorted(kinds)}")
    require(
        local * jax.process_count() == jax.device_count(),
        f"{local} devices here x {jax.process_count()} hosts is not {jax.device_count()}: a host misses devices",
    )


def check_sum() -> None:
    """Add 0 .. n-1, one number per device, over the whole network, and time a sum of 64 MiB per device."""
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    numbers = jax.make_array_from_callback((count,), rows, lambda index: np.arange(count, dtype=np.int32)[index])
    total = int(jax.jit(jnp.sum, out_shardings=whole)(numbers))
    require(
        total == count * (count - 1) // 2, f"the devices' numbers add up to {total}, not {count * (count - 1) // 2}"
    )
    width = (64 << 20) // 4
    big = jax.jit(lambda: jnp.ones((count, width), jnp.float32), out_shardings=rows)()
    add = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole).lower(big).compile()
    np.asarray(add(big).addressable_data(0)[:1])
    start = time.monotonic()
    np.asarray(add(big).addressable_data(0)[:1])
    if jax.process_index() == 0:
        print(
            f"smoke: {count} devices add; all-reduce of 64 MiB took {1e3 * (time.monotonic() - start):.1f} ms",
            flush=True,
        )


def check_storage(folder: str) -> None:
    """Every host writes, reads back and deletes a file of its own."""
    target = to_path(folder) / "smoke" / f"host-{jax.process_index()}-{os.getpid()}"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = f"host {jax.process_index()} of {jax.process_count()}"
    target.write_text(text)
    read = target.read_text()
    target.unlink()
    require(read == text, f"{target}: wrote {text!r}, read {read!r}")


def main() -> int:
    """Run all checks; the hosts meet at the end, so that none reports success while another fails."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        initialize(DistributedConfig())
        check_devices()
        check_sum()
        check_storage(sys.argv[1])
    except (UserError, OSError) as error:
        print(f"smoke: FAILED on this host: {error}", file=sys.stderr, flush=True)
        return 1
    multihost_utils.sync_global_devices("smoke")
    print("smoke: all well", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
