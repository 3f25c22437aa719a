"""The command line: ``efficient-init inspect | plan | bench``, also as ``python -m lightning_efficient_init``.

One file per command, each with two functions: `add_arguments` says what it takes, `run` does it. What they print
comes from functions that are there for Python, too: `contents.py`, `memory_plan.py`, `bench/`.
"""

from __future__ import annotations

from lightning_efficient_init.cli.main import main

__all__ = ["main"]
