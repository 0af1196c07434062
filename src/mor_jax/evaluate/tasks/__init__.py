"""Tasks of lm-eval over evaluation sets in a local folder."""
