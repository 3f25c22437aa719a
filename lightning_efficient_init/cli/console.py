"""How the commands write: sizes, dtypes, names that come from files, and tables."""

from __future__ import annotations

import json
import math
import shutil
import sys
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from lightning_efficient_init.checkpoint.wording import show

_WIDTH_IN_FILES = 220
_MAX_LEVELS = 50  # of nested containers


def console() -> Console:
    """Writes to standard output: as wide as the terminal is, and wide enough where there is none."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH_IN_FILES
    return _Console(width=width, highlight=False, emoji=False)


class _Console(Console):
    """One that leaves it to `main` what to do when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def table(*headings: str, title: str | None = None, numbers: tuple[str, ...] = ()) -> Table:
    """An empty table without frames.

    Args:
        headings: The columns.
        title: What stands above it.
        numbers: Headings of the columns that are aligned to the right.
    """
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        result.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold")
    return result


def plain(text: object) -> Text:
    """What a file says, to be shown as it is: no markup, and nothing that a terminal would obey."""
    line = str(text)
    return Text(line if line.isprintable() else ascii(line)[1:-1])


def size(num_bytes: int) -> str:
    """Bytes in decimal units, as "13.48 GB"."""
    return decimal(num_bytes, precision=2)


def dtype_name(dtype: torch.dtype) -> str:
    """As "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def print_json(content: Any) -> None:
    """Write to standard output as JSON, which has neither infinity nor NaN."""
    console().file.write(json.dumps(content, indent=1, allow_nan=False) + "\n")


def jsonable(value: Any) -> Any:
    """A value from a checkpoint for JSON: numbers, strings, lists and dicts as they are, all else in words.

    A container that comes up again is spelled out once: the file may hold one that contains itself.
    """
    return _jsonable(value, set(), 0)


def _jsonable(value: Any, seen: set[int], level: int) -> Any:
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if not isinstance(value, (dict, list, tuple)) or id(value) in seen or level > _MAX_LEVELS:
        return show(value)
    seen.add(id(value))
    if isinstance(value, dict):
        return {str(key): _jsonable(item, seen, level + 1) for key, item in value.items()}
    return [_jsonable(item, seen, level + 1) for item in value]
