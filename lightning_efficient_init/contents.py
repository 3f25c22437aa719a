"""What a checkpoint holds, as a person asks: which tensors, of what size, and what else."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lightning_efficient_init.checkpoint import CheckpointTree, Entry, Weights, index_tree, map_leaves, weights_of
from lightning_efficient_init.checkpoint.weights import holds_weights, is_state
from lightning_efficient_init.errors import CheckpointError
from lightning_efficient_init.load.extents import extents_of, num_unique_bytes

_HYPERPARAMETERS: Final = ("hyper_parameters", "datamodule_hyper_parameters")
_MAX_CONFIG_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """What a checkpoint holds under one of its keys.

    Attributes:
        key: The key in the checkpoint, or None for the checkpoint itself.
        kind: "weights", "optimizer state", "tensors", or "values" where there are none.
        tensors: Name to entry, of all tensors in it.
        value: The object, with entries in place of tensors.
    """

    key: str | None
    kind: str
    tensors: Mapping[str, Entry]
    value: Any

    @property
    def num_bytes(self) -> int:
        """Bytes of the files that its tensors cover; what several of them share counts once."""
        return num_unique_bytes(extents_of(self.tensors.values()))


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds, from its headers alone.

    Attributes:
        path: What was asked for.
        format: Its format, in words.
        files: Absolute path of each file to its size in bytes.
        parts: What is under each of its keys.
        ties: Groups of names, within one part, that are the same elements of the same bytes.
        views: Groups of names, within one part, whose bytes overlap without being the same.
        hyperparameters: What a Lightning checkpoint says its model was built with, or the ``config.json`` of a Hugging
            Face folder; empty where neither is there.
    """

    path: str
    format: str
    files: Mapping[str, int]
    parts: Sequence[Part]
    ties: Sequence[tuple[str, ...]] = ()
    views: Sequence[tuple[str, ...]] = ()
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Sequence[Part]:
        """The parts that are models' weights; usually one."""
        return [part for part in self.parts if part.kind == "weights"]

    @property
    def has_optimizer_state(self) -> bool:
        """Whether an optimizer's state is in it."""
        return any(part.kind == "optimizer state" for part in self.parts)


def inspect_checkpoint(path: str | os.PathLike[str]) -> Contents:
    """Says what a checkpoint holds. Only headers are read, and no code from it runs.

    Args:
        path: A file or folder in any of the formats that ``load_checkpoint`` reads.

    Raises:
        CheckpointError: It cannot be read, see ``lightning_efficient_init.errors``.
    """
    found = index_tree(path)
    parts = list(_parts(found))
    ties, views = _shared(parts)
    return Contents(
        path=found.path,
        format=found.format,
        files={file: os.path.getsize(file) for file in found.files},
        parts=parts,
        ties=ties,
        views=views,
        hyperparameters=_hyperparameters(found),
    )


def _parts(found: CheckpointTree) -> Iterator[Part]:
    weights = _only_weights(found)
    if weights is not None and weights.key is None:
        yield Part(None, "weights", _tensors(found.tree), found.tree)
        yield from (_other_part(key, value) for key, value in weights.entries.items() if not is_state(key, value))
        return
    if not isinstance(found.tree, Mapping):
        yield _other_part(None, found.tree)
        return
    chosen = {} if weights is None else weights.entries
    for key, value in found.tree.items():
        if isinstance(key, str) and (holds_weights(value) or (value is chosen and len(chosen) > 0)):
            yield Part(key, "weights", _tensors(value), value)
        elif key not in _HYPERPARAMETERS:
            yield _other_part(str(key), value)


def _only_weights(found: CheckpointTree) -> Weights | None:
    """What is loaded if nobody says which; None where there are none, or those of several models."""
    try:
        return weights_of(found.tree, path=found.path)
    except CheckpointError:
        return None


def _other_part(key: str | None, value: Any) -> Part:
    tensors = _tensors(value)
    kind = "optimizer state" if _is_optimizer_state(value) else "tensors" if tensors else "values"
    return Part(key, kind, tensors, value)


def _is_optimizer_state(value: Any) -> bool:
    """Whether it is what ``torch.optim.Optimizer.state_dict`` gives, or a list of those, as Lightning saves."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_optimizer_state, value))
    return isinstance(value, Mapping) and "param_groups" in value and "state" in value


def _tensors(value: Any) -> dict[str, Entry]:
    """All entries below ``value``, by the keys on the way joined by dots."""
    tensors: dict[str, Entry] = {}

    def note(entry: Entry, path: tuple[Any, ...]) -> Entry:
        tensors[".".join(map(str, path))] = entry
        return entry

    if isinstance(value, Mapping):  # each name of a tied tensor counts, and a walk goes to one object only once
        for key, item in value.items():
            if isinstance(item, Entry):
                tensors[str(key)] = item
            else:
                map_leaves({key: item}, Entry, note)
    else:
        map_leaves(value, Entry, note)
    return tensors


def _shared(parts: Sequence[Part]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Names that are tied, and names whose bytes merely overlap, in the order of the files."""
    ties, views = [], []
    for part in parts:
        names: dict[Entry, list[str]] = defaultdict(list)
        for name, entry in part.tensors.items():
            if entry.numel:
                names[entry].append(name)
        ties += [tuple(group) for group in names.values() if len(group) > 1]
        views += [tuple(names[entry][0] for entry in run) for run in _overlapping(names)]
    return ties, views


def _overlapping(entries: Mapping[Entry, object]) -> Iterator[list[Entry]]:
    run: list[Entry] = []
    end = 0
    in_one_piece = (entry for entry in entries if not entry.chunks)
    for entry in sorted(in_one_piece, key=lambda e: (e.file, e.offset)):
        if run and (entry.file != run[0].file or entry.offset >= end):
            if len(run) > 1:
                yield run
            run, end = [], 0
        run.append(entry)
        end = max(end, entry.offset + entry.extent_bytes)
    if len(run) > 1:
        yield run


def _hyperparameters(found: CheckpointTree) -> dict[str, Any]:
    if isinstance(found.tree, Mapping):
        sources = [found.tree[key] for key in _HYPERPARAMETERS if isinstance(found.tree.get(key), Mapping)]
        if sources:
            return {str(name): value for source in sources for name, value in source.items()}
    return _config(found.path) if os.path.isdir(found.path) else {}


def _config(folder: str) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder; nothing if it is not there or not JSON."""
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8-sig") as file:
            config = json.loads(file.read(_MAX_CONFIG_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
