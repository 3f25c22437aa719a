"""The rows: every way to a loaded model that Lightning has, and ours."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import BitsandbytesPrecision
from lightning.fabric.utilities.load import _lazy_load
from torch.nn import Module

from lightning_efficient_init.bench import peers
from lightning_efficient_init.bench.files import LoadedModule
from lightning_efficient_init.bench.task import Task
from lightning_efficient_init.load import load_checkpoint
from lightning_efficient_init.model_names import constructor_of, is_hugging_face
from lightning_efficient_init.precision import EfficientInit

Run = Callable[[Task], Iterator[Module | None]]
"""Yields when everything is set up, when the model is built (if that is a step of its own), and the loaded model."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to build a model and load its weights.

    Attributes:
        title: What the tables call it.
        group: "Lightning", "ours" or "others".
        form: The form of the weights that it reads, see `Task.paths`.
        run: Does it.
        host_copies: Memory that it needs on the host, in multiples of the weights, when the model is for a GPU.
        packages: What has to be installed.
        accelerators: Where it runs.
        mapped_on: Accelerators on which parameters end in the file's mapping, not in memory of their own.
        beside: Names of the ways that it is compared with; of "others", the fastest that ends in memory of its own.
        needs_hugging_face: Whether it loads Hugging Face models only.
    """

    title: str
    group: str
    form: str
    run: Run
    host_copies: float = 0
    packages: tuple[str, ...] = ()
    accelerators: tuple[str, ...] = ("cpu", "cuda")
    mapped_on: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    needs_hugging_face: bool = False

    def is_called(self, pattern: str, name: str) -> bool:
        """Whether a regular expression is found in its name, or in what the tables call it."""
        return re.search(pattern, f"{name} {self.group}: {self.title}") is not None

    def obstacle(self, task: Task, available_bytes: int) -> str | None:
        """Why it cannot run here, or None.

        Args:
            task: What to load.
            available_bytes: Memory of the host that is free.
        """
        if missing := [name for name in self.packages if importlib.util.find_spec(name) is None]:
            return f"needs {' and '.join(missing)}, which is not installed"
        if task.accelerator not in self.accelerators:
            return f"runs on {' or '.join(self.accelerators)} only"
        if self.needs_hugging_face and not is_hugging_face(task.model):
            return "loads Hugging Face models only; pass the name or the folder of one as --model"
        if self.form not in task.paths:
            return f"reads {self.form}; the checkpoint is {' and '.join(task.paths)}"
        copies = self.host_copies + (task.accelerator == "cpu" and task.accelerator not in self.mapped_on)
        if (need := int(copies * task.num_bytes)) > available_bytes:
            return f"needs about {need / 1e9:.1f} GB of host memory; {available_bytes / 1e9:.1f} GB are free"
        return None


def _stock_fabric(task: Task, **kwargs: Any) -> L.Fabric:
    return L.Fabric(accelerator=task.accelerator, devices=1, precision=task.precision, **kwargs)  # type: ignore[arg-type]


def _our_fabric(task: Task, **kwargs: Any) -> L.Fabric:
    plugin = EfficientInit(task.precision, **kwargs)  # type: ignore[arg-type]
    return L.Fabric(accelerator=task.accelerator, devices=1, strategy="efficient_init", plugins=[plugin])


def _bitsandbytes_fabric(mode: Literal["int8", "nf4"]) -> Callable[[Task], L.Fabric]:
    def make(task: Task) -> L.Fabric:
        dtype = torch.float16 if mode == "int8" else torch.bfloat16  # int8 takes no other
        return L.Fabric(accelerator=task.accelerator, devices=1, plugins=[BitsandbytesPrecision(mode, dtype=dtype)])

    return make


def _quantizing_fabric(mode: str) -> Callable[[Task], L.Fabric]:
    return lambda task: _our_fabric(task, quantize=mode)


def _trainer(task: Task, **kwargs: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator=task.accelerator, devices=1, **quiet, **kwargs)


def _in_fabric(
    make_fabric: Callable[[Task], L.Fabric], load: Callable[[L.Fabric, Module, Task], object], *, empty: bool = True
) -> Run:
    def run(task: Task) -> Iterator[Module | None]:
        fabric, construct = make_fabric(task), constructor_of(task.model)
        yield None
        with fabric.init_module(empty_init=empty):
            model = construct()
        yield None
        load(fabric, model, task)
        yield model

    return run


def _in_trainer(make_trainer: Callable[[Task], L.Trainer]) -> Run:
    def run(task: Task) -> Iterator[Module | None]:
        trainer = make_trainer(task)
        yield None
        with trainer.init_module(empty_init=True):
            module = LoadedModule.load_from_checkpoint(task.paths["ckpt"])
        yield module.model

    return run


def _naive(task: Task) -> Iterator[Module | None]:
    """Build on the CPU in full precision, load, cast, move."""
    construct = constructor_of(task.model)
    yield None
    model = construct()
    yield None
    model.load_state_dict(torch.load(task.paths["pth"]))
    yield model.to(device=task.device, dtype=task.dtype)


def _under_device(task: Task) -> Iterator[Module | None]:
    """Build on the device in full precision, load, cast."""
    construct = constructor_of(task.model)
    yield None
    with task.device:
        model = construct()
    yield None
    model.load_state_dict(torch.load(task.paths["pth"], map_location="cpu"))
    yield model.to(dtype=task.dtype)


def _load_raw(form: str) -> Callable[[L.Fabric, Module, Task], object]:
    return lambda fabric, model, task: fabric.load_raw(task.paths[form], model)


def _load_copied(fabric: L.Fabric, model: Module, task: Task) -> object:
    return model.load_state_dict(torch.load(task.paths["pth"], map_location="cpu"))


def _load_lazily(fabric: L.Fabric, model: Module, task: Task) -> object:
    return model.load_state_dict(_lazy_load(task.paths["pth"]))


def _load_mapped(fabric: L.Fabric, model: Module, task: Task) -> object:
    return model.load_state_dict(torch.load(task.paths["pth"], mmap=True))


def _assign_mapped(fabric: L.Fabric, model: Module, task: Task) -> object:
    return model.load_state_dict(torch.load(task.paths["pth"], mmap=True), assign=True)


def _map(fabric: L.Fabric, model: Module, task: Task) -> object:
    return load_checkpoint(model, task.paths["pth"], mmap=True)


_QUANTIZED: tuple[tuple[str, Literal["int8", "nf4"], str, Callable[[L.Fabric, Module, Task], object]], ...] = (
    ("int8-lazy", "int8", "lazy loader", _load_lazily),
    ("int8-mmap", "int8", "torch.load(mmap=True)", _load_mapped),
    ("nf4-lazy", "nf4", "lazy loader", _load_lazily),
    ("nf4-mmap", "nf4", "torch.load(mmap=True)", _load_mapped),
)

LIGHTNING: Mapping[str, Way] = {
    "naive": Way("build on the CPU in float32, torch.load, move", "Lightning", "pth", _naive, host_copies=3),
    "device": Way("with device: build in float32, torch.load", "Lightning", "pth", _under_device, host_copies=1),
    "init_module": Way(
        "init_module(), torch.load", "Lightning", "pth", _in_fabric(_stock_fabric, _load_copied, empty=False), 1
    ),
    "load_raw": Way(
        "init_module(empty_init=True), load_raw", "Lightning", "pth", _in_fabric(_stock_fabric, _load_raw("pth")), 1
    ),
    "lazy": Way("the same, lazy loader", "Lightning", "pth", _in_fabric(_stock_fabric, _load_lazily)),
    "mmap": Way("the same, torch.load(mmap=True)", "Lightning", "pth", _in_fabric(_stock_fabric, _load_mapped)),
    "mmap-assign": Way(
        "the same, assigned: load_state_dict(assign=True)",
        "Lightning",
        "pth",
        _in_fabric(_stock_fabric, _assign_mapped),
        accelerators=("cpu",),
        mapped_on=("cpu",),
    ),
    **{
        name: Way(
            f"BitsandbytesPrecision('{mode}'), {title}",
            "Lightning",
            "pth",
            _in_fabric(_bitsandbytes_fabric(mode), load),
            packages=("bitsandbytes",),
            accelerators=("cuda",),  # it quantizes there only
        )
        for name, mode, title, load in _QUANTIZED
    },
    "trainer": Way(
        "Trainer.init_module, load_from_checkpoint",
        "Lightning",
        "ckpt",
        _in_trainer(lambda task: _trainer(task, precision=task.precision)),
        host_copies=2,
    ),
}

OURS: Mapping[str, Way] = {
    "ours-load_raw": Way(
        "init_module(empty_init=True), load_raw",
        "ours",
        "pth",
        _in_fabric(_our_fabric, _load_raw("pth")),
        beside=("load_raw", "lazy", "mmap", "others"),
    ),
    "ours-safetensors": Way(
        "the same, from safetensors",
        "ours",
        "safetensors",
        _in_fabric(_our_fabric, _load_raw("safetensors")),
        beside=("load_raw", "mmap", "others"),
    ),
    "ours-mmap": Way(
        "load_checkpoint(mmap=True)",
        "ours",
        "pth",
        _in_fabric(_our_fabric, _map),
        accelerators=("cpu",),
        mapped_on=("cpu",),
        beside=("mmap-assign",),
    ),
    **{
        f"ours-{mode}": Way(
            f"quantize='{mode}', load_raw",
            "ours",
            "pth",
            _in_fabric(_quantizing_fabric(mode), _load_raw("pth")),
            packages=("bitsandbytes",),
            beside=tuple(name for name, of, _, _ in _QUANTIZED if of == mode),
        )
        for mode in ("int8", "nf4")
    },
    "ours-trainer": Way(
        "Trainer.init_module, load_from_checkpoint",
        "ours",
        "ckpt",
        _in_trainer(lambda task: _trainer(task, plugins=[EfficientInit(task.precision)])),  # type: ignore[arg-type]
        beside=("trainer",),
    ),
}

OTHERS: Mapping[str, Way] = {
    name: Way(
        peer.title,
        "others",
        "safetensors",
        _in_fabric(_stock_fabric, peer.load),
        host_copies=peer.host_copies,
        packages=peer.packages,
        accelerators=peer.accelerators,
        mapped_on=peer.mapped_on,
    )
    for name, peer in peers.PEERS.items()
} | {
    "transformers": Way(
        "transformers, from_pretrained",
        "others",
        "safetensors",
        peers.from_pretrained,
        packages=("transformers", "accelerate"),
        mapped_on=("cpu",),
        needs_hugging_face=True,
    )
}

WAYS: Mapping[str, Way] = {**LIGHTNING, **OURS, **OTHERS}
GROUPS: Mapping[str, Mapping[str, Way]] = {"all": WAYS, "lightning": LIGHTNING, "ours": OURS, "others": OTHERS}
