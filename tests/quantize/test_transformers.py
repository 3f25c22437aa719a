"""Beside transformers' own bitsandbytes integration: the same logits, and its checkpoints."""

import pytest
import torch
from quantized_models import assert_outputs_equal, built, quantizing_fabric

from lightning_efficient_init import load_checkpoint
from lightning_efficient_init.quantize import MODES, QuantizedLayer

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

PACKED = [mode for mode in MODES if mode != "int8-training"]
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "32-true": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama of four layers, saved in float32."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, vocab_size=256
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def with_transformers(folder, mode, dtype, device):
    if mode == "int8":
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=mode[:3],
            bnb_4bit_use_double_quant=mode.endswith("-dq"),
            bnb_4bit_compute_dtype=dtype,
        )
    model = transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": device}
    )
    return model.eval()


def with_ours(folder, mode, precision, device):
    fabric = quantizing_fabric(mode, precision, device.type, skip_modules=["lm_head"])  # as transformers does
    config = transformers.LlamaConfig.from_pretrained(folder)
    return built(fabric, lambda: transformers.LlamaForCausalLM(config), empty=True).eval()


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("mode", PACKED)
def test_logits_are_those_of_transformers_to_the_last_bit(mode, precision, folder, device):
    theirs = with_transformers(folder, mode, DTYPES[precision], device)
    ours = with_ours(folder, mode, precision, device)
    load_checkpoint(ours, folder)
    assert sum(isinstance(module, QuantizedLayer) for module in ours.modules()) == 4 * 7
    tokens = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        assert_outputs_equal(ours(tokens).logits, theirs(tokens).logits, mode)


@pytest.mark.parametrize("mode", PACKED)
def test_what_transformers_saved_quantized_loads_bit_for_bit(mode, folder, device, tmp_path):
    theirs = with_transformers(folder, mode, torch.bfloat16, device)
    theirs.save_pretrained(tmp_path)
    ours = with_ours(folder, mode, "bf16-true", device)
    load_checkpoint(ours, tmp_path)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    tokens = torch.arange(17, device=device).unsqueeze(0)
    with torch.no_grad():
        assert_outputs_equal(ours(tokens).logits, theirs(tokens).logits, mode)
