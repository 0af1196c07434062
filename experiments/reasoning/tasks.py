"""Questions whose difficulty is known, from a seed: pointers, words over S3 and S5, addition; two of them in each row.

An answer token's difficulty says what must be done to know it, given all tokens before it: hops, group elements that
are composed, or pairs of digits that are read. Held-out questions are those whose content falls into an eighth of all
hashes; training never makes one, whatever the seed. NumPy only. Letters: N rows, W tokens of a question.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

Kind = Literal["pointer", "s3", "s5", "addition"]
KINDS: tuple[Kind, ...] = ("pointer", "s3", "s5", "addition")
MOST_HOPS = 8
END, UNKNOWN, ASK, IS, PLUS = "<|endoftext|>", "<unk>", "?", "=", "+"
DIGITS = tuple("0123456789")
HOPS = tuple(f"h{count}" for count in range(1, MOST_HOPS + 1))
NODES = tuple(f"n{node}" for node in range(2 * MOST_HOPS))
ELEMENTS = tuple(f"e{element}" for element in range(120))
WORDS = (END, UNKNOWN, ASK, IS, PLUS, *DIGITS, *HOPS, *NODES, *ELEMENTS)
"""The vocabulary; a token's id is its place."""
ID = {word: token for token, word in enumerate(WORDS)}
_DIGIT, _HOP, _NODE, _ELEMENT = ID[DIGITS[0]], ID[HOPS[0]] - 1, ID[NODES[0]], ID[ELEMENTS[0]]
_HELD_OUT_ONE_OF = np.uint64(8)

Arrays = tuple[np.ndarray, ...]
Generator = np.random.Generator


def is_held_out(contents_NX: np.ndarray) -> np.ndarray:
    """Which questions, by what they are made of, training never sees: bool [N]."""
    hashes = np.zeros(len(contents_NX), np.uint64)
    for column in contents_NX.T.astype(np.uint64):
        hashes = (hashes ^ column) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32) & (_HELD_OUT_ONE_OF - np.uint64(1)) == 0


class Task(Protocol):
    """Makes what rows hold: first what the questions of a row share, then questions."""

    @property
    def smallest(self) -> int:
        """Size of the smallest question."""
        ...

    @property
    def largest(self) -> int:
        """Size of the largest question."""
        ...

    @property
    def longest_row(self) -> int:
        """Tokens of a row of the two largest questions."""
        ...

    def shared(self, generator: Generator, rows: int, held_out: bool) -> tuple[np.ndarray, Any]:
        """Return the tokens [N, S] before the questions, and what these need to know of them."""
        ...

    def questions(self, generator: Generator, known: Any, sizes_N: np.ndarray, held_out: bool) -> Arrays:
        """Return one question for each row: tokens [N, W], difficulties [N, W] (0: no answer), lengths [N]."""
        ...


def _drawn(draw: Callable[[np.ndarray], np.ndarray], split_N: np.ndarray, held_out: bool) -> np.ndarray:
    """Draw contents until all are of the wanted part.

    Args:
        draw: gives the contents of the rows of these numbers.
        split_N: bool: whether a row's content is of one part only.
        held_out: the part.
    """
    contents_NX = draw(np.arange(len(split_N)))
    while (wrong := np.flatnonzero(split_N & (is_held_out(contents_NX) != held_out))).size:
        contents_NX[wrong] = draw(wrong)
    return contents_NX


@dataclass(frozen=True)
class Pointer:
    """A cycle through 2 x ``largest`` nodes, told in any order; a question names a node and how many hops to go.

    One cycle: no start comes back to itself, so every hop counts. A cycle is held out as a whole.
    """

    largest: int
    smallest: int = 1

    @property
    def longest_row(self) -> int:
        """Tokens of a row."""
        return 4 * self.largest + 2 * 5

    def shared(self, generator: Generator, rows: int, held_out: bool) -> tuple[np.ndarray, Any]:
        """Return the edges in random order; known is the cycle from node 0 on."""
        nodes = np.arange(2 * self.largest)

        def draw(of: np.ndarray) -> np.ndarray:
            others = generator.permuted(np.tile(nodes[1:], (len(of), 1)), axis=1)
            return np.concatenate([np.zeros((len(of), 1), others.dtype), others], axis=1)

        cycle = _drawn(draw, np.ones(rows, bool), held_out)
        order = generator.permuted(np.tile(nodes, (rows, 1)), axis=1)
        ends = (np.take_along_axis(side, order, axis=1) for side in (cycle, np.roll(cycle, -1, axis=1)))
        return np.stack(list(ends), axis=2).reshape(rows, -1) + _NODE, cycle

    def questions(self, generator: Generator, known: Any, sizes_N: np.ndarray, held_out: bool) -> Arrays:
        """Return ``? hops start = answer``."""
        rows, nodes = known.shape
        places = generator.integers(nodes, size=rows)
        start, answer = (known[np.arange(rows), place % nodes] for place in (places, places + sizes_N))
        same = np.ones(rows, int)
        tokens = np.stack([ID[ASK] * same, _HOP + sizes_N, _NODE + start, ID[IS] * same, _NODE + answer], axis=1)
        difficulties = np.stack([*(0 * same for _ in range(4)), sizes_N], axis=1)
        return tokens, difficulties, 5 * same


@dataclass(frozen=True)
class Word:
    """A word of up to ``largest`` elements of the symmetric group on ``degree`` letters, and their product.

    A word of one element is in both parts: there are too few to hold any out.
    """

    degree: int
    largest: int
    smallest: int = 1

    @property
    def longest_row(self) -> int:
        """Tokens of a row."""
        return 2 * (self.largest + 3)

    def shared(self, generator: Generator, rows: int, held_out: bool) -> tuple[np.ndarray, Any]:
        """Return nothing: words share nothing."""
        return np.zeros((rows, 0), int), None

    def questions(self, generator: Generator, known: Any, sizes_N: np.ndarray, held_out: bool) -> Arrays:
        """Return ``? element ... = product``; the elements act one after the other, the first one first."""
        table, places = _PRODUCTS[self.degree], np.arange(self.largest)

        def draw(of: np.ndarray) -> np.ndarray:
            words = generator.integers(len(table), size=(len(of), self.largest))
            return np.where(places < sizes_N[of, None], words, -1)

        words = _drawn(draw, sizes_N > 1, held_out)
        product = words[:, 0]
        for place in range(1, self.largest):
            product = np.where(place < sizes_N, table[product, words[:, place]], product)
        columns, ends = np.arange(self.largest + 3), sizes_N[:, None] + 1
        shown = np.pad(words, ((0, 0), (1, 2))) + _ELEMENT
        tokens = np.select(
            [columns == 0, columns < ends, columns == ends], [ID[ASK], shown, ID[IS]], product[:, None] + _ELEMENT
        )
        return tokens, np.where(columns == ends + 1, sizes_N[:, None], 0), sizes_N + 3


def _products(degree: int) -> np.ndarray:
    """Table of products: row a, column b is a, then b; elements in lexical order."""
    elements = list(itertools.permutations(range(degree)))
    number = {element: index for index, element in enumerate(elements)}
    return np.array([[number[tuple(b[letter] for letter in a)] for b in elements] for a in elements])


_PRODUCTS = {3: _products(3), 5: _products(5)}


@dataclass(frozen=True)
class Addition:
    """Two numbers of up to ``largest`` digits and their sum, the highest digit first.

    The share of digit pairs that add up to nine, which pass a carry on, is drawn for every question: chains of carries
    of every length occur.
    """

    largest: int
    smallest: int = 2

    @property
    def longest_row(self) -> int:
        """Tokens of a row."""
        return 2 * (3 * self.largest + 4)

    def shared(self, generator: Generator, rows: int, held_out: bool) -> tuple[np.ndarray, Any]:
        """Return nothing: sums share nothing."""
        return np.zeros((rows, 0), int), None

    def questions(self, generator: Generator, known: Any, sizes_N: np.ndarray, held_out: bool) -> Arrays:
        """Return ``? digits + digits = digits``, one digit more in the sum."""
        places = np.arange(self.largest)

        def draw(of: np.ndarray) -> np.ndarray:
            first, other = generator.integers(10, size=(2, len(of), self.largest))
            nines = generator.random((len(of), self.largest)) < generator.random((len(of), 1))
            second = np.where(nines, 9 - first, other)
            inside = places < sizes_N[of, None]
            return np.concatenate([np.where(inside, digits, -1) for digits in (first, second)], axis=1)

        first, second = np.split(_drawn(draw, np.ones(len(sizes_N), bool), held_out), 2, axis=1)
        answer, read = added(first, second, sizes_N)
        columns, sizes = np.arange(3 * self.largest + 4)[None], sizes_N[:, None]
        begins = (1, sizes + 2, 2 * sizes + 3)  # of both numbers and of the sum
        parts = [
            _placed(digits, columns - begin) for digits, begin in zip((first, second, answer), begins, strict=True)
        ]
        tokens = np.select(
            [columns == 0, columns <= sizes, columns == sizes + 1, columns < begins[2] - 1, columns == begins[2] - 1],
            [ID[ASK], parts[0] + _DIGIT, ID[PLUS], parts[1] + _DIGIT, ID[IS]],
            parts[2] + _DIGIT,
        )
        answered = (columns >= begins[2]) & (columns < 3 * sizes + 4)
        return tokens, np.where(answered, _placed(read, columns - begins[2]), 0), 3 * sizes_N + 4


def _placed(values_NX: np.ndarray, index_NW: np.ndarray) -> np.ndarray:
    """Values at places, and any of them where there is none."""
    return np.take_along_axis(values_NX, np.clip(index_NW, 0, values_NX.shape[1] - 1), axis=1)


def added(first_NX: np.ndarray, second_NX: np.ndarray, sizes_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add numbers, and say how many pairs of digits decide each digit of the sum, given the digits before it.

    A digit needs its own pair and, for the carry, the pairs below as far as they add up to nine. Where its own pair
    adds up to nine, it passes on the carry that it receives, which the digit before it shows already.

    Args:
        first_NX: digits, the highest first; what lies beyond the size does not count.
        second_NX: likewise.
        sizes_N: digits of both.

    Returns:
        (digits of the sum [N, X+1], pairs read [N, X+1]).
    """
    rows, most = first_NX.shape
    carry, below = np.zeros(rows, int), np.zeros(rows, int)  # below: pairs read to know what a pair carries
    answer, read = np.zeros((rows, most + 1), int), np.zeros((rows, most + 1), int)
    for place in reversed(range(most)):
        inside, pair = place < sizes_N, first_NX[:, place] + second_NX[:, place]
        answer[:, place + 1] = np.where(inside, (pair + carry) % 10, 0)
        read[:, place + 1] = np.where(inside, np.where(pair == 9, 1, 1 + below), 0)
        carry = np.where(inside, (pair + carry) // 10, 0)
        below = np.where(inside, 1 + np.where(pair == 9, below, 0), 0)
    answer[:, 0], read[:, 0] = carry, below
    return answer, read


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


def make_rows(
    task: Task, generator: Generator, rows: int, row_length: int, *, held_out: bool, easy_and_hard: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make rows: what their questions share, and two questions each.

    Args:
        task: of ``task_of``.
        generator: is moved.
        rows: N.
        row_length: tokens of a row, at least ``task.longest_row``.
        held_out: whether the questions are those that training never sees.
        easy_and_hard: whether one is of the smallest size and one of the largest, in any order, or both of any size.

    Returns:
        (tokens [N, row_length], difficulties alike, lengths [N]); zeros stand beyond the length.
    """
    sizes_N2 = generator.integers(task.smallest, task.largest + 1, size=(rows, 2))
    if easy_and_hard:
        sizes_N2 = generator.permuted(np.tile([task.smallest, task.largest], (rows, 1)), axis=1)
    before, known = task.shared(generator, rows, held_out)
    tokens, difficulties = np.zeros((2, rows, row_length), np.int32)
    tokens[:, : before.shape[1]] = before
    ends_N = np.full(rows, before.shape[1])
    for sizes_N in sizes_N2.T:
        asked, difficulty, lengths_N = task.questions(generator, known, sizes_N, held_out)
        row, column = np.nonzero(np.arange(asked.shape[1]) < lengths_N[:, None])
        tokens[row, ends_N[row] + column] = asked[row, column]
        difficulties[row, ends_N[row] + column] = difficulty[row, column]
        ends_N = ends_N + lengths_N
    return tokens, difficulties, ends_N
