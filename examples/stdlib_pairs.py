"""Text pairs that are on any machine: names in Python's standard library, and what their docstrings say they do."""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

_SKIPPED = {"test", "tests", "idle_test"}
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Pair(NamedTuple):
    """A public class or function.

    Attributes:
        name: Its qualified name and its arguments in words: ``"json decoder JSON Decoder raw decode (s, idx)"``.
        summary: The first sentence of its docstring.
    """

    name: str
    summary: str


def stdlib_pairs(num_held_out: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """All pairs, shuffled: for training, and ``num_held_out`` for evaluation.

    No name and no summary occurs twice, so none of the held-out ones is in training.
    """
    shuffled = sorted(_distinct_pairs())
    random.Random(seed).shuffle(shuffled)
    return shuffled[num_held_out:], shuffled[:num_held_out]


@cache
def _distinct_pairs() -> tuple[Pair, ...]:
    by_name = {pair.name: pair for pair in _all_pairs()}
    return tuple({pair.summary: pair for pair in by_name.values()}.values())


def _all_pairs() -> Iterator[Pair]:
    """The sources are parsed, not imported: some modules of the library do things when they are imported."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[0] in sys.stdlib_module_names and not _SKIPPED & {*parts} and not _is_private(parts):
            module = [part for part in parts if part != "__init__"]
            yield from _pairs_in(ast.parse(path.read_text(encoding="utf-8")), module)


def _is_private(parts: tuple[str, ...]) -> bool:
    return any(part.startswith("_") and part != "__init__" for part in parts)


def _pairs_in(scope: ast.Module | ast.ClassDef, prefix: list[str]) -> Iterator[Pair]:
    for node in scope.body:
        if isinstance(node, _Definition) and not node.name.startswith("_"):
            qualified = [*prefix, node.name]
            if summary := _summary(node):
                yield Pair(" ".join(map(_in_words, qualified)) + _arguments(node), summary)
            if isinstance(node, ast.ClassDef):
                yield from _pairs_in(node, qualified)


def _in_words(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name.replace("_", " ")).strip()


def _arguments(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return ""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return f" ({', '.join(name for name in names if name not in {'self', 'cls'})})"


def _summary(node: _Definition) -> str | None:
    """The first sentence, if it says anything."""
    docstring = (ast.get_docstring(node) or "").strip()
    sentence = " ".join(re.split(r"(?<=[.!?])\s|\n\s*\n", docstring, maxsplit=1)[0].split())
    return sentence if len(sentence.split()) >= 3 and ">>>" not in sentence else None
