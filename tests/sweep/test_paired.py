"""Paired t-intervals against a textbook table."""

import pytest

from mor_jax.sweep.paired import paired_difference


def test_the_interval_is_students_over_the_differences_of_common_seeds():
    ours, base = {0: 3.01, 1: 3.32, 2: 3.63, 7: 9.0}, {0: 3.0, 1: 3.3, 2: 3.6, 5: 1.0}
    found = paired_difference(ours, base)
    assert found is not None and found.seeds == 3
    assert found.mean == pytest.approx(0.02)
    assert found.half_width == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)  # t of 2 degrees of freedom, 97.5%
    assert not found.excludes_zero and str(found) == "+0.0200 [-0.0048, +0.0448]"
    sure = paired_difference({0: 1.0, 1: 1.001}, {0: 2.0, 1: 2.0})
    assert sure is not None and sure.excludes_zero
    assert sure.half_width == pytest.approx(12.706 * 0.0005, rel=1e-3)


def test_one_seed_decides_nothing():
    alone = paired_difference({0: 1.0, 1: 1.0}, {0: 9.0})
    assert alone is not None and (alone.half_width, alone.excludes_zero, str(alone)) == (None, False, "-8.0000")
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
