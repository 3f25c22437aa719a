"""Tables, files, limits and the page cache."""

import csv
import io
import json

import pytest
import torch

from lightning_efficient_init.bench import cache, limits
from lightning_efficient_init.bench.chart import draw
from lightning_efficient_init.bench.llama import build
from lightning_efficient_init.bench.results import HEADINGS, Results
from lightning_efficient_init.bench.row import Row
from lightning_efficient_init.bench.task import Task

GB = 10**9


def row(way, total_s, cache="warm", **changes):
    values = {"build_s": 0.5, "load_s": total_s - 0.5, "ends_on": "cpu", "device_bytes": 0, "host_bytes": GB}
    values["device_end_bytes"] = 0
    return Row(way, cache, total_s=total_s, **{**values, "mapped_bytes": 0, "is_equal": None, **changes})


@pytest.fixture
def results():
    results = Results(
        {"device": "CPU", "cores": 2, "torch": "2", "lightning": "2"},
        Task("1B", {"pth": "a"}, "bf16-true", "cpu", 10 * GB),
        3,
    )
    results.rows = [
        row("ours-load_raw", 1.0, is_equal=True),
        row("load_raw", 9.0),
        row("ours-load_raw", 2.0),
        row("ours-load_raw", 6.0, host_bytes=3 * GB),
    ]
    results.rows += [row("ours-mmap", 1.0), row("ours-load_raw", 20.0, "cold")]
    results.limits = {"page cache to new memory": [9 * GB, 10 * GB, 20 * GB], "disk": [1 * GB]}
    results.not_run = {"runai": "needs runai_model_streamer, which is not installed"}
    return results


def test_lines_are_medians_of_time_and_maxima_of_memory(results):
    ours = next(line for line in results.lines() if (line.way, line.cache) == ("ours-load_raw", "warm"))
    assert (ours.total_s, ours.build_s, ours.load_s) == (2.0, 0.5, 1.5)
    cells = dict(zip(HEADINGS, next(c for c in results.cells() if c[0] == "ours-load_raw"), strict=True))
    assert cells["anonymous, GB"] == "3.000"
    assert cells["range"] == "1.000 to 6.000"
    assert cells["GB/s"] == "5.00"
    assert cells["values"] == "equal"


def test_shares_are_of_the_limit_that_fits_the_row(results):
    shares = {(line.way, line.cache): results.share(line) for line in results.lines()}
    assert shares["ours-load_raw", "warm"] == pytest.approx(5 / 10)
    assert shares["ours-load_raw", "cold"] == pytest.approx(0.5 / 1)
    assert shares["ours-mmap", "warm"] is None  # it copies nothing


def test_a_value_that_differs_in_any_round_shows(results):
    results.rows.append(row("ours-load_raw", 1.0, is_equal=False))
    assert next(cells for cells in results.cells() if cells[0] == "ours-load_raw")[-1] == "differ"


def test_ways_are_compared_with_those_they_stand_beside(results):
    results.rows += [row("safetensors", 0.1), row("safetensors-copy", 4.0), row("accelerate", 5.0), row("lazy", 3.0)]
    assert results.comparisons() == [
        "ours-load_raw, warm: 4.50 times as fast as load_raw (load: 5.67)",
        "ours-load_raw, warm: 1.50 times as fast as lazy (load: 1.67)",
        # safetensors and accelerate end in the file's mapping
        "ours-load_raw, warm: 2.00 times as fast as the fastest peer, safetensors-copy (load: 2.33)",
    ]
    assert "- ours-load_raw, warm: 4.50 times" in results.as_markdown()


def test_results_are_read_back(results, tmp_path):
    results.write(str(tmp_path))
    assert Results.read(str(tmp_path / "bench.json")) == results


def test_files_hold_every_row_and_what_did_not_run(results, tmp_path):
    results.write(str(tmp_path / "new"))
    found = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [r["total_s"] for r in found["rows"]] == [r.total_s for r in results.rows]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "new" / "bench.csv").read_text())))
    assert [float(r["total_s"]) for r in rows] == [r.total_s for r in results.rows]
    markdown = (tmp_path / "new" / "bench.md").read_text()
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert widths == {len(HEADINGS) + 1}
    assert "- runai: needs runai_model_streamer" in markdown
    assert "- disk: 1.00 GB/s" in markdown


@pytest.mark.parametrize("log", [False, True])
def test_the_chart_names_every_warm_row(results, log, tmp_path):
    paths = draw(results, str(tmp_path), log=log)
    assert [path.rsplit(".", 1)[1] for path in paths] == ["png", "svg"]
    svg = (tmp_path / "bench.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in ("ours-load_raw", "load_raw", "ours-mmap"))
    assert "lower is better" in svg


def test_limits_read_every_byte(tmp_path, bytes_read):
    sizes = {"0": 0, "1": 1, "2": (8 << 20) + 1, "3": 20 << 20}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    files, total = [str(tmp_path / name) for name in sizes], sum(sizes.values())
    for measure in (limits.read_rate, limits.fill_rate):
        before = bytes_read()
        assert measure(files) > 0
        assert 0 <= bytes_read() - before - total < 1 << 16


@pytest.mark.gpu
def test_limits_of_a_device_are_measured(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * (40 << 20))
    task = Task("tiny", {}, "bf16-true", "cuda", 0)
    assert limits.device_rate(task) > 1e9
    assert limits.ring_rate([str(tmp_path / "a")], task) > 1e8


def test_files_leave_the_page_cache_and_come_back(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * (16 << 20))
    assert cache.cached_share([str(path)]) in (1.0, None)
    cache.evict([str(path)])
    share = cache.cached_share([str(path)])
    if share is None or share > 0.5:
        pytest.skip("this file system keeps files in the page cache")
    assert share < 0.05
    cache.warm([str(path)])
    assert cache.cached_share([str(path)]) == 1.0


@pytest.mark.parametrize(("name", "count", "numel"), [("3x5", 3, 15), ("250x2", 250, 500), ("many", 10_000, 1_360_000)])
def test_models_of_many_tensors_have_as_many_as_they_say(name, count, numel):
    with torch.device("meta"):
        parameters = list(build(name).parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (count, numel)


@pytest.mark.parametrize(
    ("name", "billions"), [("0.1B", 0.13), ("0.5B", 0.49), ("1B", 1.3), ("7B", 6.74), ("13B", 13.0)]
)
def test_sizes_are_what_their_names_say(name, billions):
    with torch.device("meta"):
        numel = sum(p.numel() for p in build(name).parameters())
    assert numel / 1e9 == pytest.approx(billions, rel=0.05)
