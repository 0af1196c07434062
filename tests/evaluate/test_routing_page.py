"""routing.html: well-formed, self-contained, and true to the routing that it shows."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from evaluation_examples import TEXT, Bytes
from matplotlib.colors import to_rgb

from mor_jax.evaluate.colours import depth_colours, luminance
from mor_jax.evaluate.html import Section, routing_page, token_text
from mor_jax.evaluate.routing import RoutedRow


class _Page(HTMLParser):
    """Collects text, classes and titles of the token spans, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.spans: list[list] = []
        self.resources: list[str] = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.resources += [name for name in values if name in ("src", "href")]
        if tag == "meta":
            return
        self.open.append(tag)
        if "title" in values:
            self.spans.append([values["class"], values["title"], ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.spans and self.open and self.open[-1] == "span" and "div" in self.open:
            self.spans[-1][2] += data


def _row(tokens, recursions=2):
    count = len(tokens)
    depth_T = np.arange(count) % (recursions + 1)
    selected_RT = np.arange(recursions)[:, None] < depth_T
    active_RT = np.arange(recursions)[:, None] <= depth_T
    scores_RT = np.where(active_RT, np.linspace(-1, 1, recursions * count).reshape(recursions, count), 0)
    return RoutedRow(np.array(tokens), depth_T, scores_RT, np.where(selected_RT, 0.05, 0), active_RT, selected_RT)


def _parse(page):
    parser = _Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def _page(tokens):
    return routing_page("run <&>", [Section("threshold", "causal", [_row(tokens)])], Bytes())


def test_every_token_appears_once_in_order_with_its_depth_and_scores():
    tokens = Bytes().encode(TEXT)
    row = _row(tokens)
    spans = _parse(_page(tokens)).spans
    assert [span[0] for span in spans] == [f"d{depth}" for depth in row.depth_T]
    assert "".join(span[2] for span in spans).replace("\u21b5\n", "\n") == "".join(
        chr(b) if b < 128 else f"\\x{b:02x}" for b in tokens
    )
    assert spans[1][1] == (
        f"token {tokens[1]} at position 1: depth 1 of 2\n"
        f"recursion 1: score {row.scores_RT[0, 1]:+.3f}, computed, gate 0.0500\n"
        f"recursion 2: score {row.scores_RT[1, 1]:+.3f}, skipped"
    )
    assert spans[0][1].endswith("recursion 2: already left")


def test_the_page_is_escaped_and_needs_nothing_from_outside():
    page = _page(Bytes().encode("<script>alert(1)</script> & \"quotes\" 'single'"))
    assert "<script" not in page and "run &lt;&amp;&gt;" in page
    assert _parse(page).resources == []
    assert "http" not in page and "@import" not in page and "url(" not in page


def test_every_byte_and_special_token_is_valid_html():
    page = _page([*range(256), 256, 259])
    forbidden = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
    assert not re.search(forbidden, page.replace("\n", ""))
    page.encode("utf-8")
    spans = _parse(page).spans
    assert len(spans) == 258 and all(span[2] for span in spans)
    assert spans[0][2] == "\u2400" and spans[0xE2][2] == "\\xe2" and spans[256][2] == "\u2016"
    assert spans[257][2] == "<259>"


@pytest.mark.parametrize(
    ("piece", "text"),
    [
        (b" the", " the"),
        ("naïve".encode(), "naïve"),
        ("\u2014".encode()[:2], "\\xe2\\x80"),
        (b"\x7f\xc2\x85", "\\u007f\\u0085"),
        ("\ufffe".encode(), "\\ufffe"),
        ("\U0001f600".encode(), "\U0001f600"),
    ],
)
def test_token_text(piece, text):
    assert token_text(piece) == text


@pytest.mark.parametrize("recursions", [1, 2, 3, 4, 8])
def test_colours_are_ordered_in_lightness_and_readable(recursions):
    colours = depth_colours(recursions)
    assert len(set(colours)) == recursions + 1
    light = [(luminance(to_rgb(b)), luminance(to_rgb(f))) for b, f in colours]
    assert [b for b, _ in light] == sorted((b for b, _ in light), reverse=True)
    assert all((max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5 for pair in light)


def test_frequent_tokens_are_listed_by_mean_depth():
    page = _page([65, 66] * 12)
    assert "<td><code>A</code></td><td>1.00</td><td>12</td>" in page
    assert "<table" not in _page([65, 66])
