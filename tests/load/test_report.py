"""What a load says about itself."""

import dataclasses
import subprocess
import sys
import time

import pytest
import torch

from lightning_efficient_init import LoadReport, load_checkpoint
from lightning_efficient_init.deferred import postponed_init

GB = 10**9


@pytest.fixture
def path(tmp_path, make_net):
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_a_report_measures_the_load(device, path, make_net):
    model = make_net(2).to(device)
    started = time.perf_counter()
    report = load_checkpoint(model, path)
    assert 0 < report.elapsed_s <= time.perf_counter() - started
    assert report.num_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert report.bytes_per_s == report.num_bytes / report.elapsed_s
    assert report.loaded == tuple(model.state_dict())
    assert report.initialized == report.missing == report.unexpected == report.mismatched == ()
    assert 0 <= report.peak_host_bytes < 400 << 20
    assert (report.peak_device_bytes > 0) == (device.type == "cuda")


ALONE = """
import sys, torch
from lightning_efficient_init import deferred_init, load_checkpoint

with deferred_init():
    model = torch.nn.Linear(4096, 4096, bias=False)
print(load_checkpoint(model, sys.argv[1]).peak_host_bytes)
"""


def test_the_host_peak_is_the_memory_that_the_load_gave_to_parameters(tmp_path):
    torch.save({"weight": torch.ones(4096, 4096)}, tmp_path / "w.pt")
    command = [sys.executable, "-c", ALONE, str(tmp_path / "w.pt")]  # a process without freed memory to use again
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert (64 << 20) * 0.9 < peak < 100 << 20


def test_a_report_reads_as_one_line_that_names_what_was_not_loaded():
    names = tuple(f"p{i}" for i in range(20))
    report = LoadReport(("a", "b"), names, ("c",), (), ("d",), 3 * GB, 1.5, GB // 4, 2 * GB)
    text = str(report)
    assert text.startswith("loaded 2 tensors, 3.000 GB in 1.500 s (2.00 GB/s)")
    for words in (
        "host memory peak +0.250 GB",
        "device memory peak 2.000 GB",
        "'p0'",
        "and 12 more",
        "missing: 'c'",
        "mismatched: 'd'",
    ):
        assert words in text
    assert "unexpected" not in text
    assert "\n" not in text


def test_a_report_of_what_is_yet_to_come_says_so(tmp_path, make_net):
    torch.save(make_net(1).state_dict(), tmp_path / "a.pt")
    with postponed_init(is_optional=True):
        model = make_net(2)
    report = load_checkpoint(model, tmp_path / "a.pt")
    assert report.is_postponed
    assert str(report) == f"{len(report.loaded)} tensors are going to be read once the model is sharded"
    assert "'c'" in str(dataclasses.replace(report, missing=("c",)))


def test_no_time_at_all_gives_no_rate():
    assert LoadReport((), (), (), (), (), 5, 0.0, 0, 0).bytes_per_s == 0


@pytest.mark.parametrize("progress", [False, None])
def test_no_bar_is_shown_unless_asked_for_where_there_is_no_terminal(progress, path, make_net, capsys):
    load_checkpoint(make_net(2), path, progress=progress)
    assert capsys.readouterr() == ("", "")


def test_a_bar_counts_bytes_when_asked_for(path, make_net, capsys):
    load_checkpoint(make_net(2), path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Loading" in err
    assert "B/s" in err
