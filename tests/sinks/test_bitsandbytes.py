"""Streams into quantized weights: memory, and what is known when reading fails."""

import gc
import math
import os

import pytest
import torch
from quantized_models import built, quantizing_fabric
from torch import nn

from lightning_efficient_init import load_checkpoint
from lightning_efficient_init.errors import CorruptCheckpointError
from lightning_efficient_init.load import load
from lightning_efficient_init.memory import PeakMemory
from lightning_efficient_init.sinks import bitsandbytes as sinks

WIDTH = 4096


def save_large(path, num_layers):
    state = {f"{i}.weight": torch.empty(WIDTH, WIDTH, dtype=torch.bfloat16).uniform_(-1, 1) for i in range(num_layers)}
    torch.save(state, path)


def make_large(num_layers):
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)))


@pytest.mark.parametrize("mode", ["int8", "nf4-dq"])
def test_memory_on_the_host_is_the_quantized_model_and_some_scratch(mode, tmp_path):
    num_layers = 16  # 537 MB
    save_large(tmp_path / "a.pth", num_layers)
    gc.collect()
    fabric = quantizing_fabric(mode)
    with PeakMemory(in_background=True) as memory:
        model = built(fabric, lambda: make_large(num_layers), empty=True)
        load_checkpoint(model, tmp_path / "a.pth")
    quantized = sum(part.nbytes for part in model.state_dict().values())
    assert quantized < 0.55 * os.path.getsize(tmp_path / "a.pth")
    assert memory.host_bytes < quantized + (400 << 20)


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_without_a_checkpoint_one_weight_at_a_time_is_there_in_full(mode):
    num_layers = 16
    gc.collect()
    fabric = quantizing_fabric(mode, "32-true")
    with PeakMemory(in_background=True) as memory:
        model = built(fabric, lambda: make_large(num_layers))
    quantized = sum(part.nbytes for part in model.state_dict().values())
    whole = WIDTH * WIDTH * 4
    assert memory.host_bytes < quantized + 4 * whole  # of 16


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["int8", "nf4", "nf4-dq"])
def test_memory_on_the_device_is_the_quantized_model_and_some_scratch(mode, tmp_path):
    num_layers = 24
    save_large(tmp_path / "a.pth", num_layers)
    fabric = quantizing_fabric(mode, accelerator="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = built(fabric, lambda: make_large(num_layers), empty=True)
    load_checkpoint(model, tmp_path / "a.pth")
    assert torch.cuda.max_memory_allocated() - before < torch.cuda.memory_allocated() - before + 250_000_000


def test_a_file_that_ends_early_leaves_weights_as_they_were_or_says_which_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "BATCH_BYTES", 1 << 16)
    monkeypatch.setattr(sinks, "PART_BYTES", 1 << 16)
    torch.save({f"{i}.weight": torch.randn(256, 256) for i in range(12)}, tmp_path / "a.pth")
    fabric = quantizing_fabric("nf4", "32-true")
    model = built(fabric, lambda: nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(12))))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = load.plan_load(model, tmp_path / "a.pth")
    os.truncate(tmp_path / "a.pth", os.path.getsize(tmp_path / "a.pth") // 2)
    with pytest.raises(CorruptCheckpointError, match="file ends") as caught:
        load.run_plan(plan, load.Settings(num_threads=2))
    after = model.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed <= {name.split(".")[0] for name in caught.value.written}
    assert len(changed) < 12


def test_scratch_in_flight_is_bounded_however_large_a_weight_is():
    assert sinks.PART_BYTES <= load.BATCH_BYTES
    assert load.BATCH_BYTES * load.max_batches("cuda") <= 192 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("large", [65520.0, 1e5, math.inf])
def test_a_weight_with_values_that_float16_cannot_hold_is_read_again_and_scaled(
    large, dtype, device, tmp_path, monkeypatch, bytes_read
):
    monkeypatch.setattr(sinks, "PART_BYTES", 1 << 12)
    state = {f"{i}.weight": torch.randn(256, 64).to(dtype) for i in range(4)}
    state["1.weight"][200, 3] = large
    torch.save(state, tmp_path / "a.pth")
    fabric = quantizing_fabric("int8", "32-true" if dtype == torch.float32 else "bf16-true", device.type)
    found, expected = (built(fabric, _four_linears, empty=True) for _ in range(2))
    expected.load_state_dict(state)
    before = bytes_read()
    load_checkpoint(found, tmp_path / "a.pth")
    read = bytes_read() - before
    sizes = sum(value.nbytes for value in state.values()), state["1.weight"].nbytes
    is_large = torch.tensor(large).to(dtype).half().isinf()
    assert (read >= sum(sizes)) == bool(is_large)
    for layer, same in zip(found, expected, strict=True):
        assert torch.equal(layer.weight.data, same.weight.data)
        assert torch.equal(layer.weight.SCB, same.weight.SCB)


def _four_linears():
    return nn.Sequential(*(nn.Linear(64, 256, bias=False) for _ in range(4)))
