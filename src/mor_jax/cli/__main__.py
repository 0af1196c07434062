"""``python -m mor_jax.cli``: the console command without its script."""

import sys

from mor_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
