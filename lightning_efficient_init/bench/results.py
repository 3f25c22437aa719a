"""What was measured: as a table, JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_efficient_init.bench.row import Row
from lightning_efficient_init.bench.task import Task
from lightning_efficient_init.bench.ways import WAYS

_JUDGES = {
    ("warm", "cuda"): "page cache to device",
    ("warm", "cpu"): "page cache to new memory",
    ("cold", "cuda"): "disk",
    ("cold", "cpu"): "disk",
}
HEADINGS = (
    "way", "", "files", "total, s", "range", "build, s", "load, s", "GB/s", "of the limit", "device peak, GB",
    "device end, GB", "anonymous, GB", "mapped, GB", "ends on", "values",
)  # fmt: skip
NUMBERS = HEADINGS[3:13]


@dataclass(frozen=True, slots=True)
class Line:
    """All rounds of one way, with warm or with cold files.

    Attributes:
        way: Its name.
        cache: "warm" or "cold".
        rows: The rounds.
    """

    way: str
    cache: str
    rows: Sequence[Row]

    @property
    def total_s(self) -> float:
        """Median seconds to build and load."""
        return statistics.median(row.total_s for row in self.rows)

    @property
    def load_s(self) -> float:
        """Median seconds to load."""
        return statistics.median(row.load_s for row in self.rows)

    @property
    def build_s(self) -> float | None:
        """Median seconds to build, or None where that is one step with loading."""
        seconds = [row.build_s for row in self.rows if row.build_s is not None]
        return statistics.median(seconds) if seconds else None

    def faster_than(self, other: Line) -> str:
        """As "4.0 times as fast as mmap (loading alone: 5.1)"."""
        kind = "the fastest peer, " if WAYS[other.way].group == "others" else ""
        alone = "" if self.build_s is None or other.build_s is None else f" (load: {other.load_s / self.load_s:.2f})"
        return f"{other.total_s / self.total_s:.2f} times as fast as {kind}{other.way}{alone}"


@dataclass(slots=True)
class Results:
    """A benchmark's measurements.

    Attributes:
        machine: What it ran on.
        task: What was loaded.
        num_rounds: How often each row was to run.
        rows: The measurements, in the order in which they were made.
        limits: Name of a limit of the machine to bytes per second, one for each round.
        not_run: Name of a way to the reason.
        notes: What else there is to say.
    """

    machine: dict[str, Any]
    task: Task
    num_rounds: int
    rows: list[Row] = field(default_factory=list)
    limits: dict[str, list[float]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What was loaded, and on what."""
        return (
            f"{self.task.model}, {self.task.precision}, {self.task.num_bytes / 1e9:.3f} GB; {self.machine['device']}, "
            f"{self.machine['cores']} cores, torch {self.machine['torch']}, Lightning {self.machine['lightning']}"
        )

    def lines(self) -> list[Line]:
        """One for each way and state of the cache: warm first, ways in the order of `WAYS`."""
        return [
            Line(way, cache, rows)
            for cache in ("warm", "cold")
            for way in WAYS
            if (rows := [row for row in self.rows if (row.way, row.cache) == (way, cache)])
        ]

    def share(self, line: Line) -> float | None:
        """The line's rate as a share of the machine's limit, or None for ways that copy nothing."""
        limit = self.limits.get(_JUDGES[line.cache, self.task.accelerator])
        if not limit or self.task.accelerator in WAYS[line.way].mapped_on:
            return None
        return self.task.num_bytes / line.total_s / statistics.median(limit)

    def cells(self) -> list[list[str]]:
        """The table: one list of `HEADINGS` for each line."""
        return [self._cells_of(line) for line in self.lines()]

    def _cells_of(self, line: Line) -> list[str]:
        way, rows, share = WAYS[line.way], line.rows, self.share(line)
        seconds = [row.total_s for row in rows]
        return [
            line.way,
            f"{way.group}: {way.title}",
            line.cache,
            f"{line.total_s:.3f}",
            f"{min(seconds):.3f} to {max(seconds):.3f}",
            "" if line.build_s is None else f"{line.build_s:.3f}",
            f"{line.load_s:.3f}",
            f"{self.task.num_bytes / line.total_s / 1e9:.2f}",
            "" if share is None else f"{share:.0%}",
            *(f"{max(getattr(row, name) for row in rows) / 1e9:.3f}" for name in _PEAKS),
            rows[0].ends_on,
            _verdict(rows),
        ]

    def comparisons(self) -> list[str]:
        """How many times as fast our ways are as those that they stand beside, one sentence each."""
        by_way = {(line.way, line.cache): line for line in self.lines()}
        return [
            f"{line.way}, {line.cache}: {line.faster_than(other)}"
            for line in self.lines()
            for name in WAYS[line.way].beside
            if (other := by_way.get((name, line.cache)) if name != "others" else self._fastest_peer(line.cache))
        ]

    def _fastest_peer(self, cache: str) -> Line | None:
        peers = [line for line in self.lines() if line.cache == cache and WAYS[line.way].group == "others"]
        owned = [line for line in peers if self.task.accelerator not in WAYS[line.way].mapped_on]
        return min(owned, key=lambda line: line.total_s, default=None)

    def limits_in_words(self) -> list[str]:
        """The machine's limits, one sentence each."""
        return [f"{name}: {statistics.median(rates) / 1e9:.2f} GB/s" for name, rates in self.limits.items()]

    def as_json(self) -> str:
        """Everything."""
        return json.dumps(asdict(self), indent=1)

    def as_csv(self) -> str:
        """Every row of every round."""
        file = io.StringIO()
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return file.getvalue()

    def as_markdown(self) -> str:
        """The table, the limits, and what did not run."""
        marks = ["---:" if heading in NUMBERS else "---" for heading in HEADINGS]
        rows = [HEADINGS, marks, *self.cells()]
        parts = [f"{self.title}. Median of {self.num_rounds} rounds; every row is a fresh process.", ""]
        parts += [f"| {' | '.join(row)} |" for row in rows]
        parts += ["", *(f"- {line}" for line in self.comparisons())] if self.comparisons() else []
        parts += ["", "Limits of the machine:", "", *(f"- {limit}" for limit in self.limits_in_words())]
        left_out = [*(f"{name}: {reason}" for name, reason in self.not_run.items()), *self.notes]
        if left_out:
            parts += ["", "Not run:", "", *(f"- {reason}" for reason in left_out)]
        return "\n".join(parts) + "\n"

    @classmethod
    def read(cls, path: str) -> Results:
        """What `as_json` has written."""
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**found, "task": Task(**found["task"]), "rows": [Row(**row) for row in found["rows"]]})

    def write(self, folder: str) -> list[str]:
        """Write JSON, CSV and Markdown, and return the paths."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        texts = {"bench.json": self.as_json(), "bench.csv": self.as_csv(), "bench.md": self.as_markdown()}
        for name, text in texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        return [str(Path(folder) / name) for name in texts]


_PEAKS = ("device_bytes", "device_end_bytes", "host_bytes", "mapped_bytes")


def _verdict(rows: Sequence[Row]) -> str:
    found = {row.is_equal for row in rows} - {None}
    return "differ" if False in found else "equal" if found else ""
