import pytest
import torch

pytest.importorskip("litgpt")

import lightning as L
import llama_inference
from litgpt import GPT

from lightning_efficient_init import EfficientInit

SIZES = {
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "n_query_groups": 2,
    "intermediate_size": 96,
    "padded_vocab_size": 512,
}
TINY = ["--accelerator=cpu", "--max-new-tokens=5", *(f"--set={key}={value}" for key, value in SIZES.items())]
TINY += ["--set=vocab_size=500"]


def test_the_example_generates_from_random_weights(capsys):
    llama_inference.main(TINY)
    printed = capsys.readouterr().out
    assert "wrote random weights" in printed
    assert "generated 5 tokens" in printed


def test_the_example_loads_exactly_what_the_checkpoint_holds(tmp_path, capsys):
    config = llama_inference.build_config(llama_inference.parse_arguments(TINY))
    weights = GPT(config).state_dict()
    path = tmp_path / "lit_model.pth"
    torch.save(weights, path)

    fabric = L.Fabric(accelerator="cpu", strategy="efficient_init", plugins=[EfficientInit("bf16-true")])
    model = llama_inference.load_model(fabric, config, path)

    loaded = model.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[key], value.bfloat16()) for key, value in weights.items())

    llama_inference.main([*TINY, f"--checkpoint={path}"])
    assert "wrote random weights" not in capsys.readouterr().out
