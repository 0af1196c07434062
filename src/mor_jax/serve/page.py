"""The page at ``/``: one HTML file whose script talks to this server alone."""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from importlib import resources

from mor_jax.evaluate.colours import depth_colours


@dataclass(frozen=True)
class Page:
    """The page and the headers that go with it."""

    html: str
    headers: dict[str, str]


def make_page(model: str, passes: int, cuts: bool = True, chat: bool = False) -> Page:
    """Fill the page in.

    Args:
        model: name of the model.
        passes: over the shared block that a token takes at most.
        cuts: whether requests may cut the vocabulary.
        chat: whether the model has a chat template.

    Returns:
        The page; its headers allow the browser nothing but the page's own script and style, and this server.
    """
    html = resources.files("mor_jax.serve").joinpath("page.html").read_text(encoding="utf-8")
    rules = [
        f".d{depth} {{ background: {background}; color: {foreground}; }}"
        for depth, (background, foreground) in enumerate(depth_colours(passes))
    ]
    settings = json.dumps({"model": model, "passes": passes, "cuts": cuts, "chat": chat}).replace("<", "\\u003c")
    html = html.replace("/* DEPTH COLOURS */", "\n".join(rules)).replace("{} /* SETTINGS */", settings)
    policy = [
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'",
        f"script-src {_hash(html, 'script')}; style-src {_hash(html, 'style')}; img-src data:",
    ]
    return Page(html, {"Content-Security-Policy": "; ".join(policy), "X-Content-Type-Options": "nosniff"})


def _hash(html: str, tag: str) -> str:
    """The content security policy's name for the page's one element of this kind."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
