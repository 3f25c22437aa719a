"""Measure this package, and Lightning without it, on this machine: seconds, memory, and the share of its limits."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_efficient_init.bench.chart import draw
from lightning_efficient_init.bench.results import HEADINGS, NUMBERS, Results
from lightning_efficient_init.bench.run import Options, run_bench
from lightning_efficient_init.bench.task import DTYPES
from lightning_efficient_init.bench.ways import GROUPS, WAYS
from lightning_efficient_init.cli.console import console, plain, table
from lightning_efficient_init.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    default = Options()
    parser.add_argument(
        "--model",
        default=default.model,
        help="tiny (the default), 0.1B, 1B, 7B, 13B; many or 100000x10000 (tensors x elements); a litgpt "
        "configuration, a Hugging Face name or folder, or MODULE:CALLABLE",
    )
    parser.add_argument("--checkpoint", help="existing weights of that model; by default random ones are written")
    parser.add_argument(
        "--ways", nargs="+", default=[*default.ways], metavar="WAY", help=f"some of {', '.join([*GROUPS, *WAYS])}"
    )
    parser.add_argument("--rounds", type=int, default=default.rounds, help="runs of each row (default: %(default)s)")
    parser.add_argument("--precision", default=default.precision, choices=[*DTYPES])
    parser.add_argument("--accelerator", default=default.accelerator, choices=["auto", "cpu", "cuda"])
    parser.add_argument("--folder", help="where the weights are written, and deleted afterwards")
    parser.add_argument("--no-cold", dest="cold", action="store_false", help="leave out files that are not cached")
    parser.add_argument("--log", action="store_true", help="a logarithmic axis in the chart")
    parser.add_argument(
        "--output",
        default="efficient-init-bench",
        help="folder for JSON, CSV, Markdown and the chart (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print, write."""
    names = list(Options.__dataclass_fields__)
    results = _measure(Options(**{name: getattr(options, name) for name in names}))
    out = console()
    _print(results, out)
    if not results.rows:
        return 1
    written = results.write(options.output)
    try:
        written += draw(results, options.output, log=options.log)
    except UsageError as error:
        out.print(f"No chart: {error}")
    out.print()
    out.print(plain(f"Written: {', '.join(written)}"))
    return 0


def _measure(options: Options) -> Results:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("starting", total=None)

        def show(what: str, number: int, total: int) -> None:
            progress.update(bar, description=what, completed=number - 1, total=total)

        return run_bench(options, show)


def _print(results: Results, out: Console) -> None:
    rows = table(*HEADINGS, title=results.title, numbers=NUMBERS)
    for cells in results.cells():
        rows.add_row(*map(plain, cells))
    out.print(rows)
    out.print("\nThe machine's limits")
    for limit in results.limits_in_words():
        out.print(f"  {limit}")
    if results.not_run or results.notes:
        out.print("\nNot run")
    for line in [*(f"{name}: {reason}" for name, reason in results.not_run.items()), *results.notes]:
        out.print(plain(f"  {line}"))
