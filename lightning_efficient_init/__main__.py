"""``python -m lightning_efficient_init``."""

from __future__ import annotations

import sys

from lightning_efficient_init.cli import main

if __name__ == "__main__":
    sys.exit(main())
