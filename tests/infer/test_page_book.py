"""The host's book: which prefixes are known, what they hold in every recursion, and which pages are shared."""

import pytest

from mor_jax.infer.cache import KvLayout
from mor_jax.infer.page_book import PageBook, chain

RECURSIONS = KvLayout(passes=3, groups=3, block_layers=1, edge_layers=2, holds_all=False)
SHARED = KvLayout(passes=3, groups=1, block_layers=1, edge_layers=2, holds_all=True)
TEXT = list(range(100, 111))
DEPTHS = [3, 1, 0, 2, 1, 1, 3, 0, 2, 3]
"""Of all but the last one: 8, 5 and 3 came as deep as each recursion; of the first eight 6, 3 and 2."""


def _open(book, place, text=TEXT, budget=3):
    return book.open(place, list(text), budget, chain(text[:-1], budget, 4))


def test_keys_depend_on_all_that_comes_before_and_on_the_budget():
    keys = chain(TEXT, 3, 4)
    assert len(keys) == 2 and keys == chain(TEXT[:8], 3, 4) == chain(TEXT, 3, 4, keys[:1])
    for other in (chain([0, *TEXT[1:]], 3, 4), chain(TEXT, 2, 4)):
        assert not set(keys) & set(other)
    assert chain([*TEXT[:4], 0, *TEXT[5:]], 3, 4)[0] == keys[0]


@pytest.mark.parametrize(
    ("layout", "whole", "half", "pages", "copies"),
    [
        (RECURSIONS, [[8, 5, 3], [10]], [[6, 3, 2], [8]], [2 + 2 + 1, 3], [3, 0]),
        (SHARED, [[10], [10]], [[8], [8]], [3, 3], [0, 0]),
    ],
)
def test_a_prefix_holds_what_its_tokens_have_in_every_group(layout, whole, half, pages, copies):
    book = PageBook(2, 1, [50, 50], 4, layout)
    assert _open(book, 0) == 0
    book.learn(0, DEPTHS[:7])
    assert book.find(chain(TEXT, 3, 4)) == 1
    book.learn(0, DEPTHS[7:])
    assert book.lengths(0) == whole and book.used == book.seated == pages
    assert _open(book, 1, [*TEXT[:9], 7, 7]) == 8 and book.lengths(1) == half
    # the last page of a group is copied if it is not full, the others are shared
    assert [used - held for used, held in zip(book.used, pages, strict=True)] == copies
    assert _open(PageBook(2, 1, [50, 50], 4, layout), 1) == 0 == book.find(chain(TEXT, 2, 4))


def test_what_a_sequence_alone_knows_is_kept_when_it_ends_and_the_oldest_goes_first():
    book = PageBook(2, 2, [50, 50], 4, RECURSIONS)
    texts = [[n, *TEXT[1:]] for n in range(3)]
    for text in texts[:2]:
        assert _open(book, 0, text) == 0
        book.learn(0, DEPTHS)
        book.close(0)
    assert book.seated == [0, 0] and all(book.used)
    assert _open(book, 1, texts[0]) == 8  # now the second text is the one that was used longest ago
    book.close(1)  # knows nothing that the kept row does not
    assert _open(book, 0, texts[2]) == 0
    book.learn(0, DEPTHS)
    book.close(0)
    assert [book.find(chain(text, 3, 4)) for text in texts] == [2, 0, 2]
    book.close(_place_of(book, texts[2]), keep=False)
    assert book.evict() and book.evict() and not book.evict()
    assert book.used == [0, 0] and not book._holders and sorted(book._unused) == [2, 3]


def _place_of(book, text):
    assert _open(book, 1, text) == 8
    return 1


def test_orders_name_rows_as_they_are_before_all_of_them():
    book = PageBook(2, 1, [50, 50], 4, RECURSIONS)
    assert book.take_orders() is None
    _open(book, 0)
    book.learn(0, DEPTHS)
    book.close(0)  # moves to row 2, which is still empty
    assert _open(book, 1) == 8  # takes what row 2 is about to get
    orders = book.take_orders()
    assert (
        orders is not None and orders.drop_S.tolist() == [True, False, False] and orders.source_S.tolist() == [-1, 0, 0]
    )
    assert orders.lengths[0].tolist() == [[0, 0, 0], [6, 3, 2], [6, 3, 2]] and book.take_orders() is None
    _open(book, 0)
    book.close(0, keep=False)  # never seated
    orders = book.take_orders()
    assert orders is not None and orders.source_S.tolist() == [-1, -1, -1]
