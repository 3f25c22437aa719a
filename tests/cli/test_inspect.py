"""``efficient-init inspect``: what it prints."""

import json
import math
import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from lightning_efficient_init.cli import main


@pytest.fixture
def llama(tmp_path):
    """A model of four blocks, the third of another size, with a tied head."""
    state = {"wte.weight": torch.zeros(10, 4)}
    for i in range(4):
        state |= {f"h.{i}.norm": torch.zeros(4), f"h.{i}.mlp.weight": torch.zeros(4, 8 if i == 2 else 4)}
    state["head.weight"] = state["wte.weight"]
    torch.save({"state_dict": state, "hyper_parameters": {"name": "7B"}, "epoch": 2}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def shown(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_blocks_that_are_alike_are_shown_once(llama, capsys):
    lines = shown(capsys, llama)
    assert "0 to 1 (2 alike) 4 tensors 160 bytes" in lines
    assert "mlp.weight float32 [4, 8] 128 bytes" in lines
    assert "3 2 tensors 80 bytes" in lines
    assert sum("mlp.weight" in line for line in lines) == 3


def test_a_tied_tensor_counts_under_its_first_name(llama, capsys):
    lines = shown(capsys, llama)
    assert "wte.weight float32 [10, 4] 160 bytes" in lines
    assert "head.weight float32 [10, 4] = wte.weight" in lines
    assert "wte.weight = head.weight" in lines
    assert "weights 10 tensors, 544 bytes under 'state_dict': 136 x float32" in lines


def test_hyperparameters_and_what_else_is_in_the_file_are_shown(llama, capsys):
    lines = shown(capsys, llama)
    assert "name: '7B'" in lines
    assert "epoch: 2" in lines
    assert "optimizer no state" in lines


def test_depth_limits_the_levels(llama, capsys):
    lines = shown(capsys, llama, "--depth", 1)
    assert "h 8 tensors 384 bytes" in lines
    assert not any("mlp" in line for line in lines)


def test_json_holds_every_tensor_and_reads_back(llama, capsys):
    assert main(["inspect", str(llama), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (weights,) = [part for part in found["parts"] if part["kind"] == "weights"]
    saved = torch.load(llama)["state_dict"]
    assert list(weights["tensors"]) == list(saved)
    for name, tensor in saved.items():
        assert weights["tensors"][name]["shape"] == list(tensor.shape)
        assert weights["tensors"][name]["num_bytes"] == tensor.nbytes
    assert found["ties"] == [["wte.weight", "head.weight"]]
    assert found["hyperparameters"] == {"name": "7B"}
    assert found["has_optimizer_state"] is False


def test_what_a_file_says_is_no_markup_and_moves_no_terminal(tmp_path, capsys):
    loop = [1]
    loop.append(loop)
    values = {"[red]x[/red]": "\x1b[2J", "loop": loop, "t": torch.zeros(2)}
    state = {"[bold]": torch.zeros(2), "\x1b]0;title\x07": torch.zeros(2), "a." * 5000 + "b": torch.zeros(2)}
    torch.save({"state_dict": state, "hyper_parameters": values}, tmp_path / "a.ckpt")
    lines = shown(capsys, tmp_path / "a.ckpt")
    assert not any("\x1b" in line or "\x07" in line for line in lines)
    assert any(line.startswith("[bold] float32") for line in lines)
    assert any(line.startswith("[red]x[/red]:") for line in lines)
    assert "t: a tensor, float32 [2]" in lines
    assert main(["inspect", str(tmp_path / "a.ckpt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hyperparameters"]["loop"][0] == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (torch.zeros(2), "a tensor, float32 [2]"),
        (torch.float16, "torch.float16"),
    ],
)
def test_what_json_has_no_word_for_is_there_as_it_is_printed(value, words, tmp_path, capsys):
    values = {"x": value, "nested": {"x": [value]}}
    torch.save({"state_dict": {"w": torch.zeros(2)}, "hyper_parameters": values}, tmp_path / "a.ckpt")
    lines = shown(capsys, tmp_path / "a.ckpt")
    assert f"x: {words}" in lines
    assert f"nested: {{'x': [{words}]}}" in lines
    assert main(["inspect", str(tmp_path / "a.ckpt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["hyperparameters"] == {"x": words, "nested": {"x": [words]}}


def test_a_checkpoint_that_cannot_be_read_ends_with_the_reason(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "nothing at this path" in output.err


def test_what_a_file_would_run_is_refused_and_allowed_in_python_only(tmp_path, capsys):
    torch.save({"w": torch.zeros(2), "when": Fraction(1, 2)}, tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt")]) == 1
    error = capsys.readouterr().err
    assert "a pickle that uses fractions.Fraction" in error
    assert error.endswith("Commands never run code from a file; load_checkpoint in Python can be allowed to.\n")


@pytest.mark.parametrize("depth", ["0", "-1", "all", ""])
def test_what_is_no_number_of_levels_is_a_usage_error(depth, llama, capsys):
    with pytest.raises(SystemExit) as end:
        main(["inspect", str(llama), f"--depth={depth}"])
    assert end.value.code == 2
    assert "expected a number of levels, 1 or more" in capsys.readouterr().err


def run(command, **environment):
    """Lets bash run ``command``, with ``inspect`` in place of this command of the program."""
    program = f"{sys.executable} -W ignore -m lightning_efficient_init inspect"
    script = f"set -o pipefail; {command.replace('inspect', program)}"
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, encoding="utf-8", check=False, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(("option", "first"), [("--json", "{"), ("", "p")])
def test_the_module_runs_and_a_reader_that_leaves_early_is_no_error(option, first, tmp_path):
    torch.save({f"{i}.{i}": torch.zeros(i) for i in range(1000)}, tmp_path / "a.pt")  # more than a pipe holds
    done = run(f"inspect {tmp_path}/a.pt {option} | head -c 1")
    assert (done.returncode, done.stdout, done.stderr) == (0, first, "")


@pytest.mark.parametrize(
    ("option", "target", "reason"),
    [
        ("--json", "/dev/full", "No space left on device"),
        ("", "/dev/full", "No space left on device"),
        ("", "&-", "expected an open standard output, found a closed one"),
    ],
)
def test_output_that_cannot_be_written_ends_with_the_reason(option, target, reason, llama):
    done = run(f"inspect {llama} {option} >{target}")
    assert done.returncode == 1
    assert done.stderr.startswith("efficient-init inspect: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_names_that_the_encoding_of_the_output_lacks_are_written_in_escapes(tmp_path):
    torch.save({"größe.π": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "a.pt")
    done = run(f"inspect {tmp_path}/a.pt", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"gr\xf6\xdfe.\u03c0" in done.stdout
    assert "größe.π" in run(f"inspect {tmp_path}/a.pt", PYTHONIOENCODING="utf-8").stdout


def test_standard_output_is_as_it_was_afterwards(tmp_path, capsys):
    before = sys.stdout.errors
    assert main(["inspect", str(tmp_path / "nothing")]) == 1
    assert sys.stdout.errors == before != "backslashreplace"
