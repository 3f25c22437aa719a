"""The files that a benchmark loads: written once, of random weights, and what is known of a file that is there."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Module

from lightning_efficient_init.bench.task import Task
from lightning_efficient_init.checkpoint import index_checkpoint
from lightning_efficient_init.errors import UsageError
from lightning_efficient_init.model_names import constructor_of, is_hugging_face

NUM_SHARDS = 3
_INDEX = "model.safetensors.index.json"
_SPARE = 1.05  # headers, and a file system's own needs


class LoadedModule(L.LightningModule):
    """The model as the Trainer wants it.

    Args:
        name: See `constructor_of`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = constructor_of(name)()


def check_space(folder: str, num_bytes: int, forms: Iterable[str]) -> None:
    """Raise `UsageError` unless the folder has room for the weights in all these forms."""
    need, free = int(num_bytes * len(set(forms)) * _SPARE), shutil.disk_usage(folder).free
    if need > free:
        raise UsageError(
            f"{folder}: expected {need / 1e9:.2f} GB of disk for the weights in {len(set(forms))} forms, found "
            f"{free / 1e9:.2f} GB free. Pass a smaller --model, fewer --ways, or --folder on a larger disk."
        )


def write_files(task: Task, folder: str, forms: Iterable[str]) -> dict[str, str]:
    """Write random weights of the task's model, the same ones in each form.

    Returns:
        Form to path.
    """
    model = _random_model(task)
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    paths = {form: str(_WRITERS[form](task, weights, Path(folder))) for form in sorted(set(forms))}
    if is_hugging_face(task.model) and "safetensors" in paths:
        model.config.save_pretrained(paths["safetensors"])  # type: ignore[union-attr, operator]
    return paths


def _random_model(task: Task) -> Module:
    default = torch.get_default_dtype()
    torch.set_default_dtype(task.dtype)
    try:
        with task.device:
            return constructor_of(task.model)()
    finally:
        torch.set_default_dtype(default)


def _write_pth(task: Task, weights: Mapping[str, Tensor], folder: Path) -> Path:
    torch.save(dict(weights), folder / "model.pth")
    return folder / "model.pth"


def _write_shards(task: Task, weights: Mapping[str, Tensor], folder: Path) -> Path:
    folder = folder / "sharded"
    folder.mkdir()
    keys, weight_map = list(weights), dict[str, str]()
    for i in range(NUM_SHARDS):
        file = f"model-{i + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        part = keys[i * len(keys) // NUM_SHARDS : (i + 1) * len(keys) // NUM_SHARDS]
        save_file(_untied({key: weights[key] for key in part}), folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _untied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own, as safetensors wants them."""
    memories = Counter(tensor.untyped_storage().data_ptr() for tensor in weights.values())
    return {
        key: tensor.clone() if memories[tensor.untyped_storage().data_ptr()] > 1 else tensor.contiguous()
        for key, tensor in weights.items()
    }


def _write_lightning(task: Task, weights: Mapping[str, Tensor], folder: Path) -> Path:
    checkpoint: dict[str, Any] = {
        "state_dict": {f"model.{key}": value for key, value in weights.items()},
        "hyper_parameters": {"name": task.model},
        "pytorch-lightning_version": L.__version__,
        "global_step": 0,
        "epoch": 0,
        "loops": {},
    }
    torch.save(checkpoint, folder / "model.ckpt")
    return folder / "model.ckpt"


_WRITERS: Mapping[str, Callable[[Task, Mapping[str, Tensor], Path], Path]] = {
    "pth": _write_pth,
    "safetensors": _write_shards,
    "ckpt": _write_lightning,
}


def form_of(path: str) -> str:
    """The form of an existing checkpoint; raises `UsageError` where no row could load it."""
    found = index_checkpoint(path)
    if found.weights_key is None and found.format.startswith("torch"):
        return "pth"
    if all(file.endswith(".safetensors") for file in found.files):
        return "safetensors"
    raise UsageError(
        f"{path}: expected a bare state dict by torch.save, or safetensors; found {found.format}. Save "
        "model.state_dict() in one of these, or leave --checkpoint out and random weights are written."
    )


def safetensors_files(path: str) -> list[str]:
    """The files of weights in form "safetensors"."""
    return [path] if os.path.isfile(path) else sorted(map(str, Path(path).glob("*.safetensors")))


def all_files(task: Task) -> list[str]:
    """Every file that holds the task's weights."""
    return [
        file
        for form, path in task.paths.items()
        for file in (safetensors_files(path) if form == "safetensors" else [path])
    ]


def stored_weights(task: Task) -> Mapping[str, Tensor]:
    """The weights as torch or safetensors read them, to compare with; mapped, not copied."""
    if "pth" in task.paths:
        return torch.load(task.paths["pth"], mmap=True, weights_only=True)  # type: ignore[no-any-return]
    if "ckpt" in task.paths:
        state = torch.load(task.paths["ckpt"], mmap=True, weights_only=True)["state_dict"]
        return {key.removeprefix("model."): value for key, value in state.items()}
    weights: dict[str, Tensor] = {}
    for file in safetensors_files(task.paths["safetensors"]):
        with safe_open(file, framework="pt") as shard:
            weights |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118 (not a mapping)
    return weights
