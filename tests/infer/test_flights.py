"""What the host learns from a dispatch."""

import jax.numpy as jnp
import numpy as np

from mor_jax.infer.cache import KvLayout
from mor_jax.infer.engine_state import COUNTERS
from mor_jax.infer.engine_statistics import EngineStatistics
from mor_jax.infer.flights import Dispatch
from mor_jax.infer.page_book import PageBook, chain
from mor_jax.infer.places import Places
from mor_jax.infer.request import Request

LAYOUT = KvLayout(passes=1, groups=1, block_layers=1, edge_layers=0, holds_all=False)
PLACE, TOKEN, DEPTH, FINISHED = 0, 1, 2, 4


def test_of_two_that_end_in_one_dispatch_the_prefix_of_the_later_one_is_kept():
    steps = {0: 9, 1: 5}  # until each place's sequence ends
    places = Places(2, PageBook(2, 1, [50], 4, LAYOUT), LAYOUT, chunk=4, steps=16)
    for number, tokens in steps.items():
        places.wait(number, Request((number,), tokens))
    places.seat()
    packed_XFE = np.zeros((max(steps.values()), 5, 2), np.int32)
    packed_XFE[:, PLACE], packed_XFE[:, DEPTH] = -1, 1
    for place, count in steps.items():
        packed_XFE[:count, PLACE, place], packed_XFE[:count, TOKEN, place] = place, 3 + place
        packed_XFE[count - 1, FINISHED, place] = 1
    who = [progress for _, progress in places.taken]
    for progress in who:
        places.launched(progress, None)
    flight = Dispatch(who, (jnp.asarray(packed_XFE), jnp.zeros(len(COUNTERS), jnp.int32)))
    tokens = flight.land(places, EngineStatistics(), ())
    assert [token.request for token in tokens if token.finished] == [1, 0]
    assert places.book.find(chain([0, *[3] * 7], 1, 4)) == 2
    assert places.book.find(chain([1, *[4] * 3], 1, 4)) == 0
