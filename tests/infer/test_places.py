"""Who loses a place when pages run out, how often, and who waits for whom."""

import pytest

from mor_jax.infer.cache import KvLayout
from mor_jax.infer.page_book import PageBook
from mor_jax.infer.places import MOST_PREEMPTIONS, Places
from mor_jax.infer.request import Request

LAYOUT = KvLayout(passes=3, groups=3, block_layers=1, edge_layers=2, holds_all=False)


def _places(block, edge):
    return Places(3, PageBook(3, 2, [block, edge], 4, LAYOUT), LAYOUT, chunk=4, steps=4)


def _numbers(places):
    return [progress.number for _, progress in places.taken]


def test_the_youngest_loses_its_place_a_few_times_and_then_keeps_it():
    places = _places(100, 100)
    for number in range(3):
        places.wait(number, Request((number, 1, 2), 6))
    for _ in range(MOST_PREEMPTIONS):
        places.seat()
        assert _numbers(places) == [0, 1, 2]
        places.preempt_youngest()
        assert _numbers(places) == [0, 1] and [p.number for p in places.queue] == [2]
    places.seat()
    for _ in range(2 * MOST_PREEMPTIONS):  # the last one came to stay; the others go back in order
        places.preempt_youngest()
        places.seat()
    assert _numbers(places) == [0, 1, 2] and {p.preempted for _, p in places.taken} == {MOST_PREEMPTIONS}
    with pytest.raises(ValueError):
        places.preempt_youngest()


@pytest.mark.parametrize(("pages", "times"), [(200, 1), (240, 0)])  # 240 are what all may take at most
def test_what_others_need_is_counted_once_for_all_who_come_and_not_where_it_cannot_matter(pages, times, monkeypatch):
    count, asked, expects = 40, [], Places._expects
    places = Places(count, PageBook(count, 2, [pages, 80], 4, LAYOUT), LAYOUT, chunk=4, steps=4)
    places.needs.note([[8, 2, 1], [8]], tokens=8, generated=1)  # 3 and 1 pages are expected of each
    monkeypatch.setattr(Places, "_expects", lambda self, *entry: (asked.append(entry), expects(self, *entry))[1])
    monkeypatch.setattr(Places, "_takes", lambda self, *entry, **_: asked.append(entry) or [3, 1])
    for number in range(count + 5):
        places.wait(number, Request((number, 1, 2), 6))
    places.seat()
    assert _numbers(places) == list(range(count)) and len({index for index, _ in asked}) == count * times
    assert len(asked) == 2 * count * times
    places.empty(7)
    places.seat()
    assert places.numbers[7] == count and len(asked) == 4 * count * times
    assert places.have_room([]) and len(asked) == 5 * count * times
    places.seat()
    assert len(asked) == 5 * count * times and len(places.queue) == 4


def test_a_sequence_goes_on_behind_what_it_has_generated():
    places = _places(100, 100)
    places.wait(0, Request((1, 2, 3), 6))
    places.seat()
    (_, progress), *_ = places.taken
    assert (progress.end, progress.generated) == (2, 0)
    progress.text += [7, 8]
    places.preempt_youngest()
    places.seat()
    assert (progress.end, progress.read, progress.generated, progress.text) == (4, 0, 2, [1, 2, 3, 7, 8])


def test_only_measured_needs_let_more_in_and_what_kept_its_place_gets_all_it_may_need():
    places = _places(24, 8)  # enough for 32 tokens at full depth
    requests = [Request((n, *[1] * 7), 9) for n in range(4)]  # 16 entries, 12 and 4 pages at most
    for number, request in enumerate(requests):
        places.wait(number, request)
    places.seat()
    assert _numbers(places) == [0, 1]
    places.needs.note([[8, 2, 1], [8]], tokens=8, generated=1)  # of 8 tokens 4 and 2 pages
    places.seat()
    assert _numbers(places) == [0, 1, 2]
    for _, progress in places.taken:
        progress.preempted = MOST_PREEMPTIONS
    assert not places.have_room([])


def test_a_prompt_waits_while_an_older_one_reads_the_same():
    places = _places(100, 100)
    for number, own in enumerate(((5, 5, 5), (6, 6, 6))):
        places.wait(number, Request((*range(8), *own), 2))
    places.wait(2, Request(tuple(range(20, 30)), 2))
    places.seat()
    assert [p.number for _, p in places.to_read(4)] == [0, 2]
    (_, first), *_ = places.taken
    first.read = 8
    places.book.learn(0, [1] * 8)
    assert [(p.number, p.read) for _, p in places.to_read(4)] == [(0, 8), (1, 8), (2, 0)]
    assert places.book.seated[1] == 2  # shared


def test_who_waits_for_pages_at_the_head_of_the_queue_gives_the_device_nothing_to_do():
    places = _places(24, 8)
    for number in range(3):
        places.wait(number, Request((number, *[1] * 7), 9))
    places.seat()
    for _, progress in places.taken:
        progress.preempted = MOST_PREEMPTIONS  # and will have all that they may need
    places.seat()
    assert _numbers(places) == [0, 1] and len(places.queue) == 1 and places.book.take_orders() is None
    places.empty(0, keep=False)
    places.seat()
    assert _numbers(places) == [2, 1] and (orders := places.book.take_orders()) is not None and orders.drop_S[0]
