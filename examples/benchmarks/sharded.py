"""Builds, shards and loads a model on several devices, in Lightning's ways and in ours; time, memory and bytes of each.

    python examples/benchmarks/sharded.py --strategy fsdp2 --model 7B --devices 2      # GPUs; 14 GB of disk
    python examples/benchmarks/sharded.py --strategy fsdp --model tiny --devices 2     # CPUs, if there are no GPUs

Every row runs in fresh processes, one for each device, that talk through NCCL or gloo. The file was written just
before, so it is in the page cache. The clock starts when all processes have met, libraries are imported and CUDA is
initialized, and stops when the last one has its last value: construction, sharding and loading together.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy
from rich.console import Console
from rich.table import Table
from torch import distributed, nn

from lightning_efficient_init import EfficientInit
from lightning_efficient_init.bench.llama import SIZES, Block, RMSNorm, build
from lightning_efficient_init.memory import PeakMemory
from lightning_efficient_init.sharding import part_of
from lightning_efficient_init.strategies.fsdp2 import shard_blocks

IS_CUDA = torch.cuda.is_available()
NAMES = {
    "fsdp2": "efficient_init_fsdp2",
    "fsdp": "efficient_init_fsdp",
    "ddp": "efficient_init_ddp",
    "deepspeed": "efficient_init_deepspeed_stage_3",
}
ROWS = {
    "ours": "ours: setup, then load_raw",
    "ours-before": "ours: load_raw, then setup",
    "ours-init": "ours: initializers, no checkpoint",
    "stock": "Lightning",
    "stock-reset": "Lightning, RMSNorm given a reset_parameters",
}


def build_file(name: str, file: Path) -> None:
    """Write random weights in bf16."""
    device = torch.device("cuda", 0) if IS_CUDA else torch.device("cpu")
    with device:
        torch.set_default_dtype(torch.bfloat16)
        model = build(name).cpu()
    torch.save(model.state_dict(), file)


def make_fabric(row: str, strategy: str, devices: int) -> L.Fabric:
    """Fabric with this package's strategy, or Lightning's."""
    where = {"accelerator": "cuda" if IS_CUDA else "cpu", "devices": devices}
    if row.startswith("ours"):
        return L.Fabric(**where, strategy=NAMES[strategy], plugins=[EfficientInit("bf16-true")])
    chosen: Any = {
        "fsdp2": lambda: ModelParallelStrategy(shard_blocks, data_parallel_size=devices, tensor_parallel_size=1),
        "fsdp": lambda: FSDPStrategy(auto_wrap_policy={Block}),
        "ddp": lambda: "ddp",
        "deepspeed": lambda: "deepspeed_stage_3",
    }[strategy]()
    return L.Fabric(**where, strategy=chosen, precision="bf16-true")


def build_and_load(fabric: L.Fabric, row: str, strategy: str, name: str, file: Path) -> nn.Module:
    """What is timed."""
    with fabric.init_module(empty_init=row != "ours-init"):
        model = build(name)
    is_early = row == "ours-before" or (row == "stock" and strategy == "ddp")
    if is_early:
        fabric.load_raw(file, model)
    model = fabric.setup(model)
    if not is_early and row != "ours-init":
        fabric.load_raw(file, model)
    return model


def measure(row: str, strategy: str, name: str, devices: int, file: Path, *, check: bool) -> dict[str, Any]:
    """Run one row in this process, which is one of its ranks."""
    if row == "stock-reset":
        RMSNorm.reset_parameters = lambda self: nn.init.ones_(self.scale)  # type: ignore[attr-defined]
    fabric = make_fabric(row, strategy, devices)
    fabric.launch()
    fabric.all_reduce(torch.zeros(1, device=fabric.device))
    fabric.barrier()
    before, started = bytes_read(), time.perf_counter()
    with PeakMemory(in_background=True) as memory:  # the device keeps count itself
        model = build_and_load(fabric, row, strategy, name, file)
        if IS_CUDA:
            torch.cuda.synchronize()
        own_seconds = time.perf_counter() - started
        fabric.barrier()
    seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "own_seconds": own_seconds,
        "device_bytes": torch.cuda.max_memory_allocated() if IS_CUDA else 0,
        "device_bytes_after": torch.cuda.memory_allocated() if IS_CUDA else 0,
        "host_bytes": memory.host_bytes,
        "bytes_read": bytes_read() - before,
    }
    if check and row.startswith("ours") and row != "ours-init":
        result["is_equal"] = is_equal(model, torch.load(file, mmap=True))
    return result


def bytes_read() -> int:
    """Bytes that this process has asked the system to read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def is_equal(model: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    """Whether this rank's parts are those of the weights."""
    found = {strip(name): param for name, param in model.named_parameters()}
    return found.keys() == weights.keys() and all(map(is_part, found.values(), map(weights.__getitem__, found)))


def is_part(param: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether a parameter, or the part of it that is here, has the values of ``whole``."""
    part = part_of(param)
    found, expected = (param.detach(), whole) if part is None else (part.memory, part.take(whole))
    return torch.equal(found, expected.to(found.device))


def strip(name: str) -> str:
    """The name that the model itself gives a parameter."""
    for wrapper in ("_forward_module.", "_fsdp_wrapped_module.", "module."):
        name = name.replace(wrapper, "")
    return name


def run_row(args: argparse.Namespace, row: str, file: Path, *, check: bool) -> list[dict[str, Any]] | str:
    """Run one row in fresh processes; what each rank measured, or why it failed."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    command = [sys.executable, __file__, "--model", args.model, "--devices", str(args.devices), "--file", str(file)]
    command += ["--strategy", args.strategy, "--row", row, *["--check"] * check]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(args.devices), "GROUP_RANK": "0"}
    common |= {"LOCAL_WORLD_SIZE": str(args.devices), "TORCHELASTIC_RUN_ID": "benchmark", "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(args.devices)
    ]
    outputs = [rank.communicate() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        failed = next(error for rank, (_, error) in zip(ranks, outputs, strict=True) if rank.returncode)
        lines = [line for line in failed.splitlines() if "Error" in line]
        return lines[-1] if lines else failed[-400:]
    return [json.loads(output.splitlines()[-1]) for output, _ in outputs]


def print_table(results: dict[str, list[Any]], args: argparse.Namespace, weight_bytes: int) -> None:
    """Median of each row over its rounds, the slowest and the largest rank of each."""
    machine = torch.cuda.get_device_name() if IS_CUDA else "CPU"
    title = f"{args.strategy}, {args.model}, bf16, {weight_bytes / 1e9:.3f} GB; {args.devices} x {machine}, torch "
    table = Table(title=title + torch.__version__)
    for heading in ("way", "seconds", "range", "device peak, at the end, GB", "host growth, GB", "read, GB", "equal"):
        table.add_column(heading)
    for row, rounds in results.items():
        if failed := [found for found in rounds if isinstance(found, str)]:
            table.add_row(ROWS[row], "fails", failed[0][:80])
            continue
        seconds = [max(rank["seconds"] for rank in found) for found in rounds]
        ranks = [rank for found in rounds for rank in found]
        table.add_row(
            ROWS[row],
            f"{statistics.median(seconds):.3f}",
            f"{min(seconds):.3f}-{max(seconds):.3f}",
            f"{max(r['device_bytes'] for r in ranks) / 1e9:.2f}, "
            f"{max(r['device_bytes_after'] for r in ranks) / 1e9:.2f}",
            f"{max(r['host_bytes'] for r in ranks) / 1e9:.2f}",
            ", ".join(f"{rank['bytes_read'] / 1e9:.3f}" for rank in rounds[-1]),
            str(all(rank["is_equal"] for rank in rounds[0])) if "is_equal" in rounds[0][0] else "",
        )
    Console(width=180).print(table)


def main() -> None:
    """Measure all rows, or one rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="fsdp2", choices=list(NAMES))
    parser.add_argument("--model", default="7B", choices=list(SIZES))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stock-rounds", type=int, help="of Lightning's own ways, which take long")
    parser.add_argument(
        "--only", default="", help="a regular expression: only rows in whose key it is found, of " + ", ".join(ROWS)
    )
    parser.add_argument("--file", type=Path, help="the checkpoint, if it is there already; by default a temporary one")
    parser.add_argument("--json", type=Path, help="also write all measurements here")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.build:
        build_file(args.model, args.file)
        return
    if args.row:
        warnings.simplefilter("ignore")
        logging.getLogger("lightning").setLevel(logging.ERROR)
        found = measure(args.row, args.strategy, args.model, args.devices, args.file, check=args.check)
        print(json.dumps(found))
        distributed.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as folder:
        file = args.file or Path(folder, "model.pth")
        if not file.exists():
            command = [sys.executable, __file__, "--model", args.model, "--file", str(file), "--build"]
            subprocess.run(command, check=True)
        rows = [row for row in ROWS if re.search(args.only, row)]
        results: dict[str, list[Any]] = {row: [] for row in rows}
        for i in range(args.rounds):
            for row in rows:
                if row.startswith("stock") and i >= (args.stock_rounds or args.rounds):
                    continue
                results[row].append(found := run_row(args, row, file, check=i == 0))
                seconds = found if isinstance(found, str) else f"{max(rank['seconds'] for rank in found):.3f} s"
                print(f"{ROWS[row]}: {seconds}", flush=True)  # a run that is cut has said this
        weight_bytes = file.stat().st_size
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    print_table(results, args, weight_bytes)


if __name__ == "__main__":
    main()
