"""How an error about a checkpoint reads: file, tensor, expected, found, next step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

DOWNLOAD_AGAIN = "Copy or download the file again, or write it again from the model."
SAVE_AGAIN = "Write the checkpoint again with torch.save or safetensors."


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


def shorten(text: object, limit: int = 200) -> str:
    """Cuts what a file says to a length fit for an error message."""
    line = str(text)
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def name_of(path: Iterable[Any]) -> str:
    """Names a place in a checkpoint's tree: the keys on the way to it, joined by slashes."""
    return "/".join(shorten(key) for key in path) or "(the checkpoint itself)"


def listing(names: Iterable[Any], limit: int = 20) -> str:
    """Lists names for an error message, and says how many were left out."""
    items = [repr(shorten(name)) for name in names]
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest if items else "nothing"
