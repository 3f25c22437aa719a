"""Builds a model and loads a checkpoint, in Lightning's ways and in ours; time and memory of each.

    python examples/benchmarks/load.py                 # 7B on a GPU; needs 41 GB of disk, and memory to cache it
    python examples/benchmarks/load.py --model tiny    # the same on anything
    python examples/benchmarks/load.py --model many    # 10,000 small tensors
    python examples/benchmarks/load.py --only "int8|nf4"  # rows in whose title this is found

Every row runs in a fresh process; the rounds are interleaved. The files were written just before, so they are in the
page cache. The clock starts with CUDA initialized and libraries imported, and stops when the model is complete on the
device: construction and loading together.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import lightning as L
import torch
from lightning.fabric.plugins import BitsandbytesPrecision
from lightning.fabric.utilities.load import _lazy_load
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from lightning_efficient_init import EfficientInit
from lightning_efficient_init.bench.llama import SIZES, build
from lightning_efficient_init.memory import PeakMemory
from lightning_efficient_init.quantize import QuantizeMode

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ACCELERATOR = "cuda" if DEVICE.type == "cuda" else "cpu"
NUM_SHARDS = 3


class Module(L.LightningModule):
    """The model, as the Trainer wants it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build(name)


def build_files(name: str, folder: Path) -> None:
    """Write the same random weights as ``.pth``, as three safetensors shards, and as a Lightning checkpoint."""
    with DEVICE, torch.random.fork_rng(devices=[]):
        torch.set_default_dtype(torch.bfloat16)
        model = build(name).cpu()
        torch.set_default_dtype(torch.float32)
    weights = model.state_dict()
    torch.save(weights, folder / "model.pth")
    (folder / "sharded").mkdir()
    weight_map = {}
    keys = list(weights)
    for i in range(NUM_SHARDS):
        part = keys[i * len(keys) // NUM_SHARDS : (i + 1) * len(keys) // NUM_SHARDS]
        file = f"model-{i + 1:05d}-of-{NUM_SHARDS:05d}.safetensors"
        save_file({key: weights[key] for key in part}, folder / "sharded" / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = {
        "state_dict": {f"model.{key}": value for key, value in weights.items()},
        "hyper_parameters": {"name": name},
        "pytorch-lightning_version": L.__version__,
        "global_step": 0,
        "epoch": 0,
        "loops": {},
    }
    torch.save(checkpoint, folder / "model.ckpt")


def stock_fabric(quantize: QuantizeMode | None = None) -> L.Fabric:
    """Fabric without this package."""
    if quantize is not None:
        dtype = torch.float16 if quantize == "int8" else torch.bfloat16  # int8 takes no other
        plugin = BitsandbytesPrecision(quantize, dtype=dtype)
        return L.Fabric(accelerator=ACCELERATOR, devices=1, plugins=[plugin])
    return L.Fabric(accelerator=ACCELERATOR, devices=1, precision="bf16-true")


def our_fabric(quantize: QuantizeMode | None = None) -> L.Fabric:
    """Fabric with this package."""
    plugin = EfficientInit("bf16-true", quantize=quantize)
    return L.Fabric(accelerator=ACCELERATOR, devices=1, strategy="efficient_init", plugins=[plugin])


def trainer(**kwargs: Any) -> L.Trainer:
    """A quiet Trainer."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator=ACCELERATOR, devices=1, **quiet, **kwargs)


Way = Callable[[str, Path], Iterator[nn.Module | None]]
"""Builds a model by name and loads it from a folder. Yields when it is set up, when the model is built (if that is a
step of its own), and with the loaded model."""


def in_fabric(make_fabric: Callable[[], L.Fabric], load: Callable[[L.Fabric, nn.Module, Path], object]) -> Way:
    """Build under ``init_module(empty_init=True)``, then load."""

    def way(name: str, folder: Path) -> Iterator[nn.Module | None]:
        fabric = make_fabric()
        yield None
        with fabric.init_module(empty_init=True):
            model = build(name)
        yield None
        load(fabric, model, folder)
        yield model

    return way


def in_trainer(**kwargs: Any) -> Way:
    """The snippet of Lightning's documentation."""

    def way(name: str, folder: Path) -> Iterator[nn.Module | None]:
        runner = trainer(**kwargs)
        yield None
        with runner.init_module(empty_init=True):
            module = Module.load_from_checkpoint(folder / "model.ckpt")
        yield module.model

    return way


def load_raw(file: str) -> Callable[[L.Fabric, nn.Module, Path], object]:
    """Fabric's own function."""
    return lambda fabric, model, folder: fabric.load_raw(folder / file, model)


def load_lazily(fabric: L.Fabric, model: nn.Module, folder: Path) -> object:
    """Lightning's lazy loader, as lit-llama uses it: one read for each tensor."""
    return model.load_state_dict(_lazy_load(folder / "model.pth"))


def load_mapped(fabric: L.Fabric, model: nn.Module, folder: Path) -> object:
    """Memory mapping by ``torch.load``."""
    return model.load_state_dict(torch.load(folder / "model.pth", mmap=True))


WAYS: dict[str, Way] = {
    "Lightning: init_module(empty_init=True), load_raw": in_fabric(stock_fabric, load_raw("model.pth")),
    "Lightning: the same with its lazy loader": in_fabric(stock_fabric, load_lazily),
    "Lightning: the same with torch.load(mmap=True)": in_fabric(stock_fabric, load_mapped),
    "ours: init_module(empty_init=True), load_raw of .pth": in_fabric(our_fabric, load_raw("model.pth")),
    "ours: the same from 3 safetensors shards": in_fabric(our_fabric, load_raw("sharded")),
    "Lightning: Trainer, load_from_checkpoint": in_trainer(precision="bf16-true"),
    "ours: Trainer, load_from_checkpoint": in_trainer(plugins=[EfficientInit("bf16-true")]),
}

MODES: tuple[QuantizeMode, ...] = ("int8", "nf4")
for mode in MODES:
    if DEVICE.type == "cuda":  # Lightning's own plugin quantizes there only
        stock = partial(stock_fabric, mode)
        WAYS[f"Lightning: {mode}, its lazy loader"] = in_fabric(stock, load_lazily)
        WAYS[f"Lightning: {mode}, torch.load(mmap=True)"] = in_fabric(stock, load_mapped)
    WAYS[f"ours: {mode}, load_raw of .pth"] = in_fabric(partial(our_fabric, mode), load_raw("model.pth"))


def measure(title: str, name: str, folder: Path, *, check: bool) -> dict[str, Any]:
    """Run one row in this process."""
    if DEVICE.type == "cuda":
        torch.zeros(1, device=DEVICE)
    steps = WAYS[title](name, folder)
    next(steps)
    marks = [time.perf_counter()]
    with PeakMemory(in_background=True) as memory:  # the device keeps count itself
        for step in steps:
            model = step
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
    assert model is not None
    result = {
        "title": title,
        "seconds": marks[-1] - marks[0],
        "load_seconds": marks[-1] - marks[-2],
        "device": str(next(model.parameters()).device),
        "device_bytes": torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0,
        "final_bytes": torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0,
        "host_bytes": memory.host_bytes,
        "weight_bytes": (folder / "model.pth").stat().st_size,
    }
    if check:
        result["is_equal"] = is_equal(model, torch.load(folder / "model.pth", mmap=True))
    return result


def is_equal(model: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    """Whether the model holds exactly these weights, or what bitsandbytes makes of them."""
    params = dict(model.named_parameters())
    return params.keys() == weights.keys() and all(is_equal_to(params[key], weights[key]) for key in weights)


def is_equal_to(param: nn.Parameter, weight: torch.Tensor) -> bool:
    """The same for one parameter."""
    found, weight = param.data, weight.to(param.device)
    if found.dtype == torch.int8:
        expected = bnb.functional.int8_vectorwise_quant(weight.half())[0]
    elif found.dtype == torch.uint8:
        state = param.quant_state  # type: ignore[attr-defined]
        expected = bnb.functional.quantize_4bit(weight.to(state.dtype), blocksize=64, quant_type=state.quant_type)[0]
    else:
        expected = weight.to(found.dtype)
    return torch.equal(found, expected)


def run_row(title: str, name: str, folder: Path, *, check: bool) -> dict[str, Any]:
    """Run one row in a fresh process."""
    command = [sys.executable, __file__, "--model", name, "--folder", str(folder), "--row", title]
    output = subprocess.run([*command, *["--check"] * check], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]


def print_table(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Median of each row, with the range of its rounds."""
    weights = next(iter(results.values()))[0]["weight_bytes"]
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    table = Table(title=f"{name}, bf16, {weights / 1e9:.3f} GB; {machine}, torch {torch.__version__}")
    for heading in (
        "way",
        "seconds",
        "range",
        "of it, loading",
        "GB/s",
        "device peak, GB",
        "device end, GB",
        "host growth, GB",
        "ends on",
        "equal",
    ):
        table.add_column(heading)
    for title, rounds in results.items():
        seconds = [r["seconds"] for r in rounds]
        median = statistics.median(seconds)
        table.add_row(
            title,
            f"{median:.3f}",
            f"{min(seconds):.3f}-{max(seconds):.3f}",
            f"{statistics.median(r['load_seconds'] for r in rounds):.3f}",
            f"{weights / median / 1e9:.1f}",
            f"{max(r['device_bytes'] for r in rounds) / 1e9:.2f}",
            f"{max(r['final_bytes'] for r in rounds) / 1e9:.2f}",
            f"{max(r['host_bytes'] for r in rounds) / 1e9:.2f}",
            rounds[0]["device"],
            str(rounds[0]["is_equal"]),
        )
    Console(width=180).print(table)


def main() -> None:
    """Measure all rows, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7B", choices=[*SIZES, "many"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stock-rounds", type=int, help="fewer rounds for Lightning's own ways, which take long")
    parser.add_argument("--only", default="", help="run only the rows in whose title this regular expression is found")
    parser.add_argument("--folder", type=Path, help="where the files are, or go; by default a temporary folder")
    parser.add_argument("--json", type=Path, help="also write all measurements here")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build_files(args.model, args.folder)
        return
    if args.row:
        warnings.simplefilter("ignore")
        logging.getLogger("lightning").setLevel(logging.ERROR)
        print(json.dumps(measure(args.row, args.model, args.folder, check=args.check)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        subprocess.run([sys.executable, __file__, "--model", args.model, "--folder", folder, "--build"], check=True)
        results: dict[str, list[dict[str, Any]]] = {title: [] for title in WAYS if re.search(args.only, title)}
        for i in range(args.rounds):
            for title, rounds in results.items():
                if i < (args.stock_rounds or args.rounds) or title.startswith("ours"):
                    rounds.append(run_row(title, args.model, Path(folder), check=i == 0))
                    print(f"{rounds[-1]['seconds']:8.3f} s  {title}", flush=True)  # a run that is cut has said this
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    print_table(results, args.model)


if __name__ == "__main__":
    main()
