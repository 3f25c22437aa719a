"""Folders that DeepSpeed's engine saves, of ZeRO-3 above all.

How one is laid out: in a subfolder that the file ``latest`` names, each rank has two ``torch.save`` archives. The
one for model states says of each parameter its shape, and has buffers and this rank's part of frozen parameters. The
one for optimizer states has this rank's parts of the others, float32 master weights, one after the other in flat
tensors: of each parameter as many elements as of any other rank, the last rank's padded at the end.

So a parameter has one stretch of elements in each rank's file. A stretch of a flattened tensor is a few blocks of
it (the end of a row, whole rows, the start of a row), which is how an `Entry` says it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from lightning_efficient_init.checkpoint.entry import Chunk, Entry
from lightning_efficient_init.checkpoint.file import CheckpointFile
from lightning_efficient_init.checkpoint.format import CheckpointTree
from lightning_efficient_init.checkpoint.torch_zip import read_archive
from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, explain, listing, show
from lightning_efficient_init.errors import CorruptCheckpointError, UnsupportedCheckpointError

Shape = tuple[int, ...]

_MODEL_STATES: Final = "_model_states.pt"
_RANK: Final = re.compile(r"^(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt$")
_NO_CLIENT_STATE: Final = frozenset(
    (
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "checkpoint_parallel_dimensions",
        "ds_config",
        "ds_version",
    )
)


class DeepSpeedFolder:
    """A folder of DeepSpeed ZeRO."""

    name = "DeepSpeed folder"

    def recognize(self, path: str, head: bytes | None) -> bool:
        """Whether the folder, or one below it, has DeepSpeed's files."""
        return head is None and _find(path) is not None

    def read(self, path: str, *, weights_only: bool) -> CheckpointTree:
        """Reads the tree; raises as `index_checkpoint` does.

        The tree is that of a Lightning checkpoint (weights under "state_dict") if Lightning's Trainer saved it, else
        that of a Fabric checkpoint (under "model"). The states of optimizers stay behind.
        """
        folder = _find(path)
        assert folder is not None, "recognized"
        ranks = _ranks(folder)
        if not ranks["model"]:
            return self._read_whole(path, folder, weights_only)
        if len(ranks["model"]) != len(ranks["optim"]):
            raise UnsupportedCheckpointError(
                explain(
                    path,
                    expected="for each rank a file of model states and one of optimizer states, which has the weights",
                    found=f"{len(ranks['model'])} and {len(ranks['optim'])} of them",
                    todo="Copy the folder again; without its optimizer a ZeRO-3 model cannot be saved in this form.",
                )
            )
        models = [_read(file, weights_only) for file in ranks["model"]]
        optimizers = [_read(file, weights_only) for file in ranks["optim"]]
        weights = _Weights(path, models, optimizers).read()
        return CheckpointTree(path, self.name, (*ranks["model"], *ranks["optim"]), _tree(models[0], weights))

    def _read_whole(self, path: str, folder: str, weights_only: bool) -> CheckpointTree:
        """Stages below 3 save the weights whole."""
        files = [os.path.join(folder, name) for name in _names(folder) if name.endswith(_MODEL_STATES)]
        if len(files) != 1:
            raise UnsupportedCheckpointError(
                explain(
                    path,
                    expected="the weights in one file, or in one for each rank of ZeRO-3",
                    found=listing(_names(folder)),
                    todo="Convert what was trained with model parallelism by DeepSpeed's own tools.",
                )
            )
        states = _read(files[0], weights_only)
        return CheckpointTree(path, self.name, tuple(files), _tree(states, _get(states, "module", Mapping, files[0])))


def num_ranks(path: str) -> int:
    """How many ranks of ZeRO-3 have saved a folder."""
    folder = _find(path)
    return 0 if folder is None else len(_ranks(folder)["model"])


def blocks(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """The blocks, as offsets and sizes, that make up a stretch of a tensor flattened in row-major order, in order."""
    if stop <= start:
        return
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape)
        return
    row = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _in_row(shape, first, head, tail)
        return
    if head:
        yield from _in_row(shape, first, head, row)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, tail)


def _in_row(shape: Shape, index: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    for offsets, sizes in blocks(shape[1:], start, stop):
        yield (index, *offsets), (1, *sizes)


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weights in the files of all ranks."""

    path: str
    models: list[dict[str, Any]]
    optimizers: list[dict[str, Any]]

    def read(self) -> dict[str, Any]:
        """Key to entry, in the order of the module's state dict."""
        first = self.models[0]
        module = _get(first, "module", Mapping, self.path)
        found = {key: module[key] for key in first.get("buffer_names") or () if key in module}
        found |= self._frozen(first.get("frozen_param_shapes") or {})
        shapes = {
            name: shape for group in _get(first, "param_shapes", list, self.path) for name, shape in group.items()
        }
        found |= self._trained(shapes)
        found |= {name: found[other] for name, other in (first.get("shared_params") or {}).items() if other in found}
        extra = {key: value for key, value in module.items() if key not in found and not isinstance(value, Entry)}
        return {**{key: found[key] for key in module if key in found}, **found, **extra}

    def _frozen(self, shapes: Mapping[str, Any]) -> dict[str, Entry]:
        return {
            name: self._join(name, _shape(size), [[model["frozen_param_fragments"][name]] for model in self.models])
            for name, size in shapes.items()
        }

    def _trained(self, shapes: Mapping[str, Any]) -> dict[str, Entry]:
        flat = [_get(states["optimizer_state_dict"], "fp32_flat_groups", list, self.path) for states in self.optimizers]
        found, position = {}, 0
        for name, size in shapes.items():
            shape = _shape(size)
            found[name] = self._join(name, shape, flat, position)
            position += -(-math.prod(shape) // len(flat))
        return found

    def _join(self, name: str, shape: Shape, flat: list[list[Entry]], position: int = 0) -> Entry:
        """One tensor of the stretches that ranks have, each at ``position`` of its flat tensors, laid end to end."""
        numel, chunks = math.prod(shape), []
        each = -(-numel // len(flat))
        for rank, groups in enumerate(flat):
            start, stop = min(rank * each, numel), min((rank + 1) * each, numel)
            for offsets, sizes in blocks(shape, start, stop):
                done = _place(shape, offsets) - start
                chunks.append(Chunk(offsets, self._cut(name, groups, position + done, sizes)))
        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        if len(chunks) == 1:
            return chunks[0].entry
        first = chunks[0].entry if chunks else self._cut(name, flat[0], 0, (0,))
        return Entry(first.file, first.offset, first.dtype, shape, stride, tuple(chunks))

    def _cut(self, name: str, groups: list[Entry], position: int, shape: Shape) -> Entry:
        """A block of consecutive elements from a rank's flat tensors."""
        numel = math.prod(shape)
        for flat in groups:
            if not isinstance(flat, Entry) or not flat.is_contiguous:
                break
            if position + numel <= flat.numel:
                stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
                return Entry(flat.file, flat.offset + position * flat.dtype.itemsize, flat.dtype, shape, stride)
            if position < flat.numel:
                break
            position -= flat.numel
        raise CorruptCheckpointError(
            explain(
                self.path,
                tensor=name,
                expected=f"{numel} elements at {position} in a rank's flat tensors",
                found=listing(getattr(flat, "shape", type(flat).__name__) for flat in groups),
                todo=DOWNLOAD_AGAIN,
            )
        )


def _place(shape: Shape, offsets: Shape) -> int:
    """The index in the flattened tensor of the element at ``offsets``."""
    return sum(offset * math.prod(shape[dim + 1 :]) for dim, offset in enumerate(offsets))


def _tree(states: Mapping[str, Any], weights: Any) -> dict[str, Any]:
    client = {key: value for key, value in states.items() if key not in _NO_CLIENT_STATE}
    key = "state_dict" if "pytorch-lightning_version" in client else "model"
    return {**client, key: weights}


def _get(states: Any, key: str, kind: type, path: str) -> Any:
    value = states.get(key) if isinstance(states, Mapping) else None
    if not isinstance(value, kind):
        raise CorruptCheckpointError(
            explain(path, expected=f"a {kind.__name__} under {key!r}", found=show(value), todo=DOWNLOAD_AGAIN)
        )
    return value


def _shape(size: Any) -> Shape:
    return tuple(int(length) for length in size)


def _read(path: str, weights_only: bool) -> dict[str, Any]:
    with CheckpointFile(path) as file:
        tree = read_archive(file, weights_only=weights_only, stand_ins=_STAND_INS)
    if not isinstance(tree, dict):
        raise CorruptCheckpointError(explain(path, expected="a dict", found=show(tree), todo=DOWNLOAD_AGAIN))
    return tree


def _find(path: str) -> str | None:
    """The folder with the files: ``path``, what its ``latest`` names, or the only one below it that has some."""
    if _has_files(path):
        return path
    below = [child for name in _names(path)[:100] if _has_files(child := os.path.join(path, name))]
    try:
        with open(os.path.join(path, "latest"), encoding="utf-8") as latest:
            named = os.path.join(path, latest.read(1000).strip())
    except (OSError, ValueError):
        return below[0] if len(below) == 1 else None
    return named if named in below else None


def _ranks(folder: str) -> dict[str, list[str]]:
    """The files of model states and of optimizer states, by rank."""
    found: dict[str, dict[int, str]] = {"model": {}, "optim": {}}
    for name in _names(folder):
        if match := _RANK.match(name):
            found[match[2]][int(match[1])] = os.path.join(folder, name)
    return {kind: [files[rank] for rank in sorted(files)] for kind, files in found.items()}


def _has_files(folder: str) -> bool:
    return any(name.endswith(_MODEL_STATES) for name in _names(folder))


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


class _StandIn:
    """In the place of DeepSpeed's own objects, which nobody looks at here."""

    def __new__(cls, *_: Any) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """What they hold stays behind."""


_STAND_INS: Final = dict.fromkeys(
    (
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    ),
    _StandIn,
)
