"""Entries matched to parameters, and every mismatch found, before a byte of data moves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient_init.checkpoint import CheckpointTree, Entry, Seal, index_tree, weights_of
from lightning_efficient_init.errors import StateDictMismatchError
from lightning_efficient_init.garbage import collections_paused
from lightning_efficient_init.load.bind import Binding, Shape, StateTree, bind
from lightning_efficient_init.load.extents import extents_of, num_unique_bytes
from lightning_efficient_init.load.keys import RENAMES, KeyMap, match_keys, rename_modules
from lightning_efficient_init.sharding import is_engine, mark_parts, part_of

_WRAPPED_AS = ("_original_module", "_orig_mod")  # by Fabric, by torch.compile


@dataclass(frozen=True, slots=True, eq=False)
class LoadPlan:
    """What loading a checkpoint into a model would read, made from headers alone.

    Attributes:
        path: The checkpoint.
        format: Its format, in words.
        entries: The model's name for each tensor that will be loaded, to the entry that fills it.
        missing: Names of the model's tensors that the checkpoint lacks.
        unexpected: Keys of the checkpoint that match nothing in the model.
        mismatched: Name to (expected shape, found shape); these are not loaded.
        binding: The tensors themselves.
        seal: Of the files that ``entries`` are in.
    """

    path: str
    format: str
    entries: Mapping[str, Entry]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, tuple[Shape, Shape]]
    binding: Binding
    seal: Seal

    @property
    def num_bytes(self) -> int:
        """Bytes that will be read from the files; what several tensors share counts once.

        Of a tensor that is sharded, this rank's part counts.
        """
        tensors, direct = self.binding.tensors, self.binding.direct
        others = {name: entry for name, entry in self.entries.items() if name not in direct}
        parts = {name: part for name in others if (part := part_of(tensors[name])) and not part.is_whole}
        whole = [entry for name, entry in others.items() if name not in parts]
        num_part_bytes = {
            id(tensors[name]): part.memory.numel() * others[name].dtype.itemsize for name, part in parts.items()
        }
        read = extents_of([*whole, *self.binding.read_by_calls])
        read += [(segment.file, segment.offset, segment.num_bytes) for segment in direct.values()]
        return num_unique_bytes(read) + sum(num_part_bytes.values())


def plan_load(
    model: Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    key_map: KeyMap | None = None,
    ignore_mismatched: bool = False,
    weights_only: bool = True,
) -> LoadPlan:
    """Plan what ``load_checkpoint`` with the same arguments would do, without doing it.

    Only headers are read, and the model is not touched: it may be deferred, or on the meta device.

    Args:
        model: The model, plain or wrapped by ``torch.compile``, DDP or Fabric.
        path: A checkpoint file or folder in any of the formats that ``load_checkpoint`` reads.
        strict: Whether every tensor of the model must be in the checkpoint, and the other way round.
        key_map: Checkpoint key to the model's name, as a mapping (keys that it lacks keep their name) or a function;
            ``None`` drops the key. By default a prefix such as ``model.`` is added or removed if exactly one choice
            fits.
        ignore_mismatched: Whether tensors of another shape are left to their initializer instead of being an error.
        weights_only: Whether the checkpoint's pickle may only hold tensors and plain containers. ``False`` runs
            whatever code it brings along.

    Raises:
        StateDictMismatchError: The tensors do not fit; holds all names and shapes.
        CheckpointError: The checkpoint cannot be read, see ``lightning_efficient_init.errors``.
        TypeError: An argument is of another kind.
    """
    if not isinstance(model, Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}. The path comes second.")
    found = index_tree(path, weights_only=weights_only)
    return plan_part(model, found, strict=strict, key_map=key_map, ignore_mismatched=ignore_mismatched)


def plan_part(
    model: Module,
    checkpoint: CheckpointTree,
    key: str | None = None,
    *,
    strict: bool = True,
    key_map: KeyMap | None = None,
    ignore_mismatched: bool = False,
) -> LoadPlan:
    """Plan the load of the weights under ``key`` in an indexed checkpoint, or of its only weights."""
    model = unwrap(model)
    mark_parts(model)
    weights = weights_of(checkpoint.tree, key, path=checkpoint.path)
    with collections_paused():
        tree = StateTree.of(model, settled=True)
        names = match_keys(weights.entries, tree.tensors, key_map, path=checkpoint.path)
        entries = weights.entries
        state = {name: entries[key] for key, name in names.items()}
        binding = bind(model, state, rename_modules(weights.metadata, names), tree)
    if binding.unexpected:
        key_of = {name: key for key, name in names.items()}
        binding.unexpected = [key_of.get(name, name) for name in binding.unexpected]
    check(binding, checkpoint.path, strict=strict, ignore_mismatched=ignore_mismatched, num_keys=len(state))
    return LoadPlan(
        path=checkpoint.path,
        format=checkpoint.format,
        entries=binding.entries,
        missing=tuple(binding.missing),
        unexpected=tuple(binding.unexpected),
        mismatched=binding.mismatched,
        binding=binding,
        seal=checkpoint.seal,
    )


def check(
    binding: Binding, path: str, *, strict: bool, ignore_mismatched: bool = False, num_keys: int | None = None
) -> None:
    """Raise one error with all that does not fit.

    Args:
        binding: What would be loaded.
        path: The checkpoint, for the message.
        strict: Whether missing and unexpected names are errors.
        ignore_mismatched: Whether shapes may differ.
        num_keys: Keys of the checkpoint; if given, having no use for any is an error even if ``strict`` is off.
    """
    problems = []
    if binding.mismatched and not ignore_mismatched:
        problems.append("Shapes differ:" + "".join(map(_mismatch_line, binding.mismatched.items())))
    if binding.errors:
        problems.append("In the way:" + _lines(binding.errors))
    nothing_fits = bool(num_keys) and len(binding.unexpected) == num_keys
    if strict or nothing_fits:
        if binding.missing:
            problems.append("Missing in the checkpoint:" + _lines(binding.missing))
        if binding.unexpected:
            problems.append("Unexpected in the checkpoint:" + _lines(binding.unexpected))
    if not problems:
        return
    raise StateDictMismatchError(
        f"{path} does not fit the model.\n"
        + "\n".join(problems)
        + f"\n{_remedy(binding, nothing_fits, ignore_mismatched)}",
        missing=tuple(binding.missing),
        unexpected=tuple(binding.unexpected),
        mismatched=dict(binding.mismatched),
    )


def _remedy(binding: Binding, nothing_fits: bool, ignore_mismatched: bool) -> str:
    """What to do next, in words that are right whichever way led here."""
    if binding.errors:
        return "Mend the model or the checkpoint."
    if nothing_fits:
        return f"Not one key fits. {RENAMES} turns checkpoint keys into the model's names."
    if binding.mismatched and not ignore_mismatched:
        return (
            "Build the model with the checkpoint's sizes, or initialize those tensors anew: load_checkpoint(model, "
            "path, ignore_mismatched=True), with strict=False if names are missing or unexpected."
        )
    return f"If names differ, {RENAMES} maps them; with strict=False it loads what fits and initializes the rest."


def _mismatch_line(item: tuple[str, tuple[Shape, Shape]]) -> str:
    name, (expected, found) = item
    return f"\n  {name}: the model has {list(expected)}, the checkpoint {list(found)}"


def _lines(names: list[str]) -> str:
    return "".join(f"\n  {name}" for name in names)


def unwrap(model: Module) -> Module:
    """The user's own module inside wrappers of Fabric, ``torch.compile``, DDP and DeepSpeed."""
    while True:
        if isinstance(model, DistributedDataParallel) or is_engine(model):
            model = model.get_submodule("module")
        elif (inner := next((name for name in _WRAPPED_AS if name in model._modules), None)) is not None:
            model = model.get_submodule(inner)
        else:
            return model
