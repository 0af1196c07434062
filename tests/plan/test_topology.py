"""Names of TPU slices: what is refused, and what is suggested instead."""

import pytest

from mor_jax.errors import UserError
from mor_jax.plan.topology import describe_topology, known_topologies


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("v5litepod-64", "v5e:8x8"),
        ("v5litepod-256", "v5e:16x16"),
        ("v5p-128", "v5p:4x4x4"),  # counts cores, two per chip
        ("v6e-64", "v6e:8x8"),
        ("trillium:8x8", "v6e:8x8"),
        ("ironwood:2x2x1", "tpu7x:2x2x1"),
        ("v5e8x8", "v5e:8x8"),
        ("V5E:8X8", "v5e:8x8"),
    ],
)
def test_the_nearest_slice_is_suggested(name, meant):
    with pytest.raises(UserError, match=f"^topology={name!r} is not a TPU slice; did you mean {meant!r}?") as caught:
        describe_topology(name)
    assert "known: v5e:1x1" in str(caught.value)


def test_a_slice_count_must_be_positive():
    with pytest.raises(UserError, match="slices=0 must be positive"):
        describe_topology("v5e:8x8", 0)


def test_known_names_have_the_shape_of_their_network():
    """v5e and v6e are two-dimensional, v5p and TPU7x three-dimensional."""
    for name in known_topologies():
        generation, shape = name.split(":")
        assert len(shape.split("x")) == (2 if generation in ("v5e", "v6e") else 3)
