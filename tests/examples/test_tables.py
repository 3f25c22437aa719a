"""The tables of the pages say what the JSON beside the benchmarks says."""

import json
import re
from dataclasses import asdict

import pytest

pytest.importorskip("matplotlib")

from benchmarks import tables

from lightning_efficient_init.bench.results import Results
from lightning_efficient_init.bench.row import Row
from lightning_efficient_init.bench.task import Task


def test_pages_are_as_the_json_has_them():
    for page in tables.PAGES:
        assert tables.filled(page.read_text()) == page.read_text(), f"python {tables.__file__} writes {page}"


def test_figures_are_drawn_from_json_that_is_beside_them():
    for figure in tables.ROOT.glob("examples/benchmarks/**/*.svg"):
        assert figure.with_suffix(".json").exists()


def test_json_names_no_folder_of_the_machine_it_comes_from():
    for path in tables.ROOT.glob("examples/benchmarks/**/*.json"):
        assert not re.search(r'"/\w+/', path.read_text()), path


def test_a_table_is_replaced_and_what_is_around_it_stays(tmp_path, monkeypatch):
    machine = {"device": "CPU", "cores": 2, "torch": "2", "lightning": "2"}
    rows = [
        Row("ours-load_raw", state, 0.5, 1.5, seconds, "cuda:0", 3 * 10**9, 0, 10**8, 0, True)
        for state, seconds in (("warm", 2.0), ("warm", 3.0), ("warm", 2.5), ("cold", 9.0))
    ]
    results = Results(machine, Task("7B", {}, "bf16-true", "cuda", 10**10), 3, rows, {"disk": [10**9]})
    (tmp_path / "bench.json").write_text(json.dumps(asdict(results)))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    text = tables.filled("before\n<!-- table: bench.json -->\nstale\n<!-- end -->\nafter\n")
    assert "stale" not in text
    assert text.startswith("before\n<!-- table: bench.json -->\n7B, bf16-true, 10.000 GB; CPU")
    assert text.endswith("\n<!-- end -->\nafter\n")
    name = "ours: init_module(empty_init=True), load_raw"
    assert f"| {name} | `ours-load_raw` | 2.50 s (2.00 to 3.00) | 3.00 GB | 0.10 GB | 0.00 GB |" in text
    assert "| `ours-load_raw`, cold | 9.00 s |" in text
    assert tables.filled(text) == text
