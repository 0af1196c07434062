"""Questions whose difficulty is known, many in each row, from a seed: pointers, words over S3 and S5, sums.

Answers do not stand in the row: they are its labels. So none helps with another, and an answer's difficulty is what
must be done to know it from what was read: hops, elements that are composed, or pairs of digits. Held-out rows are
those whose content falls into an eighth of all hashes; training never makes one, whatever the seed. NumPy only.
Letters: N rows, T tokens of a row.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Kind = Literal["pointer", "s3", "s5", "addition"]
KINDS: tuple[Kind, ...] = ("pointer", "s3", "s5", "addition")
MOST_HOPS = 8
END, UNKNOWN, ASK = "<|endoftext|>", "<unk>", "?"
DIGITS = tuple("0123456789")
ELEMENTS = tuple(f"e{element}" for element in range(120))
NODES = tuple(f"n{node}" for node in range(2 * MOST_HOPS))
EDGES = tuple(f"{start}>{end}" for start in NODES for end in NODES)
HOPS = tuple(f"{start}+{hops}" for start in NODES for hops in range(1, MOST_HOPS + 1))
WORDS = (END, UNKNOWN, ASK, *DIGITS, *ELEMENTS, *NODES, *EDGES, *HOPS)
"""The vocabulary; a token's id is its place."""
ID = {word: token for token, word in enumerate(WORDS)}
_DIGIT, _ELEMENT, _NODE, _EDGE, _HOP = (ID[words[0]] for words in (DIGITS, ELEMENTS, NODES, EDGES, HOPS))
_HELD_OUT_ONE_OF = np.uint64(8)

Generator = np.random.Generator
Rows = tuple[np.ndarray, np.ndarray, np.ndarray]
"""int arrays [N, T]: tokens; the answer at each token; its difficulty, 0 where nothing is asked."""


def is_held_out(contents_NX: np.ndarray) -> np.ndarray:
    """Which rows, by what they are made of, training never sees: bool [N]."""
    hashes = np.zeros(len(contents_NX), np.uint64)
    for column in contents_NX.T.astype(np.uint64):
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32) & (_HELD_OUT_ONE_OF - np.uint64(1)) == 0


class Task(Protocol):
    """Makes rows of questions of many sizes."""

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        ...

    def rows(self, generator: Generator, count: int, held_out: bool) -> Rows:
        """Return ``count`` rows of one part."""
        ...


def _drawn(draw: Callable[[int], np.ndarray], count: int, held_out: bool) -> np.ndarray:
    """Draw contents [N, X], N at a time, until all are of the wanted part."""
    contents_NX = draw(count)
    while (wrong := np.flatnonzero(is_held_out(contents_NX) != held_out)).size:
        contents_NX[wrong] = draw(wrong.size)
    return contents_NX


@dataclass(frozen=True)
class Pointer:
    """A cycle through 2 x ``largest`` nodes, its edges in any order, then questions: from where, and how many hops.

    An edge is one word, so that a hop is one look-up; so is a question. One cycle: no start comes back to itself, so
    every hop counts. A cycle is held out as a whole.
    """

    largest: int

    @property
    def row_length(self) -> int:
        """Tokens of a row: the edges, and three times as many questions."""
        return 8 * self.largest

    def rows(self, generator: Generator, count: int, held_out: bool) -> Rows:
        """Return ``n3>n10 n5>n3 ... n5+2 n3+1``; a question's answer is the node that is meant."""
        nodes = np.arange(2 * self.largest)

        def draw(wanted: int) -> np.ndarray:
            others = generator.permuted(np.tile(nodes[1:], (wanted, 1)), axis=1)
            return np.concatenate([np.zeros((wanted, 1), others.dtype), others], axis=1)

        cycle = _drawn(draw, count, held_out)
        order = generator.permuted(np.tile(nodes, (count, 1)), axis=1)
        start, end = (np.take_along_axis(side, order, axis=1) for side in (cycle, np.roll(cycle, -1, axis=1)))
        edges = _EDGE + len(NODES) * start + end
        places = generator.integers(len(nodes), size=(count, 3 * len(nodes)))
        hops = generator.integers(1, self.largest + 1, size=places.shape)
        asked = _HOP + MOST_HOPS * np.take_along_axis(cycle, places, axis=1) + hops - 1
        answers = _NODE + np.take_along_axis(cycle, (places + hops) % len(nodes), axis=1)
        none = np.zeros_like(edges)
        tokens, labels, difficulties = (
            np.concatenate(parts, axis=1) for parts in ((edges, asked), (none, answers), (none, hops))
        )
        return tokens, labels, difficulties


@dataclass(frozen=True)
class Word:
    """Words of 1 to ``largest`` elements of the symmetric group on ``degree`` letters; answers are products so far.

    At an element as many are composed as the word has up to there.
    """

    degree: int
    largest: int

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return 2 * self.largest

    def rows(self, generator: Generator, count: int, held_out: bool) -> Rows:
        """Return ``? e4 e1 e1 ? e2 ...``; the elements act one after the other, the first one first."""
        table = _PRODUCTS[self.degree]

        def draw(wanted: int) -> np.ndarray:
            elements = generator.integers(len(table), size=(wanted, self.row_length))
            places = _places(generator, wanted, self.row_length, 1, self.largest)
            return np.where(places > 0, elements, -1 - places)  # -1: here a word begins

        elements_NT = _drawn(draw, count, held_out)
        difficulties_NT, products_NT = np.zeros_like(elements_NT), elements_NT.copy()
        for place in range(1, self.row_length):
            goes_on = difficulties_NT[:, place - 1] > 0
            inside, before = elements_NT[:, place] >= 0, np.maximum(products_NT[:, place - 1], 0)
            product = table[before, np.maximum(elements_NT[:, place], 0)]
            products_NT[:, place] = np.where(inside & goes_on, product, elements_NT[:, place])
            difficulties_NT[:, place] = np.where(inside, difficulties_NT[:, place - 1] + 1, 0)
        inside = difficulties_NT > 0
        tokens_NT = np.where(inside, elements_NT + _ELEMENT, ID[ASK])
        return tokens_NT, np.where(inside, products_NT + _ELEMENT, 0), difficulties_NT


def _places(generator: Generator, rows: int, length: int, smallest: int, largest: int) -> np.ndarray:
    """Fill rows with questions of any sizes: at every token its place in its question, 0 where one begins: [N, T]."""
    sizes_NQ = generator.integers(smallest, largest + 1, size=(rows, length // (smallest + 1) + 1))
    ends_NQ = np.cumsum(sizes_NQ + 1, axis=1)
    row, question = np.nonzero(ends_NQ < length)
    begins_NT = np.zeros((rows, length), int)
    begins_NT[row, ends_NQ[row, question]] = ends_NQ[row, question]
    return np.arange(length) - np.maximum.accumulate(begins_NT, axis=1)


def _products(degree: int) -> np.ndarray:
    """Table of products: row a, column b is a, then b; elements in lexical order."""
    elements = list(itertools.permutations(range(degree)))
    number = {element: index for index, element in enumerate(elements)}
    return np.array([[number[tuple(b[letter] for letter in a)] for b in elements] for a in elements])


_PRODUCTS = {3: _products(3), 5: _products(5)}


@dataclass(frozen=True)
class Addition:
    """Sums of two numbers of 2 to ``largest`` digits, pair by pair, the lowest first; the answer is the sum's digit.

    It needs the pair, and for the carry the pairs before it as far as they add up to nine, and one more. The share of
    pairs that do is drawn for every row: chains of carries of every length occur.
    """

    largest: int

    @property
    def row_length(self) -> int:
        """Tokens of a row: a multiple of 32 that holds the longest sum and the mark before it."""
        return -(-2 * (self.largest + 1) // 32) * 32

    def rows(self, generator: Generator, count: int, held_out: bool) -> Rows:
        """Return ``? 4 7 1 9 ? ...`` (74 + 19 at the lower digits first: 4 and 7 are the lowest pair)."""
        length = self.row_length

        def draw(wanted: int) -> np.ndarray:
            pairs = _places(generator, wanted, length // 2, 2, self.largest)  # a mark, too, takes two places
            first, other = generator.integers(10, size=(2, *pairs.shape))
            nines = generator.random(pairs.shape) < generator.random((wanted, 1)) ** 0.5
            inside = pairs > 0
            return np.concatenate(
                [np.where(inside, digits, -1) for digits in (first, np.where(nines, 9 - first, other))], axis=1
            )

        first, second = np.split(_drawn(draw, count, held_out), 2, axis=1)
        digits, read = added(first, second)
        asked, none = first < 0, np.zeros_like(first)
        tokens = [np.where(asked, ID[ASK], side + _DIGIT) for side in (first, second)]
        answers = np.where(asked, 0, digits + _DIGIT)
        row, labels, difficulties = (
            np.stack(pair, axis=2).reshape(count, length) for pair in (tokens, (none, answers), (none, read))
        )
        return row, labels, difficulties


def added(first_NP: np.ndarray, second_NP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add numbers, the lowest digits first, and say how many pairs decide each digit of the sum.

    Args:
        first_NP: int digits of numbers, one after the other; -1 before each of them.
        second_NP: likewise.

    Returns:
        (digits of the sums, the last carry left out; pairs that decide them), both [N, P], 0 where the numbers are -1.
    """
    rows, most = first_NP.shape
    carry, before = np.zeros(rows, int), np.zeros(rows, int)  # before: pairs read to know the carry
    digits, read = np.zeros((2, rows, most), int)
    for place in range(most):
        inside, pair = first_NP[:, place] >= 0, first_NP[:, place] + second_NP[:, place]
        digits[:, place] = np.where(inside, (pair + carry) % 10, 0)
        read[:, place] = np.where(inside, 1 + before, 0)
        carry = np.where(inside, (pair + carry) // 10, 0)
        before = np.where(inside, 1 + np.where(pair == 9, before, 0), 0)
    return digits, read


def task_of(name: str) -> Task:
    """Return the task of a name such as ``pointer-8``: its kind, and the size of its largest question.

    Raises:
        ValueError: there is none of that name.
    """
    kind, _, largest = name.partition("-")
    if kind not in KINDS or not largest.isdecimal() or int(largest) < 2:
        raise ValueError(f"{name!r} is not KIND-LARGEST with a kind of {', '.join(KINDS)}")
    if kind == "pointer" and int(largest) > MOST_HOPS:
        raise ValueError(f"{name!r} has more than {MOST_HOPS} hops")
    if kind == "pointer":
        return Pointer(int(largest))
    return Addition(int(largest)) if kind == "addition" else Word(int(kind[1]), int(largest))
