"""``run_bench`` and ``efficient-init bench``, on the CPU, with real processes and real files."""

import csv
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from lightning_efficient_init.bench.files import LoadedModule, check_space, form_of, stored_weights, write_files
from lightning_efficient_init.bench.llama import build
from lightning_efficient_init.bench.run import Options, in_fresh_process, run_bench
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
        assert row["is_equal"] is (None if name == "ours-nf4" else True)
        assert 0 < row["load_s"] <= row["total_s"]
        assert torch.device(row["ends_on"]).type == ("cpu" if name == "trainer" else device.type)
    assert {row["cache"] for row in found["rows"]} == {"warm"} | ({"cold"} if not found["notes"] else set())
    assert all(rate > 0 for rates in found["limits"].values() for rate in rates)
    with open(output / "bench.csv") as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"])
    assert (output / "bench.png").stat().st_size > 10_000
    assert "ours-safetensors" in (output / "bench.svg").read_text()
    printed = capfd.readouterr().out
    assert all(f"\n{name} " in printed for name in warm)
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
        ({"model": "no-such-model"}, "expected tiny, 0.1B, 1B"),
        ({"model": "10x1000000000000", "ways": ["ours-mmap"]}, "expected 21000.00 GB of disk"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        run_bench(Options(**{"folder": str(tmp_path), "accelerator": "cpu", **changes}))
    assert list(tmp_path.iterdir()) == []


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


def test_each_row_has_a_process_of_its_own_and_errors_come_back():
    first, second = in_fresh_process(os.getpid), in_fresh_process(os.getpid)
    assert len({first, second, os.getpid()}) == 3
    with pytest.raises(FileNotFoundError):
        in_fresh_process(os.stat, "/nothing")


def test_steps_are_announced_with_their_number():
    steps = []
    options = Options("20x10", None, ["ours-load_raw"], 2, accelerator="cpu", cold=False)
    run_bench(options, lambda *step: steps.append(step))
    assert [number for _, number, _ in steps] == [1, 2, 3, 4, 5]
    assert steps[-1] == ("ours-load_raw, warm, round 2 of 2", 5, 5)
