"""Writes the tables of the pages from the JSON that ``efficient-init bench`` has left here.

    efficient-init bench --model 7B --rounds 3 --output examples/benchmarks/h100-7B
    python examples/benchmarks/tables.py

A table stands between a line ``<!-- table: examples/benchmarks/h100-7B/bench.json -->`` and ``<!-- end -->``; what is
between them is replaced. Paths are those from the root of the project.
"""

from __future__ import annotations

import re
from pathlib import Path

from lightning_efficient_init.bench.results import Line, Results
from lightning_efficient_init.bench.ways import WAYS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(results: Results) -> str:
    """What was loaded on what, and a row for each way."""
    is_on_device = results.task.accelerator == "cuda"
    headings = ["", "", "time", *["GPU peak"] * is_on_device, "growth of anonymous memory", "of mapped files"]
    rows = [headings, ["---"] * len(headings), *(row(line, is_on_device=is_on_device) for line in results.lines())]
    limits = "; ".join(results.limits_in_words())
    parts = [f"{results.title}. Median and range of {results.num_rounds} rounds. Limits of the machine: {limits}.", ""]
    parts += [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([*parts, "", *(f"- {line}" for line in results.comparisons())]) + "\n"


def row(line: Line, *, is_on_device: bool) -> list[str]:
    """The cells of one way."""
    seconds = [found.total_s for found in line.rows]
    spread = f" ({min(seconds):.2f} to {max(seconds):.2f})" * (len(seconds) > 1)
    peaks = ["device_bytes"] * is_on_device + ["host_bytes", "mapped_bytes"]
    return [
        f"{WAYS[line.way].group}: {WAYS[line.way].title}",
        f"`{line.way}`" + (", cold" if line.cache == "cold" else ""),
        f"{line.total_s:.2f} s{spread}",
        *(f"{max(getattr(found, name) for found in line.rows) / 1e9:.2f} GB" for name in peaks),
    ]


def filled(text: str) -> str:
    """A page with its tables as the JSON has them."""
    return TABLE.sub(lambda found: f"{found[1]}{table(Results.read(str(ROOT / found[2])))}{found[3]}", text)


def main() -> None:
    """Fill all pages."""
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
