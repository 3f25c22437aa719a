"""Walking a checkpoint's tree: containers and objects, with leaves of one type replaced.

A tree comes from a file, so it may contain itself, or be a small graph that spells out to an enormous tree. Every
object is therefore visited once, and what was shared stays shared.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch

from lightning_efficient_init.checkpoint.entry import Entry

Path = tuple[Any, ...]

_ATOMS: Final[frozenset[type]] = frozenset(
    {str, int, float, bool, type(None), bytes, complex, torch.dtype, torch.device, torch.Size, Entry}
)
_BARE: Final = frozenset({dict, list})  # which have no attributes
_OPAQUE: Final = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)


def map_leaves(tree: Any, leaf_type: type[Any] | tuple[type[Any], ...], replace: Callable[[Any, Path], Any]) -> Any:
    """Copies a tree with every leaf of one type replaced.

    Dictionaries, lists, tuples and their subclasses (``OrderedDict`` with its attributes, named tuples) keep their
    type; objects with attributes are copied where a leaf is below them, and shared where none is. The tree itself is
    left alone. Sets hold no leaves.

    Args:
        tree: What to copy.
        leaf_type: Type, or types, of the leaves.
        replace: Called once for each leaf object with the leaf and the keys on the way to it.
    """
    return _Mapping(leaf_type, replace).visit(tree, ())


def holds_leaf(tree: Any, leaf_type: type[Any] | tuple[type[Any], ...]) -> bool:
    """Whether ``tree`` is a leaf, or has one anywhere below it."""
    return _Mapping(leaf_type, lambda leaf, _: leaf).has_leaf_below(tree)


class _Mapping:
    """One walk: what has been seen so far, and what became of it."""

    def __init__(self, leaf_type: type[Any] | tuple[type[Any], ...], replace: Callable[[Any, Path], Any]) -> None:
        self._leaf_type = leaf_type
        self._replace = replace
        self._atoms = _ATOMS.difference(leaf_type if isinstance(leaf_type, tuple) else (leaf_type,))
        self._seen: dict[int, tuple[Any, Any]] = {}  # id -> (the object, kept alive; what replaces it)

    def visit(self, node: Any, path: Path) -> Any:
        if type(node) in self._atoms:
            return node
        seen = self._seen.get(id(node))
        if seen is not None:
            return seen[1]
        if isinstance(node, self._leaf_type):
            return self._remember(node, self._replace(node, path))
        if isinstance(node, dict):
            return self._visit_dict(node, path)
        if isinstance(node, list):
            return self._visit_list(node, path)
        return self._visit_tuple(node, path) if isinstance(node, tuple) else self._visit_object(node, path)

    def _remember(self, node: Any, result: Any) -> Any:
        self._seen[id(node)] = (node, result)
        return result

    def _visit_dict(self, node: dict[Any, Any], path: Path) -> Any:
        plain = type(node) is dict or type(node) is OrderedDict
        result = self._remember(node, type(node)() if plain else _shallow_copy(node))
        for key, value in node.items():
            result[key] = value if type(value) in self._atoms else self.visit(value, (*path, key))
        self._visit_attributes(node, result, path)
        return result

    def _visit_list(self, node: list[Any], path: Path) -> Any:
        result = self._remember(node, [] if type(node) is list else _shallow_copy(node))
        result[:] = [self.visit(value, (*path, index)) for index, value in enumerate(node)]
        self._visit_attributes(node, result, path)
        return result

    def _visit_tuple(self, node: tuple[Any, ...], path: Path) -> Any:
        items = [self.visit(value, (*path, index)) for index, value in enumerate(node)]
        if all(new is old for new, old in zip(items, node, strict=True)):
            return self._remember(node, node)
        make: Callable[[Iterable[Any]], Any] = getattr(type(node), "_make", type(node))
        return self._remember(node, make(items))

    def _visit_object(self, node: Any, path: Path) -> Any:
        if not self.has_leaf_below(node):
            return self._remember(node, node)
        result = self._remember(node, _shallow_copy(node))
        self._visit_attributes(node, result, path)
        return result

    def _visit_attributes(self, node: Any, result: Any, path: Path) -> None:
        if result is not node and type(node) not in _BARE:
            for name, value in _attributes(node).items():
                result.__dict__[name] = self.visit(value, (*path, name))

    def has_leaf_below(self, node: Any) -> bool:
        """Whether ``node`` is a leaf, or has one below it."""
        waiting, known = [node], {id(node)}
        while waiting:
            current = waiting.pop()
            if isinstance(current, self._leaf_type):
                return True
            for child in _children(current):
                if type(child) not in self._atoms and id(child) not in known:
                    known.add(id(child))
                    waiting.append(child)
        return False


def _children(node: Any) -> list[Any]:
    below = list(_attributes(node).values())
    if isinstance(node, dict):
        below += node.values()
    elif isinstance(node, list | tuple):
        below += node
    return below


def _attributes(node: Any) -> dict[str, Any]:
    attributes = None if isinstance(node, _OPAQUE) else getattr(node, "__dict__", None)
    return attributes if isinstance(attributes, dict) else {}


def _shallow_copy(node: Any) -> Any:
    """Copies one object; one that will not be copied is changed in place, as its owner is."""
    try:
        return copy.copy(node)
    except Exception:
        return node
