"""Other packages that load safetensors, each as its own documentation uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor
from torch.nn import Module

from lightning_efficient_init.bench.files import safetensors_files
from lightning_efficient_init.bench.task import Task


@dataclass(frozen=True, slots=True)
class Peer:
    """Another package.

    Attributes:
        title: What the tables call it.
        packages: What has to be installed.
        load: Fills a model that is built, empty, on its device.
        accelerators: Where it runs.
        mapped_on: Accelerators on which parameters end in the file's mapping.
        host_copies: Memory that it needs on the host, in multiples of the weights.
    """

    title: str
    packages: tuple[str, ...]
    load: Callable[[L.Fabric, Module, Task], object]
    accelerators: tuple[str, ...] = ("cpu", "cuda")
    mapped_on: tuple[str, ...] = ()
    host_copies: float = 0


def _filling(
    read: Callable[[list[str], torch.device], Iterable[tuple[str, Tensor]]], *, copy: bool = False
) -> Callable[[L.Fabric, Module, Task], object]:
    """Gives each parameter the tensor that was read: as it is on the right device, unless ``copy`` is set."""

    def load(fabric: L.Fabric, model: Module, task: Task) -> None:
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for name, tensor in read(safetensors_files(task.paths["safetensors"]), task.device):
            if tensor.device == task.device and not copy:
                state[name].data = tensor
            else:
                state[name].data.copy_(tensor)

    return load


def _safetensors(files: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file  # noqa: PLC0415

    for file in files:
        yield from load_file(file, device=str(device)).items()


def _fastsafetensors(files: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    from fastsafetensors import fastsafe_open  # noqa: PLC0415

    with fastsafe_open(files, device=str(device), nogds=True) as reader:
        for name in reader.keys():  # noqa: SIM118 (not a mapping)
            yield name, reader.get_tensor(name)


def _runai(files: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    from runai_model_streamer import SafetensorsStreamer  # noqa: PLC0415

    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files, device=str(device))
        yield from streamer.get_tensors()


def _instanttensor(files: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    from instanttensor import safe_open  # noqa: PLC0415

    with safe_open(files, framework="pt", device=device) as reader:
        yield from reader.tensors()


def _accelerate(fabric: L.Fabric, model: Module, task: Task) -> None:
    from accelerate import load_checkpoint_in_model  # noqa: PLC0415

    device = 0 if task.accelerator == "cuda" else "cpu"
    load_checkpoint_in_model(model, task.paths["safetensors"], device_map={"": device}, dtype=task.dtype)


def from_pretrained(task: Task) -> Iterator[Module | None]:
    """Transformers builds the model itself; this is a way of its own."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    yield None
    device = 0 if task.accelerator == "cuda" else "cpu"
    yield AutoModelForCausalLM.from_pretrained(
        task.paths["safetensors"], dtype=task.dtype, device_map={"": device}, local_files_only=True
    )


PEERS: Mapping[str, Peer] = {
    "safetensors": Peer("safetensors, load_file", ("safetensors",), _filling(_safetensors), mapped_on=("cpu",)),
    "safetensors-copy": Peer(
        "safetensors, load_file, copied", ("safetensors",), _filling(_safetensors, copy=True), accelerators=("cpu",)
    ),
    "fastsafetensors": Peer("fastsafetensors", ("fastsafetensors",), _filling(_fastsafetensors)),
    "runai": Peer("runai-model-streamer", ("runai_model_streamer",), _filling(_runai), host_copies=1),
    "instanttensor": Peer(
        "instanttensor", ("instanttensor",), _filling(_instanttensor), accelerators=("cuda",), host_copies=1
    ),
    "accelerate": Peer("accelerate, load_checkpoint_in_model", ("accelerate",), _accelerate, mapped_on=("cpu",)),
}
