"""Formats of weights that a conversion writes."""

from typing import Literal

Target = Literal["mor", "hf", "official"]
"""`mor`: weights of this project; `hf`: plain Llama with recursions unrolled; `official`: the PyTorch release."""
