"""Loads many small tensors, all at once and one read for each; seconds per load and microseconds per tensor.

    python examples/benchmarks/many.py                     # 10,000 tensors
    python examples/benchmarks/many.py --tensors 100000

A load begins with the path of a file and ends when the last value is in the model: its header is read, names are
matched, and so on. The file is in the page cache. Rounds are interleaved, in one process; the first one is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.fabric.utilities.load import _lazy_load
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lightning_efficient_init import load_checkpoint
from lightning_efficient_init.checkpoint import index_checkpoint, read_entry

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def build(num_tensors: int) -> nn.Module:
    """Linear layers of 16 times 16, each with a weight and a bias."""
    layers = (nn.ModuleList(nn.Linear(16, 16) for _ in range(50)) for _ in range(num_tensors // 100))
    return nn.ModuleList(layers).to(DEVICE, torch.bfloat16)


def load(model: nn.Module, path: Path) -> None:
    """This package."""
    load_checkpoint(model, path, progress=False)


def load_entries(model: nn.Module, path: Path) -> None:
    """This package's index, then one read and one copy for each tensor."""
    state = model.state_dict()
    for key, entry in index_checkpoint(path).weights.items():
        state[key].copy_(read_entry(entry))


def load_lazily(model: nn.Module, path: Path) -> None:
    """Lightning's lazy loader, which reads each tensor as it is copied."""
    model.load_state_dict(_lazy_load(path))


def load_safely(model: nn.Module, path: Path) -> None:
    """The safetensors package, tensor by tensor, from its mapping of the file."""
    state = model.state_dict()
    with safe_open(path, "pt", device=str(DEVICE)) as file:
        for key in file.keys():  # noqa: SIM118 (no dict)
            state[key].copy_(file.get_tensor(key))


Way = Callable[[nn.Module, Path], None]
WAYS: list[tuple[str, str, Way]] = [
    ("load_checkpoint", "model.pth", load),
    ("index, then one read and copy for each tensor", "model.pth", load_entries),
    ("Lightning's lazy loader", "model.pth", load_lazily),
    ("load_checkpoint", "model.safetensors", load),
    ("index, then one read and copy for each tensor", "model.safetensors", load_entries),
    ("safe_open, then get_tensor and copy for each tensor", "model.safetensors", load_safely),
]


def measure(model: nn.Module, folder: Path, rounds: int) -> list[list[float]]:
    """Seconds of each way in each round."""
    seconds: list[list[float]] = [[] for _ in WAYS]
    for _ in range(rounds + 1):
        for times, (_, file, way) in zip(seconds, WAYS, strict=True):
            started = time.perf_counter()
            with torch.no_grad():
                way(model, folder / file)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return [times[1:] for times in seconds]


def print_table(seconds: list[list[float]], num_tensors: int) -> None:
    """Median and range of each way, and how it compares with ours for the same file."""
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    table = Table("file", "way", "seconds", "range", "us per tensor", "times ours", title=f"{num_tensors}, {machine}")
    ours = 0.0
    for times, (title, file, way) in zip(seconds, WAYS, strict=True):
        median = statistics.median(times)
        ours = median if way is load else ours
        spread = f"{min(times):.3f}-{max(times):.3f}"
        table.add_row(file, title, f"{median:.3f}", spread, f"{median / num_tensors * 1e6:.0f}", f"{median / ours:.1f}")
    Console(width=140).print(table)


def main() -> None:
    """Write the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=10_000, help="a multiple of 100")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = build(args.tensors)
    weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(weights, Path(folder) / "model.pth")
        save_file(weights, Path(folder) / "model.safetensors")
        print_table(measure(model, Path(folder), args.rounds), args.tensors)


if __name__ == "__main__":
    main()
