"""The figure of how cost grows, on a small scale, and its fit."""

import json

import pytest

pytest.importorskip("matplotlib")

from benchmarks import growth


def test_points_are_measured_and_drawn(tmp_path, capsys):
    sizes = ["--models", "1x1000", "1x100000", "1x1000000", "--tensors", "10", "--gigabytes", "0.001"]
    growth.main([*sizes, "--ways", "ours-load_raw", "--rounds", "1", "--accelerator", "cpu", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [point["num_bytes"] for point in found["sizes"]] == [2_000, 200_000, 2_000_000]
    assert {point["model"] for point in found["counts"]} == {"10x50000"}
    assert all(point["load_s"] > 0 for points in found.values() for point in points)
    assert "GB of weights" in (tmp_path / "growth.svg").read_text()
    assert "10x50000" in capsys.readouterr().out


def test_a_later_run_adds_to_the_points_of_an_earlier_one(tmp_path):
    options = ["--ways", "ours-load_raw", "--rounds", "1", "--accelerator", "cpu", "--output", str(tmp_path)]
    growth.main(["--models", "1x100000", "1x1000", "--tensors", *options])
    growth.main(["--models", "--tensors", "10", "--gigabytes", "0.001", *options])
    growth.main(["--models", "1x1000", "--tensors", *options])
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [point["model"] for point in found["sizes"]] == ["1x1000", "1x100000"]
    assert [point["model"] for point in found["counts"]] == ["10x50000"]


def test_points_of_another_machine_are_dropped():
    points = [{"model": "7B", "way": "mmap", "num_bytes": 2, "machine": {"device": device}} for device in ("A", "B")]
    assert growth.renewed(points[:1], points[1:]) == points[1:]


def test_the_fit_finds_the_fixed_part_and_the_rate():
    points = [{"num_bytes": n * 10**9, "total_s": 0.25 + n / 20} for n in (1, 2, 13, 26)]
    fixed_s, s_per_byte = growth.fit(points)
    assert fixed_s == pytest.approx(0.25)
    assert 1 / s_per_byte == pytest.approx(20e9)
