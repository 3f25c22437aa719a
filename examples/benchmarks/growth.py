"""How the time to build and load grows: with the bytes of a model, and with the number of its tensors.

    python examples/benchmarks/growth.py                                     # 0.1B to 13B on a GPU
    python examples/benchmarks/growth.py --models 0.1B 0.5B 1B --gigabytes 0.2    # on anything

Left: models of growing size. A line is fitted, seconds = fixed part + bytes / rate; the fixed part is what a load costs
however small it is. Right: the same bytes in 10, 1,000 and 100,000 tensors. Writes growth.json after each model, to
which a later run on the same machine adds, and growth.svg drawn from it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
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


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A panel for each kind of points that there are."""
    panels = {kind: panel for kind, panel in {"sizes": _draw_sizes, "counts": _draw_counts}.items() if found[kind]}
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    for number, (kind, panel) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        for way in dict.fromkeys(point["way"] for point in found[kind]):
            panel(axes, way, [point for point in found[kind] if point["way"] == way])
        axes.legend(fontsize=8)
    machine = next(point["machine"] for points in found.values() for point in points)
    figure.suptitle(f"{machine['device']}, {machine['cores']} cores, torch {machine['torch']}", fontsize=9)
    figure.savefig(path, metadata={"Date": None})


def _draw_sizes(axes: Axes, way: str, points: list[dict[str, Any]]) -> None:
    x = [point["num_bytes"] / 1e9 for point in points]
    (drawn,) = axes.plot(x, [point["total_s"] for point in points], "o", label=way)
    if len(points) > 2:
        fixed_s, s_per_byte = fit(points)
        label = f"{way}: {fixed_s:.2f} s + {1e-9 / s_per_byte:.1f} GB/s"
        ends = [0.0, max(x)]
        axes.plot(ends, [fixed_s + s_per_byte * 1e9 * end for end in ends], color=drawn.get_color(), label=label)
    axes.set(xlabel="GB of weights", ylabel="seconds to build and load", ylim=(0, None))


def _draw_counts(axes: Axes, way: str, points: list[dict[str, Any]]) -> None:
    x = [_num_tensors(point) for point in points]
    axes.plot(x, [point["load_s"] for point in points], "o-", label=f"{way}, load")
    axes.plot(x, [point["build_s"] for point in points], "o:", label=f"{way}, build")
    axes.set(xscale="log", yscale="log", xlabel="tensors of the same bytes", ylabel="seconds")


def known_points(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What an earlier run has left."""
    found: dict[str, list[dict[str, Any]]] = {"sizes": [], "counts": []}
    return found | json.loads(path.read_text()) if path.exists() else found


def renewed(known: list[dict[str, Any]], points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Known points of the same machine, with those that have been measured now in the place of older ones, by size."""
    machine, names = points[0]["machine"], {(point["model"], point["way"]) for point in points}
    kept = [p for p in known if p["machine"] == machine and (p["model"], p["way"]) not in names]
    return sorted([*kept, *points], key=lambda point: (_num_tensors(point), point["num_bytes"]))


def _num_tensors(point: dict[str, Any]) -> int:
    """As its name says, "1000x500"; 0 for a LLaMA."""
    count, _, numel = point["model"].partition("x")
    return int(count) if numel else 0


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
    models = [("sizes", model) for model in args.models]
    models += [("counts", f"{count}x{numel // count}") for count in args.tensors]
    args.output.mkdir(parents=True, exist_ok=True)
    found = known_points(args.output / "growth.json")
    for kind, model in models:
        found[kind] = renewed(found[kind], measure(model, args))
        (args.output / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, args.output / "growth.svg")
    for point in [*found["sizes"], *found["counts"]]:
        build_s = point["build_s"] or 0.0
        print(f"{point['model']:>16} {point['way']:>16}: {build_s:8.3f} s to build, {point['load_s']:8.3f} s to load")


if __name__ == "__main__":
    main()
