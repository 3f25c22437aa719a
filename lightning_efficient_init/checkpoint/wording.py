"""How an error about a checkpoint reads: file, tensor, expected, found, next step."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

from lightning_efficient_init.checkpoint.entry import Entry

DOWNLOAD_AGAIN = "Copy or download the file again, or write it again from the model."
SAVE_AGAIN = "Write the checkpoint again with torch.save or safetensors."


class _Repr(reprlib.Repr):
    """Short, and with tensors as what they are."""

    def repr_Entry(self, entry: Entry, _: int) -> str:  # noqa: N802 (found by the type's name)
        return f"a tensor, {str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"


_REPR = _Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 200, 200, 100
_REPR.maxtuple = _REPR.maxlist = _REPR.maxdict = 8


def explain(file: str, *, expected: object, found: object, todo: str, tensor: str | None = None) -> str:
    """Puts an error into the house form.

    Args:
        file: Path of the file or folder.
        expected: What a sound checkpoint would have there.
        found: What is there.
        todo: What the reader can do next, as a sentence.
        tensor: Name of the tensor, where there is one.
    """
    subject = repr(str(file)) if tensor is None else f"{str(file)!r}, tensor {shorten(tensor)!r}"
    return f"{subject}: expected {expected}, found {found}. {todo}"


def show(value: object) -> str:
    """Writes a value from a file for an error message: short, and in no time even where its repr would never end."""
    return shorten(_REPR.repr(value))


def shorten(text: object, limit: int = 200) -> str:
    """Cuts what a file says to a length fit for an error message."""
    line = text if isinstance(text, str) else str(text) if isinstance(text, BaseException) else _REPR.repr(text)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def name_of(path: Iterable[Any]) -> str:
    """Names a place in a checkpoint's tree: the keys on the way to it, joined by slashes."""
    return "/".join(shorten(key) for key in path) or "(the checkpoint itself)"


def listing(names: Iterable[Any], limit: int = 20) -> str:
    """Lists names for an error message, and says how many were left out."""
    items = list(names)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(show, items[:limit])) + rest if items else "nothing"
