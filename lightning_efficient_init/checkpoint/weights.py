"""Which part of a checkpoint's tree is the model's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from lightning_efficient_init.checkpoint.entry import Entry
from lightning_efficient_init.checkpoint.tree import holds_leaf
from lightning_efficient_init.checkpoint.wording import explain, listing, show
from lightning_efficient_init.errors import CheckpointNotFoundError, UnsupportedCheckpointError

_LIGHTNING: Final = "state_dict"
_FABRIC: Final = "model"
_EXTRA_STATE: Final = "_extra_state"


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of one model in a checkpoint.

    Attributes:
        entries: Key to `Entry`, or to another object for ``_extra_state`` keys and for what is no state of a module.
        key: Where they are in the tree; None for the tree itself.
        metadata: The state dict's ``_metadata`` (module versions), or None.
    """

    entries: Mapping[str, Any]
    key: str | None
    metadata: Any


def weights_of(tree: Any, key: str | None = None, *, path: str) -> Weights:
    """Takes a model's weights out of a checkpoint's tree.

    Args:
        tree: The tree, as `index_tree` gives it.
        key: The key to look under, as in ``fabric.load(path, {"net": model})``. None finds the only choice:
            "state_dict" (Lightning), the tree itself, "model" (Fabric), or the one other key with a dict of tensors.
            All but the last may have other values beside the tensors (an epoch, say), as ``load_state_dict`` allows.
        path: Path of the checkpoint, for errors.

    Raises:
        CheckpointNotFoundError: There are no weights, or none under that key.
        UnsupportedCheckpointError: Several keys hold weights, and none was asked for.
    """
    if key is None:
        key = _find_key(tree, path)
    elif not isinstance(tree, Mapping) or key not in tree:
        present = listing(tree) if isinstance(tree, Mapping) else show(tree)
        raise CheckpointNotFoundError(
            explain(path, expected=f"the key {key!r}", found=present, todo="Ask for one of these keys.")
        )
    found = tree if key is None else tree[key]
    if isinstance(found, torch.nn.Module):
        found = found.state_dict(keep_vars=True)
    if not isinstance(found, Mapping) or (found and not _is_loadable(found)):
        raise CheckpointNotFoundError(
            explain(
                path,
                expected=f"a state dict under {key!r}" if key is not None else "a state dict",
                found=show(found),
                todo="Ask for a key that holds a dict of tensors.",
            )
        )
    return Weights(found, key, getattr(found, "_metadata", None))


def _find_key(tree: Any, path: str) -> str | None:
    if isinstance(tree, torch.nn.Module) or (isinstance(tree, Mapping) and not tree):
        return None
    if not isinstance(tree, Mapping):
        raise _without_weights(path, show(tree))
    if isinstance(tree.get(_LIGHTNING), Mapping) and (not tree[_LIGHTNING] or _is_loadable(tree[_LIGHTNING])):
        return _LIGHTNING
    others = [(key, value) for key, value in tree.items() if not isinstance(value, Entry)]
    keys = [key for key, value in others if isinstance(key, str) and not _is_extra(key) and holds_weights(value)]
    if _FABRIC in keys or (_is_loadable(tree.get(_FABRIC)) and (not keys or _is_mostly_tensors(tree[_FABRIC]))):
        return _FABRIC
    if len(keys) == 1:
        return keys[0]
    if keys:
        raise UnsupportedCheckpointError(
            explain(
                path,
                expected="the weights of one model",
                found=f"weights under the keys {listing(keys)}",
                todo=f'Load the one you mean with fabric.load(path, {{"{keys[0]}": model}}), or save them apart.',
            )
        )
    if _is_loadable(tree):
        return None
    raise _without_weights(path, f"the keys {listing(tree)}")


def holds_weights(value: Any) -> bool:
    """Whether it is a module, or nothing but the states of modules: tensors, and what else a state dict may hold."""
    return isinstance(value, torch.nn.Module) or (isinstance(value, Mapping) and _is_state_dict(value))


def _is_loadable(value: Any) -> bool:
    """Whether it holds weights, or tensors by name beside values without any, which somebody has put there."""
    if holds_weights(value):
        return True
    if not (isinstance(value, Mapping) and all(isinstance(name, str) for name in value)):
        return False
    others = [item for name, item in value.items() if not is_state(name, item)]
    return any(isinstance(item, Entry) for item in value.values()) and not holds_leaf(others, Entry)


def _is_mostly_tensors(value: Mapping[str, Any]) -> bool:
    """Whether it may be a state dict to which something was added, and no configuration with a tensor in it."""
    return sum(isinstance(item, Entry) for item in value.values()) > len(value) / 2


def _is_state_dict(value: Mapping[Any, Any]) -> bool:
    """Whether all keys are names and all values states of modules."""
    others = [(name, item) for name, item in value.items() if not (isinstance(item, Entry) and isinstance(name, str))]
    return len(others) < len(value) and all(isinstance(name, str) and is_state(name, item) for name, item in others)


def is_state(name: str, item: Any) -> bool:
    """A tensor; a list of tensors, as metrics of torchmetrics have; or an extra state (any object, by contract)."""
    if isinstance(item, list):
        return all(isinstance(member, Entry) for member in item)
    return isinstance(item, Entry) or _is_extra(name)


def _is_extra(name: str) -> bool:
    return name.endswith(_EXTRA_STATE)


def _without_weights(path: str, found: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        explain(path, expected="a state dict somewhere in it", found=found, todo="Save the model's state_dict().")
    )
