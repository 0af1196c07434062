"""One colour per depth, for the page and the plots: cividis, ordered in lightness and safe for colour-blind readers."""

from collections.abc import Sequence

_EVEN_CONTRAST = 0.179
"""Relative luminance at which black and white text contrast equally, 4.58 to 1."""
_NO_PASS = (0.93, 0.93, 0.93)
_LIGHTEST = 0.9


def depth_colours(recursions: int) -> list[tuple[str, str]]:
    """Return (background, foreground) as #rrggbb for depths 0..R, light to dark; contrast is at least 4.5 to 1."""
    import matplotlib as mpl  # slow to import, and training and serving need it at most once

    shares = [depth / max(recursions - 1, 1) for depth in range(recursions)]
    backgrounds = [_NO_PASS, *(mpl.colormaps["cividis"](_LIGHTEST - share * _LIGHTEST) for share in shares)]
    return [(_hex(b), "#000000" if luminance(b) > _EVEN_CONTRAST else "#ffffff") for b in backgrounds]


def luminance(colour: Sequence[float]) -> float:
    """Return the relative luminance of an sRGB colour with channels in [0, 1] (WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _hex(colour: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in colour[:3])
