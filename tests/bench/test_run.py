"""``run_bench`` and ``efficient-init bench``, on the CPU, with real processes and real files."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_efficient_init.bench.files import LoadedModule, check_space, form_of, stored_weights, write_files
from lightning_efficient_init.bench.llama import build
from lightning_efficient_init.bench.processes import in_fresh_process
from lightning_efficient_init.bench.run import Bench, Options, run_bench
from lightning_efficient_init.bench.task import Task
from lightning_efficient_init.bench.ways import WAYS
from lightning_efficient_init.cli import main
from lightning_efficient_init.errors import UsageError

GB = 10**9


def test_the_command_measures_prints_and_writes_and_leaves_no_weights_behind(tmp_path, capfd, device):
    scratch, output = tmp_path / "scratch", tmp_path / "output"
    scratch.mkdir()
    ways = ["load_raw", "mmap", "trainer", "ours-load_raw", "ours-safetensors", "ours-nf4", "ours-trainer"]
    ways += ["safetensors-copy"]
    arguments = ["--ways", *ways, "--rounds", "1", "--folder", str(scratch), "--output", str(output)]
    assert main(["bench", "--accelerator", device.type, *arguments]) == 0
    assert list(scratch.iterdir()) == []
    found = json.loads((output / "bench.json").read_text())
    skipped = {"safetensors-copy"} if device.type == "cuda" else set()
    assert set(found["not_run"]) == skipped
    warm = {row["way"]: row for row in found["rows"] if row["cache"] == "warm"}
    assert set(warm) == set(ways) - skipped
    for name, row in warm.items():
        assert row["is_equal"] is True
        assert 0 < row["load_s"] <= row["total_s"]
        assert torch.device(row["ends_on"]).type == ("cpu" if name == "trainer" else device.type)
    assert {row["cache"] for row in found["rows"]} == {"warm"}
    assert found["notes"][0].startswith("cold: not run, ")
    assert all(rate > 0 for rates in found["limits"].values() for rate in rates)
    with open(output / "bench.csv") as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"])
    assert (output / "bench.png").stat().st_size > 10_000
    assert "ours-safetensors" in (output / "bench.svg").read_text()
    printed = capfd.readouterr().out
    assert all(f"\n{name} " in printed for name in warm)
    assert all(f" s  {name}, warm" in printed for name in warm)
    assert "  ours-load_raw, warm: " in printed
    assert " times as fast as load_raw" in printed
    assert "The machine's limits" in printed


def test_a_way_that_fails_is_named_with_the_reason_and_the_others_run(tmp_path):
    weights = {f"model.{name}": tensor for name, tensor in build("20x10").bfloat16().state_dict().items()}
    torch.save(weights, tmp_path / "prefixed.pth")
    options = Options(
        "20x10", str(tmp_path / "prefixed.pth"), ["load_raw", "ours-load_raw", "trainer", "runai"], 1, cold=False
    )
    results = run_bench(options)
    assert {row.way for row in results.rows} == {"ours-load_raw"}
    assert results.not_run["load_raw"].startswith("RuntimeError: Error(s) in loading state_dict")
    assert results.not_run["trainer"] == "reads ckpt; the checkpoint is pth"
    assert set(results.not_run) == {"load_raw", "trainer", "runai"}
    assert os.path.exists(tmp_path / "prefixed.pth")


def test_rows_report_the_memory_that_a_load_takes(tmp_path):
    """A copy of 64 MB shows as anonymous memory, a mapping does not."""
    ways = ["load_raw", "ours-load_raw", "ours-mmap"]
    options = Options("8x4000000", None, ways, 1, accelerator="cpu", cold=False, folder=str(tmp_path))
    rows = {row.way: row for row in run_bench(options).rows}
    assert rows["load_raw"].host_bytes > 100e6
    assert 60e6 < rows["ours-load_raw"].host_bytes < 90e6
    assert rows["ours-mmap"].host_bytes < 30e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": ["our"]}, "way 'our': expected some of all, lightning, ours"),
        ({"precision": "bf16"}, "precision 'bf16': expected one of 32-true"),
        ({"rounds": 0}, "rounds: expected at least 1, found 0"),
        ({"stock_rounds": 0}, "stock_rounds: expected at least 1, found 0"),
        ({"limit_minutes": 0}, "limit_minutes: expected more than 0, found 0"),
        ({"limit_minutes": -1.5}, r"limit_minutes: expected more than 0, found -1\.5"),
        ({"limit_minutes": float("nan")}, "limit_minutes: expected more than 0, found nan"),
        ({"folder": "/nonexistent"}, "folder '/nonexistent': expected a folder, found none there. Create it, or"),
        ({"only": "("}, r"only '\(': expected a regular expression"),
        ({"only": "^x"}, r"only '\^x': expected a part of a name or a title of naive, "),
        ({"model": "no-such-model"}, "expected tiny, 0.1B, 0.5B, 1B"),
        ({"model": "10x1000000000000", "ways": ["ours-mmap"]}, "expected 21000.00 GB of disk"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        run_bench(Options(**{"folder": str(tmp_path), "accelerator": "cpu", **changes}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_the_reason(tmp_path, capsys):
    assert main(["bench", "--accelerator", "cuda", "--output", str(tmp_path / "output")]) == 1
    assert capsys.readouterr().err == (
        "efficient-init bench: accelerator 'cuda': expected a GPU that torch can use, found none. "
        "Pass --accelerator cpu.\n"
    )


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_output_that_is_a_file_is_refused_before_anything_is_measured(below, tmp_path, capsys):
    (tmp_path / "a").write_text("mine")
    output = str(tmp_path / "a" / below)
    assert main(["bench", "--accelerator", "cpu", "--model", "20x10", "--output", output]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"output {output!r}: expected a folder, found a file, {tmp_path / 'a'}. Pass another" in printed.err
    assert (tmp_path / "a").read_text() == "mine"


def test_a_way_that_needs_more_memory_than_there_is_does_not_run():
    task = Task("7B", {"pth": "", "ckpt": ""}, "bf16-true", "cpu", 13 * GB)
    assert WAYS["naive"].obstacle(task, 40 * GB) == "needs about 52.0 GB of host memory; 40.0 GB are free"
    assert WAYS["ours-load_raw"].obstacle(task, 40 * GB) is None
    assert WAYS["ours-load_raw"].obstacle(task, 12 * GB) is not None
    assert WAYS["ours-mmap"].obstacle(task, 1 * GB) is None
    assert WAYS["instanttensor"].obstacle(task, 40 * GB) == "needs instanttensor, which is not installed"


def test_space_is_asked_for_once_for_each_form(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    check_space(str(tmp_path), free // 3, ["pth", "pth", "ckpt"])
    with pytest.raises(UsageError, match="in 3 forms"):
        check_space(str(tmp_path), free // 3, ["pth", "safetensors", "ckpt"])


def test_all_forms_hold_the_same_weights_and_are_recognized(tmp_path):
    task = Task("tiny", {}, "bf16-true", "cpu", 0)
    paths = write_files(task, str(tmp_path), ["pth", "safetensors", "ckpt"])
    state = build("tiny").state_dict()
    found = [stored_weights(Task("tiny", {form: path}, "bf16-true", "cpu", 0)) for form, path in paths.items()]
    for weights in found:
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[key], found[0][key]) for key in weights)
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert [form_of(paths[form]) for form in ("pth", "safetensors")] == ["pth", "safetensors"]
    with pytest.raises(UsageError, match="expected a bare state dict"):
        form_of(paths["ckpt"])
    assert isinstance(LoadedModule.load_from_checkpoint(paths["ckpt"]).model, type(build("tiny")))


def test_one_safetensors_file_is_a_checkpoint_too(tmp_path):
    save_file(build("20x10").bfloat16().state_dict(), tmp_path / "a.safetensors")
    options = Options("20x10", str(tmp_path / "a.safetensors"), ["ours-safetensors", "safetensors"], 1, cold=False)
    assert {row.way: row.is_equal for row in run_bench(options).rows} == {"ours-safetensors": True, "safetensors": True}


def test_a_hugging_face_model_is_loaded_by_transformers_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path / "llama")
    ways = ["transformers", "ours-safetensors", "load_raw"]
    results = run_bench(Options(str(tmp_path / "llama"), None, ways, 1, accelerator="cpu", cold=False))
    assert results.not_run == {}
    assert {row.way: row.is_equal for row in results.rows} == dict.fromkeys(ways, True)
    tiny = Task("tiny", {"safetensors": ""}, "bf16-true", "cpu", 0)
    assert WAYS["transformers"].obstacle(tiny, GB).startswith("loads Hugging Face models only")


def test_steps_are_announced_with_their_number():
    steps = []
    options = Options("20x10", None, ["ours-load_raw"], 2, accelerator="cpu", cold=False)
    run_bench(options, lambda *step: steps.append(step))
    assert [number for _, number, _ in steps] == [1, 2, 3, 4, 5]
    assert steps[-1] == ("ours-load_raw, warm, round 2 of 2", 5, 5)


def test_rows_are_chosen_by_name_or_title_and_lightning_runs_fewer_rounds():
    ways = {"ways": ["lightning", "ours"], "only": r"mmap=True\)$|^load_raw|from safetensors", "stock_rounds": 1}
    results = run_bench(Options("20x10", None, rounds=2, accelerator="cpu", **ways))
    counts = {line.way: len(line.rows) for line in results.lines()}
    assert counts == {"load_raw": 1, "mmap": 1, "ours-mmap": 2, "ours-safetensors": 2}


def test_each_row_is_told_when_it_is_there():
    told = []
    bench = Bench(Options("20x10", None, ["ours"], 1, accelerator="cpu", cold=False), on_row=told.append)
    assert bench.run().rows == told
    assert len(told) > 3


def test_cold_rows_run_where_the_file_system_lets_go_of_files(tmp_path):
    options = Options("8x1000000", None, ["ours-load_raw"], 1, accelerator="cpu", cold=True, folder=str(tmp_path))
    results = run_bench(options)
    if "cold: not run, the file system keeps the files in the page cache" in results.notes:
        pytest.skip("this file system keeps files in the page cache")
    assert [row.cache for row in results.rows] == ["warm", "cold"]
    assert results.limits["disk"][0] > 0


def test_it_stops_in_time_with_what_it_has_and_says_what_is_missing(tmp_path):
    in_fresh_process(os.getpid)  # the server imports for as long as that takes here
    started = time.monotonic()
    ways = ["load_raw", "ours-load_raw"]
    options = Options("20x10", None, ways, 10**6, accelerator="cpu", limit_minutes=0.1, folder=str(tmp_path))
    results = run_bench(options)
    assert time.monotonic() - started < 60
    counts = {line.way: len(line.rows) for line in results.lines()}
    assert set(counts) == set(ways)
    for name, count in counts.items():
        note = f"{name}, warm: {count} of 1000000 rounds; the rest did not fit the limit of 0.1 minutes"
        assert note in results.notes
    assert list(tmp_path.iterdir()) == []


def test_a_limit_that_is_too_short_for_anything_is_no_error(tmp_path):
    options = Options("20x10", None, ["ours-load_raw"], 2, accelerator="cpu", limit_minutes=1e-9, folder=str(tmp_path))
    results = run_bench(options)
    assert results.rows == []
    assert results.notes == ["ours-load_raw, warm: 0 of 2 rounds; the rest did not fit the limit of 1e-09 minutes"]


def test_what_was_measured_is_written_when_it_is_ended(tmp_path):
    output, scratch = tmp_path / "output", tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "lightning_efficient_init", "bench", "--model", "20x10", "--rounds", "100000"]
    command += ["--ways", "ours-load_raw", "--folder", str(scratch), "--output", str(output), "--accelerator", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline().endswith(" s  ours-load_raw, warm\n")
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the rest: it was stopped" in printed
    assert json.loads((output / "bench.json").read_text())["rows"]
    assert (output / "bench.svg").exists()
    assert list(scratch.iterdir()) == []
