"""When gradients are made: XLA alone would make each when it is asked for, and keep what it is made of until then."""

from typing import Any

import jax


@jax.custom_vjp
def gradients_together(*values: Any) -> tuple[Any, ...]:
    """Return the values (arrays or trees of them), none of whose gradients goes on before all of them are made."""
    return values


gradients_together.defvjp(
    lambda *values: (values, None),
    lambda _, gradients: jax.lax.optimization_barrier(gradients),
)
