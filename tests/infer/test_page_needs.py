"""How many pages a sequence is expected to take, by what others took, and how many at most."""

import itertools

import pytest

from mor_jax.infer.cache import KvLayout
from mor_jax.infer.page_needs import PageNeeds
from mor_jax.infer.request import Request

LAYOUT = KvLayout(passes=3, groups=3, block_layers=1, edge_layers=2, holds_all=False)
REQUEST = Request((1,) * 9, 24)


def test_what_is_expected_follows_what_others_took_and_never_exceeds_the_most():
    needs = PageNeeds(LAYOUT, 2, 4, steps=4)
    assert needs.at_most(REQUEST) == needs.expected(REQUEST, 0) == [24, 8]
    needs.note([[20, 10, 5], [20]], tokens=20, generated=8)
    assert needs.expected(REQUEST, 0) == [4 + 2 + 1, 4]  # 16 tokens, of which 16, 8 and 4 come that deep
    assert needs.expected(REQUEST, 15) == [6 + 3 + 2, 6]  # one more than it has: 24, 12 and 6
    assert needs.expected(REQUEST, 24) == [8 + 4 + 2, 8]
    needs.note([[20, 20, 20], [20]], tokens=20, generated=1000)
    assert needs.expected(REQUEST, 0)[1] == 8 and needs.expected(Request((1,), 0), 0) == [0, 0]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
def test_a_dispatch_takes_no_more_than_said(steps):
    """All ways in which passes can fall into the groups, from all fillings of their last pages."""
    most = PageNeeds(LAYOUT, 2, 4, steps).of_launch(None)
    of = lambda entries: -(-entries // 4)  # noqa: E731
    splits = (s for s in itertools.product(range(steps + 1), repeat=3) if sum(s) == steps)
    worst = max(sum(max(of(held + more) - of(held) for held in range(1, 5)) for more in split) for split in splits)
    assert most == [worst, of(steps)]
    assert PageNeeds(LAYOUT, 1, 4, steps).of_launch(5) == [6]
