"""The bar chart: seconds and memory of each way; lower is better."""

from __future__ import annotations

from pathlib import Path

from lightning_efficient_init.bench.results import Line, Results
from lightning_efficient_init.bench.ways import WAYS
from lightning_efficient_init.errors import UsageError

_COLORS = {"Lightning": "#8c96a6", "ours": "#792ee5", "others": "#c9cfd8"}
_LINE_INCHES = 0.34


def draw(results: Results, folder: str, *, log: bool = False) -> list[str]:
    """Write the chart as PNG and SVG, and return the paths.

    Args:
        results: What to draw; warm rows, or cold ones where there are no others.
        folder: Where to write.
        log: Whether the axis of seconds is logarithmic.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise UsageError(
            "the chart needs matplotlib, which is not installed: pip install 'lightning_efficient_init[bench]'."
        ) from error
    lines = results.lines()
    lines = [line for line in lines if line.cache == lines[0].cache][::-1]
    figure = Figure(figsize=(11, 1.6 + _LINE_INCHES * len(lines)), layout="constrained")
    seconds, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    labels = [f"{line.way}" for line in lines]
    bars = seconds.barh(labels, [line.total_s for line in lines], color=[_COLORS[WAYS[x.way].group] for x in lines])
    seconds.bar_label(bars, fmt="%.2f", padding=3)
    seconds.set(xlabel="seconds to build and load (lower is better)", xscale="log" if log else "linear")
    seconds.margins(x=0.15)
    _draw_memory(memory, lines, labels)
    figure.suptitle(f"{results.title}; files {lines[0].cache}", fontsize=9)
    paths = [str(Path(folder) / f"bench.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.endswith("svg") else None)
    return paths


def _draw_memory(axes: object, lines: list[Line], labels: list[str]) -> None:
    """Three thin bars for each way."""
    kinds = {"device_bytes": "device", "host_bytes": "host, anonymous", "mapped_bytes": "host, mapped"}
    colors = ("#41b6a6", "#f2a541", "#f7dcb4")
    for i, ((name, label), color) in enumerate(zip(kinds.items(), colors, strict=True)):
        values = [max(getattr(row, name) for row in line.rows) / 1e9 for line in lines]
        if any(values):
            places = [place + 0.26 * (1 - i) for place in range(len(labels))]
            axes.barh(places, values, height=0.24, color=color, label=label)  # type: ignore[attr-defined]
    axes.set(xlabel="GB of memory at the peak")  # type: ignore[attr-defined]
    axes.legend(loc="lower right", fontsize=8)  # type: ignore[attr-defined]
