"""How the time to build and load grows: with the bytes of a model, and with the number of its tensors.

    python examples/benchmarks/growth.py                                     # 0.1B to 13B on a GPU
    python examples/benchmarks/growth.py --models 0.1B 0.5B 1B --gigabytes 0.2    # on anything

Left: models of growing size. A line is fitted, seconds = fixed part + bytes / rate; the fixed part is what a load costs
however small it is. Right: the same bytes in 10, 1,000 and 100,000 tensors. Writes growth.json, and growth.svg drawn
from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from lightning_efficient_init.bench.run import Options, run_bench

TENSORS = (10, 1_000, 100_000)
BYTES_PER_ELEMENT = 2


def measure(model: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One point for each way: the medians of its rounds."""
    options = Options(model, None, args.ways, args.rounds, accelerator=args.accelerator, folder=args.folder, cold=False)
    with Console(stderr=True).status("") as status:
        results = run_bench(options, lambda what, number, total: status.update(f"{model}: {what} ({number}/{total})"))
    for name, reason in results.not_run.items():
        print(f"{model}: {name} did not run: {reason}")
    return [
        {
            "model": model,
            "way": line.way,
            "num_bytes": results.task.num_bytes,
            "build_s": line.build_s,
            "load_s": line.load_s,
            "total_s": line.total_s,
            "machine": results.machine,
        }
        for line in results.lines()
    ]


def fit(points: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of the fixed part, and seconds per byte, by least squares on relative errors."""
    seconds = torch.tensor([point["total_s"] for point in points], dtype=torch.float64)
    num_bytes = torch.tensor([point["num_bytes"] for point in points], dtype=torch.float64)
    columns = torch.stack([torch.ones_like(num_bytes), num_bytes], dim=1) / seconds[:, None]
    fixed_s, s_per_byte = torch.linalg.lstsq(columns, torch.ones_like(seconds)[:, None]).solution.flatten().tolist()
    return fixed_s, s_per_byte


def draw(sizes: list[dict[str, Any]], counts: list[dict[str, Any]], path: Path) -> None:
    """Both panels."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for way in dict.fromkeys(point["way"] for point in sizes):
        points = [point for point in sizes if point["way"] == way]
        x = [point["num_bytes"] / 1e9 for point in points]
        (drawn,) = left.plot(x, [point["total_s"] for point in points], "o", label=way)
        if len(points) > 2:
            fixed_s, s_per_byte = fit(points)
            label = f"{way}: {fixed_s:.2f} s + {1e-9 / s_per_byte:.1f} GB/s"
            ends = [0.0, max(x)]
            left.plot(ends, [fixed_s + s_per_byte * 1e9 * end for end in ends], color=drawn.get_color(), label=label)
    left.set(xlabel="GB of weights", ylabel="seconds to build and load", ylim=(0, None))
    left.legend(fontsize=8)
    for way in dict.fromkeys(point["way"] for point in counts):
        points = [point for point in counts if point["way"] == way]
        x = [int(point["model"].split("x")[0]) for point in points]
        right.plot(x, [point["load_s"] for point in points], "o-", label=f"{way}, load")
        right.plot(x, [point["build_s"] for point in points], "o:", label=f"{way}, build")
    right.set(xscale="log", yscale="log", xlabel="tensors of the same bytes", ylabel="seconds")
    right.legend(fontsize=8)
    machine = (sizes or counts)[0]["machine"]
    figure.suptitle(f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}", fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["0.1B", "1B", "7B", "13B"])
    parser.add_argument("--tensors", nargs="*", type=int, default=TENSORS)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="bytes of all tensors together")
    parser.add_argument("--ways", nargs="+", default=["ours-load_raw", "mmap"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--folder", help="where the weights are written, and deleted afterwards")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args(arguments)
    numel = round(args.gigabytes * 1e9 / BYTES_PER_ELEMENT)
    sizes = [point for model in args.models for point in measure(model, args)]
    counts = [point for count in args.tensors for point in measure(f"{count}x{numel // count}", args)]
    (args.output / "growth.json").write_text(json.dumps({"sizes": sizes, "counts": counts}, indent=1))
    draw(sizes, counts, args.output / "growth.svg")
    for point in [*sizes, *counts]:
        build_s = point["build_s"] or 0.0
        print(f"{point['model']:>16} {point['way']:>16}: {build_s:8.3f} s to build, {point['load_s']:8.3f} s to load")


if __name__ == "__main__":
    main()
