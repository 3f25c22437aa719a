"""What deferred construction costs: recording Llama 7B and 70B, and materializing against building eagerly.

    python examples/benchmarks/deferred.py                       # 1B is materialized; 5 GB of memory
    python examples/benchmarks/deferred.py --materialize 7B      # 28 GB of memory, on the GPU if there is one

Every measurement runs in a fresh process, and the rounds are interleaved. Memory is the growth of the process's
anonymous memory (or of the GPU's) from the moment libraries are imported; recording is to stay below a GB, and materializing a
model of N bytes below N and one and a half times its largest parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_efficient_init import deferred_init, materialize
from lightning_efficient_init.memory import PeakMemory

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 22, "num_attention_heads": 16},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}


def build(size: str) -> nn.Module:
    """The Llama of transformers, unmodified, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 (only the measuring process needs it)

    return LlamaForCausalLM(LlamaConfig(vocab_size=32000, **SIZES[size]))


def record(size: str, device: torch.device) -> tuple[nn.Module, float, float]:
    """Record a model; seconds until it is built, and until the context is left."""
    start = time.perf_counter()
    with deferred_init(), device:
        model = build(size)
        built = time.perf_counter()
    return model, built - start, time.perf_counter() - start


def measure_record(size: str, device: torch.device) -> dict[str, float]:
    """Time and memory of recording."""
    build("tiny")  # imports
    with PeakMemory([device], in_background=True) as memory:
        model, built_s, elapsed_s = record(size, device)
    return {
        "num_parameters": sum(1 for _ in model.parameters()),
        "num_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "built_s": built_s,
        "elapsed_s": elapsed_s,
        "host_bytes": memory.host_bytes,
    }


def measure_eager(size: str, device: torch.device) -> dict[str, float]:
    """Time and memory of building the model as ever."""

    def construct() -> nn.Module:
        with device:
            return build(size)

    return _measure(construct, device)


def measure_materialize(size: str, device: torch.device) -> dict[str, float]:
    """Time and memory of materializing what was recorded before."""
    model, _, _ = record(size, device)
    return _measure(lambda: materialize(model), device)


def _measure(construct: Callable[[], nn.Module], device: torch.device) -> dict[str, float]:
    build("tiny")  # imports
    _synchronize(device)
    with PeakMemory([device], in_background=True) as memory:
        start = time.perf_counter()
        model = construct()
        _synchronize(device)
        elapsed_s = time.perf_counter() - start
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.host_bytes
    return {"elapsed_s": elapsed_s, "peak_bytes": peak, "num_bytes": sum(sizes), "largest_bytes": max(sizes)}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.zeros(1, device=device)
        torch.cuda.synchronize(device)


MEASURES = {"record": measure_record, "eager": measure_eager, "materialize": measure_materialize}


def in_fresh_process(what: str, size: str, device: str) -> dict[str, float]:
    """One measurement."""
    command = [sys.executable, __file__, "--measure", what, "--size", size, "--device", device]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]


def median(rounds: list[dict[str, float]], key: str) -> float:
    """Over all rounds."""
    return statistics.median(r[key] for r in rounds)


def print_recording(results: dict[str, list[dict[str, float]]], device: str) -> None:
    """Time and memory of recording."""
    table = Table(
        title=f"Recording the Llama of transformers for {device}, torch {torch.__version__}, {os.cpu_count()} cores"
    )
    for heading in ("size", "parameters", "GB when materialized", "built after, s", "left after, s", "host growth, MB"):
        table.add_column(heading)
    for size, rounds in results.items():
        table.add_row(
            size,
            str(int(rounds[0]["num_parameters"])),
            f"{rounds[0]['num_bytes'] / 1e9:.1f}",
            f"{median(rounds, 'built_s'):.2f}",
            f"{median(rounds, 'elapsed_s'):.2f}",
            f"{max(r['host_bytes'] for r in rounds) / 1e6:.0f}",
        )
    Console(width=140).print(table)


def print_materializing(results: dict[str, list[dict[str, float]]], size: str, device: str) -> None:
    """Materializing beside eager construction."""
    first = results["eager"][0]
    bound = first["num_bytes"] + 1.5 * first["largest_bytes"]
    title = (
        f"{size} on {device}, {first['num_bytes'] / 1e9:.2f} GB; N + 1.5x the largest parameter: {bound / 1e9:.2f} GB"
    )
    table = Table(title=title)
    for heading in ("way", "seconds", "range", "of eager", "peak, GB"):
        table.add_column(heading)
    eager_s = median(results["eager"], "elapsed_s")
    for way, rounds in results.items():
        seconds = [r["elapsed_s"] for r in rounds]
        table.add_row(
            way,
            f"{statistics.median(seconds):.2f}",
            f"{min(seconds):.2f}-{max(seconds):.2f}",
            f"{statistics.median(seconds) / eager_s:.2f}",
            f"{max(r['peak_bytes'] for r in rounds) / 1e9:.2f}",
        )
    Console(width=140).print(table)


def run_rounds(cases: dict[Any, tuple[str, str]], device: str, num_rounds: int) -> dict[Any, list[dict[str, float]]]:
    """All cases in turn, as often as asked for."""
    results: dict[Any, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(num_rounds):
        for case, (what, size) in cases.items():
            results[case].append(in_fresh_process(what, size, device))
    return results


def main() -> None:
    """Measure all, or (in a fresh process) one thing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs="*", default=["7B", "70B"], choices=SIZES, help="sizes to record")
    parser.add_argument("--materialize", default="1B", choices=SIZES, help="the size to build eagerly and materialize")
    parser.add_argument("--device", action="append", help="by default the CPU, and the GPU if there is one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=SIZES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    devices = args.device or ["cpu", *["cuda:0"] * torch.cuda.is_available()]
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args.size, torch.device(devices[0]))))
        return
    for device in devices:
        recorded = run_rounds({size: ("record", size) for size in args.record}, device, args.rounds)
        print_recording(recorded, device)
        ways = {way: (way, args.materialize) for way in ("eager", "materialize")}
        print_materializing(run_rounds(ways, device, args.rounds), args.materialize, device)


if __name__ == "__main__":
    main()
