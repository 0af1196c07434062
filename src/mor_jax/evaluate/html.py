"""routing.html: text with every token coloured by the depth that the router gave it; one file, no scripts.

The colours come from cividis, which is ordered in lightness and safe for colour-blind readers; every token has its own
foreground and background, so that the page reads the same on a light and on a dark screen.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from mor_jax.evaluate.colours import depth_colours
from mor_jax.evaluate.passes import Tokenizer
from mor_jax.evaluate.routing import (
    RoutedRow,
    TokenDepth,
    deepest_and_shallowest,
    depth_by_token,
    tokens_per_depth,
)

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem 11rem; }
.row { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 1.5rem; }
.row span { border-radius: 3px; cursor: default; }
.row span:hover { outline: 2px solid CanvasText; }
.row span:hover::after {
  content: attr(title); position: fixed; left: 1rem; bottom: 1rem; z-index: 1; white-space: pre; padding: .6rem .9rem;
  font: 14px/1.5 ui-monospace, monospace; background: Canvas; color: CanvasText; border: 1px solid; border-radius: 6px;
}
.key span { padding: .15rem .6rem; margin-right: .4rem; border-radius: 3px; display: inline-block; }
table { border-collapse: collapse; } td, th { padding: .1rem 1rem .1rem 0; text-align: left; }
"""
_BLANKS = str.maketrans({"\n": "\u21b5", "\t": "\u21e5", " ": "\u2423"})
_TABLE_ROWS = 12
_TABLE_MINIMUM = 3


@dataclass(frozen=True)
class Section:
    """One selection mode's part of the page."""

    title: str
    note: str
    """What the mode means."""
    rows: Sequence[RoutedRow]


def routing_page(title: str, sections: Sequence[Section], tokenizer: Tokenizer) -> str:
    """Build the page.

    Args:
        title: heading, such as the run's name.
        sections: what to show, one per selection mode; each with at least one row.
        tokenizer: spells the tokens; bytes that are not UTF-8 are written as ``\\xe2``.

    Returns:
        A complete HTML document without external assets.
    """
    recursions = sections[0].rows[0].recursions
    rules = [
        f".d{depth} {{ background: {background}; color: {foreground}; }}"
        for depth, (background, foreground) in enumerate(depth_colours(recursions))
    ]
    legend = "".join(f'<span class="d{depth}">{_passes(depth)}</span>' for depth in range(recursions + 1))
    body = "\n".join(_section(section, tokenizer) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}{chr(10).join(rules)}\n</style>\n</head>\n<body>\n"
        f"<h1>{html.escape(title)}</h1>\n"
        "<p>Every token is coloured by the number of passes through the shared block that the router gave it. "
        "Hover over a token for its raw score and gate at each recursion.</p>\n"
        f'<p class="key">{legend}</p>\n{body}\n</body>\n</html>\n'
    )


def token_text(piece: bytes) -> str:
    """Spell a token visibly: bytes that are no UTF-8 as ``\\xe2``, control characters as their pictures."""
    return "".join(_visible(c) for c in piece.decode("utf-8", errors="backslashreplace"))


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if 0x7F <= code < 0xA0 or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
        return f"\\u{code:04x}"  # HTML forbids these
    return character


def _section(section: Section, tokenizer: Tokenizer) -> str:
    shares = ", ".join(f"{_passes(d)}: {share:.1%}" for d, share in enumerate(tokens_per_depth(section.rows)) if share)
    rows = "\n".join(f'<div class="row">{_row(row, tokenizer)}</div>' for row in section.rows)
    return (
        f"<h2>{html.escape(section.title)}</h2>\n<p>{html.escape(section.note)}. Tokens by depth: {shares}.</p>\n"
        f"{rows}\n{_token_table(section, tokenizer)}"
    )


def _row(row: RoutedRow, tokenizer: Tokenizer) -> str:
    return "".join(_token(row, position, tokenizer) for position in range(len(row.tokens_T)))


def _spell(token: int, tokenizer: Tokenizer) -> str:
    if token == tokenizer.eos_id:
        return "\u2016"  # a double bar ends a document
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    return token_text(tokenizer.token_bytes(token)) or f"<{token}>"


def _token(row: RoutedRow, position: int, tokenizer: Tokenizer) -> str:
    depth, token = int(row.depth_T[position]), int(row.tokens_T[position])
    text = _spell(token, tokenizer).replace("\n", "\u21b5\n")
    lines = [f"token {token} at position {position}: depth {depth} of {row.recursions}"]
    lines += [_recursion_line(row, r, position) for r in range(row.recursions)]
    tooltip = "&#10;".join(html.escape(line) for line in lines)
    return f'<span class="d{depth}" title="{tooltip}">{html.escape(text)}</span>'


def _recursion_line(row: RoutedRow, r: int, position: int) -> str:
    score, gate = row.scores_RT[r, position], row.gates_RT[r, position]
    if not row.active_RT[r, position]:
        return f"recursion {r + 1}: already left"
    outcome = f"computed, gate {gate:.4f}" if row.selected_RT[r, position] else "skipped"
    return f"recursion {r + 1}: score {score:+.3f}, {outcome}"


def _token_table(section: Section, tokenizer: Tokenizer) -> str:
    entries = depth_by_token(section.rows, at_least=_TABLE_MINIMUM)
    deepest, shallowest = deepest_and_shallowest(entries, _TABLE_ROWS)
    if not deepest:
        return ""
    lines = "".join(
        f"<tr>{_table_cells(a, tokenizer)}{_table_cells(b, tokenizer)}</tr>"
        for a, b in zip(deepest, shallowest, strict=True)
    )
    heads = "".join(f"<th>{name}</th><th>mean depth</th><th>count</th>" for name in ("deepest", "shallowest"))
    return (
        f"<p>Tokens that occur at least {_TABLE_MINIMUM} times here, by mean depth:</p>\n"
        f"<table><tr>{heads}</tr>{lines}</table>"
    )


def _table_cells(entry: TokenDepth, tokenizer: Tokenizer) -> str:
    text = html.escape(
        _spell(entry.token, tokenizer).replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u2423")
    )
    return f"<td><code>{text}</code></td><td>{entry.mean_depth:.2f}</td><td>{entry.count}</td>"


def _passes(depth: int) -> str:
    return f"{depth} pass" if depth == 1 else f"{depth} passes"
