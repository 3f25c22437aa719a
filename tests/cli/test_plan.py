"""``efficient-init plan``: what it prints, and which models it knows."""

import json
import os
import signal
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lightning_efficient_init import deferred_init, plan_memory
from lightning_efficient_init.bench.llama import SIZES, LLaMA
from lightning_efficient_init.cli import main

GIB = 1 << 30


@pytest.fixture
def llama_file(tmp_path):
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.save(LLaMA(SIZES["tiny"]).state_dict(), tmp_path / "a.pth")
    finally:
        torch.set_default_dtype(torch.float32)
    return str(tmp_path / "a.pth")


def numbers(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *arguments):
    assert main(["plan", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_the_numbers_are_those_of_plan_memory(llama_file, capsys):
    found = numbers(capsys, llama_file, "--model", "tiny", "--precision", "bf16-true", "--train", "AdamW")
    torch.set_default_dtype(torch.bfloat16)
    with deferred_init():
        model = LLaMA(SIZES["tiny"])
    torch.set_default_dtype(torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = plan_memory(model, llama_file, precision="bf16-true", optimizer=torch.optim.AdamW, device_type=device)
    assert found["device"] == dict(expected.device)
    assert found["device_peak_bytes"] == expected.device_peak_bytes
    assert found["bytes_read"] == expected.bytes_read


def test_without_a_model_the_checkpoint_is_taken_as_one(llama_file, capsys):
    """What differs are buffers that the checkpoint does not hold."""
    for more in ([], ["--quantize", "int8"], ["--strategy", "efficient_init_fsdp2", "--devices", "2"]):
        arguments = [llama_file, "--precision", "bf16-true", "--device-memory", "1GiB", *more]
        guessed, known = numbers(capsys, *arguments), numbers(capsys, *arguments, "--model", "tiny")
        assert guessed["device"]["parameters"] == known["device"]["parameters"]
        assert guessed["loading"] == known["loading"]
        assert guessed["bytes_read"] == known["bytes_read"]


def test_a_checkpoint_with_odd_names_is_taken_as_a_model_too(tmp_path, capsys):
    shared = torch.zeros(4, 4)
    state = {
        "weight": shared,
        "a.b": shared,
        "a": torch.zeros(3),
        "x.bias": torch.zeros(2),
        "x.weight": torch.zeros(2, 2),
    }
    state |= {"x.weight.deeper": torch.zeros(5), "..": torch.zeros(6), "steps": torch.zeros((), dtype=torch.int64)}
    state |= {"x._extra_state": {"scale": 3}, "epoch": 3}
    torch.save(state, tmp_path / "a.pt")
    found = numbers(capsys, tmp_path / "a.pt", "--accelerator", "cpu")
    assert found["device"]["parameters"] == 4 * (16 + 3 + 2 + 4 + 5 + 6) + 8


def test_a_checkpoint_of_a_quantized_model_is_counted_as_it_is(tmp_path, capsys):
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    state = nn.ModuleDict({"layer": layer}).state_dict()
    torch.save(state, tmp_path / "a.pt")
    found = numbers(capsys, tmp_path / "a.pt", "--accelerator", "cpu", "--quantize", "nf4")
    assert found["device"]["parameters"] == sum(tensor.nbytes for tensor in state.values())


def test_it_says_whether_it_fits_and_what_would(capsys):
    arguments = ["plan", "--model", "7B", "--precision", "32-true", "--device-memory", "24GiB"]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "It does not fit: 25.23 GB are free." in printed
    assert "efficient_init, 1 x cuda, bf16-true would: 13.48 GB" in printed
    assert "efficient_init, 1 x cuda, 32-true, int8 would:" in printed
    assert "efficient_init_fsdp2, 2 x cuda, 32-true would: 14.29 GB" in printed
    assert main([*arguments[:-1], "80GB"]) == 0
    assert "It fits: 79.46 GB are free." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("24GiB", 24 * GIB), ("80GB", 80 * 10**9), ("512 MiB", 512 << 20), ("1.5k", 1500), ("7", 7)]
)
def test_sizes_are_read_as_they_are_written(text, num_bytes, capsys):
    assert (
        numbers(capsys, "--model", "tiny", "--accelerator", "cpu", "--device-memory", text)["free_bytes"] == num_bytes
    )


def test_memory_that_does_not_hold_a_context_is_none(capsys):
    arguments = ["--model", "tiny", "--accelerator", "cuda", "--device-memory", "100MiB"]
    assert numbers(capsys, *arguments)["free_bytes"] == 0
    assert main(["plan", *arguments]) == 0
    assert "It does not fit: 0 bytes are free." in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "GiB", "24 GiX", "-1", "1.2.3GB", "many", "9" * 400])
def test_what_is_no_size_is_a_usage_error(text, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", "--model", "tiny", f"--device-memory={text}"])
    assert end.value.code == 2
    assert "expected a size such as 24GiB" in capsys.readouterr().err


def test_a_callable_is_a_model(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef make(width, bias=True): return nn.Linear(width, 10, bias=bias)"
    )
    monkeypatch.chdir(tmp_path)
    for arguments in ('{"width": 100, "bias": false}', "[100, false]"):
        found = numbers(capsys, "--model", "mine:make", "--model-args", arguments, "--accelerator", "cpu")
        assert found["final_bytes"] == 4000


def test_what_a_model_and_an_optimizer_print_is_not_in_the_output(tmp_path, monkeypatch, capsys):
    (tmp_path / "loud.py").write_text(
        "from torch import nn, optim\nprint('imported')\n"
        "def make():\n  print('built')\n  return nn.Linear(2, 2)\n"
        "def sgd(parameters):\n  print('trained')\n  return optim.SGD(parameters)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["plan", "--model", "loud:make", "--train", "loud:sgd", "--accelerator", "cpu", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["final_bytes"] == 24
    assert set(output.err.split()) == {"imported", "built", "trained"}


def test_a_model_that_exits_is_refused_with_its_status(tmp_path, monkeypatch, capsys):
    (tmp_path / "leaves.py").write_text("import sys\ndef make(): sys.exit(3)")
    (tmp_path / "gone.py").write_text("import sys\nsys.exit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    assert "from calling it, found SystemExit: 3. Check it" in refusal(capsys, "--model", "leaves:make")
    assert "that can be imported; SystemExit: 3." in refusal(capsys, "--model", "gone:make")


def test_an_interrupt_from_the_keyboard_ends_it_without_a_traceback(tmp_path):
    (tmp_path / "slow.py").write_text("import time\ndef make():\n  print('here', flush=True)\n  time.sleep(60)")
    command = [sys.executable, "-W", "ignore", "-m", "lightning_efficient_init", "plan", "--model", "slow:make"]
    environment = {**os.environ, "PYTHONPATH": f"{os.getcwd()}:{tmp_path}"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stderr.readline() == b"here\n"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == (b"", b"")
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("model", "arguments", "reason"),
    [
        ("theirs:other", "[]", "expected MODULE:CALLABLE that can be imported; AttributeError: module 'theirs'"),
        ("no_such_module:x", "[]", "that can be imported; ModuleNotFoundError: No module named 'no_such_module'"),
        (":", "[]", "expected MODULE:CALLABLE that can be imported; ValueError"),
        ("broken:x", "[]", "expected MODULE:CALLABLE that can be imported; ZeroDivisionError"),
        ("theirs:width", "[]", "and called, found int"),
        ("builtins:list", "[]", "expected a torch.nn.Module from calling it, found list"),
        ("theirs:make", "[1, 2]", "found TypeError: make() takes 0 positional arguments but 2 were given. Check"),
        ("theirs:make", '{"depth": 1}', "unexpected keyword argument 'depth'. Check it and its arguments"),
        ("theirs:make", "[]", "found KeyError: 'no head'"),
    ],
)
def test_a_callable_that_builds_no_model_is_refused_with_the_reason(
    model, arguments, reason, tmp_path, monkeypatch, capsys
):
    (tmp_path / "theirs.py").write_text("width = 3\ndef make(): raise KeyError('no head')")
    (tmp_path / "broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    error = refusal(capsys, "--model", model, "--model-args", arguments)
    assert f"model {model!r}: expected" in error
    assert reason in error


def test_parameters_that_the_optimizer_cannot_step_on_are_refused_by_their_dtype(tmp_path, capsys):
    torch.save({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "a.pt")
    arguments = [tmp_path / "a.pt", "--accelerator", "cpu", "--train", "AdamW"]
    assert "torch.float8_e4m3fn" in refusal(capsys, *arguments)
    found = numbers(capsys, *arguments, "--precision", "bf16-true")
    assert found["device"]["optimizer state"] == 2 * 2 * 16


def test_a_litgpt_configuration_is_a_model(capsys):
    pytest.importorskip("litgpt")
    found = numbers(capsys, "--model", "pythia-14m", "--precision", "bf16-true", "--accelerator", "cpu")
    assert found["device"]["parameters"] == pytest.approx(2 * 14e6, rel=0.05)


def test_a_hugging_face_folder_is_a_model(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    config.save_pretrained(tmp_path)
    found = numbers(capsys, "--model", tmp_path, "--accelerator", "cpu")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert found["device"]["parameters"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "efficient-init plan: expected a checkpoint, a --model, or both"),
        (["--model", "tiny", "--model-args", "[1]"], "called with them, found tiny. Pass one"),
        (["/nothing", "--model-args", "[1]"], "called with them, found none. Pass one"),
        (["--model", "torch.nn:ReLU", "--model-args", "3"], "--model-args '3': expected a JSON list or object"),
        (["--model", "tiny", "--train-args", "{}"], "--train OPTIMIZER that they are for, found none"),
        (["--model", "no-such-model"], "expected tiny, 0.1B, 0.5B, 1B"),
        (["--model", "tiny", "--train", "Adamw"], "expected a class of torch.optim"),
        (["--model", "tiny", "--train", "nn"], "expected a class of torch.optim"),
        (["--model", "tiny", "--train", "SGD", "--train-args", "{"], "expected JSON"),
        (["--model", "tiny", "--train", "SGD", "--train-args", "[]"], "'[]': expected a JSON object, found"),
        (["--model", "tiny", "--train", "no_such_module:x"], "--train 'no_such_module:x': expected MODULE:CALLABLE"),
        (["--model", "tiny", "--train", "math:pi"], "--train 'math:pi': expected MODULE:CALLABLE"),
        (["--model", "tiny", "--train", "builtins:list"], "found AttributeError: 'list' object"),
        (["--model", "tiny", "--train", "LBFGS"], "found TypeError"),
        (["--model", "tiny", "--train", "SparseAdam"], "found RuntimeError: SparseAdam does not support dense"),
        (["--model", "tiny", "--train", "Optimizer"], "found TypeError"),
        (["--model", "tiny", "--train", "SGD", "--train-args", '{"zz": 1}'], "argument 'zz'. Choose another optimizer"),
        (
            ["--model", "tiny", "--train", "SGD", "--train-args", '{"lr": "x"}'],
            "steps on dense parameters of the model's shapes and of torch",
        ),
        (["--model", "tiny", "--devices", "2"], "Choose another strategy"),
        (["/nothing", "--model", "tiny"], "nothing at this path"),
        (["--model", "tiny", "--quantize", "int8", "--precision", "64-true"], "needs a precision of 32 or 16 bits"),
        (["--model", "tiny", "--quantize", "int8", "--skip-modules", "nope"], "'nope' names no module"),
        (["--model", "tiny", "--skip-modules", "lm_head"], "says what is not quantized"),
        (["--model", "torch.nn:ReLU", "--quantize", "nf4"], "no layer to quantize"),
    ],
)
def test_what_cannot_be_planned_ends_with_the_reason(arguments, message, capsys):
    assert message in refusal(capsys, *arguments)


def test_an_optimizer_of_ones_own_and_its_arguments(capsys):
    arguments = ["--model", "tiny", "--accelerator", "cpu"]
    plain = numbers(capsys, *arguments, "--train", "SGD")
    momentum = numbers(capsys, *arguments, "--train", "torch.optim:SGD", "--train-args", '{"momentum": 0.9}')
    assert plain["device"]["optimizer state"] == 0
    assert momentum["device"]["optimizer state"] == plain["device"]["gradients"] > 0


def test_a_model_that_does_not_fit_the_checkpoint_is_refused_by_name(tmp_path, capsys):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    assert "Missing in the checkpoint:\n  lm_head.weight" in refusal(capsys, tmp_path / "a.pth", "--model", "tiny")
