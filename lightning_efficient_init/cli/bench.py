"""Measure this package, and Lightning without it, on this machine: seconds, memory, and the share of its limits."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lightning_efficient_init.bench.chart import draw
from lightning_efficient_init.bench.processes import StartMethod
from lightning_efficient_init.bench.results import HEADINGS, NUMBERS, Results
from lightning_efficient_init.bench.row import Row
from lightning_efficient_init.bench.run import Bench, Options
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
        help="tiny (the default), 0.1B, 0.5B, 1B, 7B, 13B; many or 100000x10000 (tensors x elements); a litgpt "
        "configuration, a Hugging Face name or folder, or MODULE:CALLABLE",
    )
    parser.add_argument("--checkpoint", help="existing weights of that model; by default random ones are written")
    parser.add_argument(
        "--ways", nargs="+", default=[*default.ways], metavar="WAY", help=f"some of {', '.join([*GROUPS, *WAYS])}"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="of these, the ones in whose name or title it is")
    parser.add_argument("--rounds", type=int, default=default.rounds, help="runs of each row (default: %(default)s)")
    parser.add_argument("--stock-rounds", type=int, help="runs of the ways that are not ours, which take long")
    parser.add_argument("--precision", default=default.precision, choices=[*DTYPES])
    parser.add_argument("--accelerator", default=default.accelerator, choices=["auto", "cpu", "cuda"])
    parser.add_argument("--folder", help="where the weights are written, and deleted afterwards")
    parser.add_argument(
        "--cold",
        action=argparse.BooleanOptionalAction,
        help="also load files that are not cached (default: if there are more than 100 MiB)",
    )
    parser.add_argument("--limit-minutes", type=float, help="stop in time, with what there is until then")
    parser.add_argument("--log", action="store_true", help="a logarithmic axis in the chart")
    parser.add_argument(
        "--output",
        default="efficient-init-bench",
        help="folder for JSON, CSV, Markdown and the chart (default: %(default)s)",
    )


def run(options: argparse.Namespace) -> int:
    """Measure, print, write; 130 if a signal ended it, with what there was until then."""
    _require_folder(options.output)
    out = console()
    results, is_cut = _measure(options, out)
    _print(results, out)
    if not results.rows:
        return 1
    written = results.write(options.output)
    try:
        written += draw(results, options.output, log=options.log)
    except UsageError as error:
        out.print(plain(f"No chart: {error}"))
    out.print()
    out.print(plain(f"Written: {', '.join(written)}"))
    return 130 if is_cut else 0


def _require_folder(path: str) -> None:
    """Raise unless it can be written, or made."""
    whole = Path(path).absolute()
    nearest = next(folder for folder in (whole, *whole.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        found = "a folder that cannot be written" if nearest.is_dir() else "a file"
        raise UsageError(f"output {path!r}: expected a folder, found {found}, {nearest}. Pass another --output.")


def _measure(options: argparse.Namespace, out: Console) -> tuple[Results, bool]:
    """All that was measured, and whether a signal ended it."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # It has no thread that refreshes it, and so this process can be forked.
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,
        redirect_stdout=sys.stdout.isatty(),
    )
    number = bar.add_task("starting", total=None)

    def on_step(what: str, step: int, total: int) -> None:
        bar.update(number, description=what, completed=step - 1, total=total, refresh=True)

    def on_row(row: Row) -> None:
        out.print(plain(f"{row.total_s:9.3f} s  {row.way}, {row.cache}"))
        bench.results.write(options.output)  # whatever ends this, what was measured is there

    asked: dict[str, Any] = {name: getattr(options, name) for name in Options.__dataclass_fields__}
    start_method: StartMethod = "fork" if options.is_program else "forkserver"
    bench = Bench(Options(**asked), on_step=on_step, on_row=on_row, start_method=start_method)
    with bar, _handled(bench.stop):
        return bench.run(), bench.is_stopped


@contextmanager
def _handled(stop: Callable[[], object]) -> Iterator[None]:
    """Who asks this process to end, from the keyboard or otherwise, gets what there is."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda *_: stop())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print(results: Results, out: Console) -> None:
    rows = table(*HEADINGS, title=results.title, numbers=NUMBERS)
    for cells in results.cells():
        rows.add_row(*map(plain, cells))
    out.print(rows)
    for line in results.comparisons():
        out.print(f"  {line}")
    out.print("\nThe machine's limits")
    for limit in results.limits_in_words():
        out.print(f"  {limit}")
    if results.not_run or results.notes:
        out.print("\nNot run")
    for line in [*(f"{name}: {reason}" for name, reason in results.not_run.items()), *results.notes]:
        out.print(plain(f"  {line}"))
