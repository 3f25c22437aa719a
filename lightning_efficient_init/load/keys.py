"""Which name of the model a checkpoint key stands for."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias

from lightning_efficient_init.errors import CheckpointError, shorten

KeyMap: TypeAlias = Mapping[str, str | None] | Callable[[str], str | None]

RENAMES = "load_checkpoint(model, path, key_map=...)"  # said in errors, also of ways to load that have no key_map

_WRAPPER_SEGMENTS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_KNOWN_PREFIXES = ("model.", "module.", "_forward_module.", "state_dict.", "net.", "transformer.")


def match_keys(
    checkpoint_keys: Collection[str], model_keys: Iterable[str], key_map: KeyMap | None, *, path: str
) -> dict[str, str]:
    """Map checkpoint keys to model keys.

    ``torch.compile`` and wrappers leave segments such as ``_orig_mod.`` in names; they never count. If then no key of
    the checkpoint is a name of the model, a prefix that one side has and the other lacks is taken off, provided that
    exactly one choice fits.

    Args:
        checkpoint_keys: Keys as they stand in the checkpoint.
        model_keys: Names of the model's tensors.
        key_map: The user's own mapping. A key that a ``Mapping`` lacks keeps its name; ``None`` drops a key.
        path: The checkpoint, for errors.

    Returns:
        Checkpoint key to model key, for every key that is not dropped. Keys that fit nothing keep their own name.

    Raises:
        CheckpointError: Several prefixes fit equally well, or two keys end up at one name.
        TypeError: ``key_map`` is of another kind, or gives something other than names.
    """
    names = set(model_keys)
    if key_map is None and names.issuperset(checkpoint_keys):
        return {key: key for key in checkpoint_keys}
    model_names = {strip_wrappers(name): name for name in names}
    if key_map is not None:
        mapped = _apply(checkpoint_keys, key_map)
        found = {key: name if name in names else model_names.get(name, name) for key, name in mapped.items()}
        return _unique(found, path)
    plain = {key: strip_wrappers(key) for key in checkpoint_keys}
    rename = _prefix_change(set(plain.values()), set(model_names), path)
    return _unique({key: model_names.get(rename(name), rename(name)) for key, name in plain.items()}, path)


def rename_modules(metadata: Any, names: Mapping[str, str]) -> dict[str, Any] | None:
    """Let what a state dict says of its modules (their versions) follow the renaming of its keys.

    Args:
        metadata: Name of a module in the checkpoint to what is said of it; what is no mapping is passed over.
        names: Checkpoint key to model key.
    """
    if not isinstance(metadata, Mapping) or not metadata:
        return None
    if all(key == name for key, name in names.items()):
        return dict(metadata)
    renamed: dict[str, Any] = {}
    for key, name in names.items():
        old, new = key.split("."), name.split(".")
        while old and new and old.pop() == new.pop():
            module = ".".join(new)
            if module in renamed:
                break
            if (found := metadata.get(".".join(old))) is not None:
                renamed[module] = found
    return renamed


def _apply(keys: Iterable[str], key_map: KeyMap) -> dict[str, str]:
    if not isinstance(key_map, Mapping) and not callable(key_map):
        raise TypeError(f"key_map: expected a mapping or a function, found {type(key_map).__name__}.")
    renamed = {key: key_map.get(key, key) if isinstance(key_map, Mapping) else key_map(key) for key in keys}
    for key, name in renamed.items():
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"key_map: expected a name of the model for the key {key!r}, or None to drop it; found {name!r}."
            )
    return {key: name for key, name in renamed.items() if name is not None}


def _unique(mapping: dict[str, str], path: str) -> dict[str, str]:
    seen: dict[str, str] = {}
    for key, name in mapping.items():
        if name in seen:
            raise CheckpointError(
                f"{path}: expected one key for each tensor of the model, found {seen[name]!r} and {key!r}, which stand "
                f"for the same one, {name!r}. Map one of them to None: {RENAMES}."
            )
        seen[name] = key
    return mapping


def strip_wrappers(key: str) -> str:
    """A name as it is without ``torch.compile``, FSDP and activation checkpointing around modules."""
    return _WRAPPER_SEGMENTS.sub("", key)


def _prefix_change(found: set[str], wanted: set[str], path: str) -> Callable[[str], str]:
    """The one change of prefix that turns checkpoint keys into model names; none if any key fits as it is."""
    if not found or not wanted or found & wanted:
        return _identity
    changes = _fitting_changes(found, wanted)
    if not changes:
        return _identity
    if len(changes) > 1:
        raise CheckpointError(
            f"{path}: expected names of the model ({shorten(sorted(wanted), 3)}), found none of them but "
            f"{shorten(sorted(found), 3)}, and several changes of prefix fit: "
            f"{', '.join(str(change) for change in changes)}. Say which one is meant: {RENAMES}."
        )
    return changes[0]


class _PrefixChange:
    """Take ``old`` off the front of a key and put ``new`` there."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def __call__(self, key: str) -> str:
        return self.new + key[len(self.old) :] if key.startswith(self.old) else key

    def __str__(self) -> str:
        return f"{self.old!r} -> {self.new!r}"


def _identity(key: str) -> str:
    return key


def _fitting_changes(found: set[str], wanted: set[str]) -> list[_PrefixChange]:
    """Changes that provide the whole model; failing that, known prefixes that provide a part of it."""
    anchor = min(wanted, key=lambda name: (-name.count("."), name))
    shorter = {key[: -len(anchor)] for key in found if key.endswith(f".{anchor}")}
    candidates = [_PrefixChange(prefix, "") for prefix in sorted(shorter)]
    tail = min(found, key=lambda name: (-name.count("."), name))
    longer = {name[: -len(tail)] for name in wanted if name.endswith(f".{tail}")}
    candidates += [_PrefixChange("", prefix) for prefix in sorted(longer)]
    whole = [change for change in candidates if wanted <= {change(key) for key in found}]
    if whole:
        return whole
    known = [_PrefixChange(prefix, "") for prefix in _KNOWN_PREFIXES] + [_PrefixChange("", p) for p in _KNOWN_PREFIXES]
    return [change for change in known if wanted & {change(key) for key in found}]
