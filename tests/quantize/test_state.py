"""Checkpoints of quantized models: saved and loaded to the bit, or refused with the reason."""

import copy
import json

import pytest
import torch
from quantized_models import Mixed, NamedLinear, assert_quantized_as_by_bitsandbytes, bnb, build_eagerly, built
from quantized_models import quantizing_fabric as quantizing
from safetensors.torch import save_file
from torch import nn

from lightning_efficient_init import load_checkpoint, plan_load, uninitialized_parameters
from lightning_efficient_init.errors import CheckpointError, StateDictMismatchError
from lightning_efficient_init.quantize import MODES

PACKED = [mode for mode in MODES if mode != "int8-training"]
TOKENS = torch.arange(12).view(3, 4)


def save_torch(state, folder):
    torch.save(state, folder / "a.pth")
    return folder / "a.pth"


def save_legacy(state, folder):
    torch.save(state, folder / "a.bin", _use_new_zipfile_serialization=False)
    return folder / "a.bin"


def save_lightning(state, folder):
    tree = {"state_dict": {f"model.{name}": value for name, value in state.items()}, "pytorch-lightning_version": "2"}
    torch.save(tree, folder / "a.ckpt")
    return folder / "a.ckpt"


def save_safetensors(state, folder):
    untied = {name: value.clone() for name, value in state.items()}
    save_file(untied, folder / "a.safetensors")
    return folder / "a.safetensors"


def save_shards(state, folder):
    names = list(state)
    weight_map = {}
    for i in range(2):
        part = names[i::2]
        save_file({name: state[name].clone() for name in part}, folder / f"{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


SAVES = [save_torch, save_legacy, save_lightning, save_safetensors, save_shards]


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("mode", MODES)
def test_a_saved_quantized_model_loads_back_bit_for_bit(mode, save, device, tmp_path):
    fabric = quantizing(mode, "bf16-true", device.type)
    model = built(fabric, Mixed).eval()
    path = save(model.state_dict(), tmp_path)
    other = built(fabric, Mixed, seed=1, empty=True).eval()
    report = load_checkpoint(other, path)
    assert not (report.missing)
    assert not (report.unexpected)
    assert not (report.initialized)
    assert uninitialized_parameters(other) == []
    assert_equal_states(other, model.state_dict())
    assert torch.equal(other(TOKENS.to(device)), model(TOKENS.to(device)))


def assert_equal_states(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("assign", [False, True])
def test_torchs_own_load_state_dict_loads_it_too(mode, assign, device):
    fabric = quantizing(mode, "bf16-true", device.type)
    model = built(fabric, Mixed).eval()
    for empty in (False, True):
        other = built(fabric, Mixed, seed=1, empty=empty).eval()
        result = other.load_state_dict(model.state_dict(), assign=assign)
        assert not (result.missing_keys)
        assert not (result.unexpected_keys)
        assert torch.equal(other(TOKENS.to(device)), model(TOKENS.to(device)))
        assert uninitialized_parameters(other) == []


@pytest.mark.parametrize("mode", MODES)
def test_torchs_own_load_state_dict_quantizes_weights_in_full(mode, device):
    expected = build_eagerly(Mixed, torch.bfloat16, device)
    model = built(quantizing(mode, "bf16-true", device.type), Mixed, seed=1, empty=True)
    model.load_state_dict(expected.state_dict())
    if mode != "int8-training":
        assert_quantized_as_by_bitsandbytes(model.named, expected.named.weight, mode)
    with pytest.raises(RuntimeError, match=r"Missing key.*\n?.*named.weight"):
        model.load_state_dict({name: v for name, v in expected.state_dict().items() if name != "named.weight"})
    with pytest.raises(RuntimeError, match=r"size mismatch for named.weight"):
        model.load_state_dict({**expected.state_dict(), "named.weight": torch.randn(3, 3)})


@pytest.mark.parametrize("mode", PACKED)
def test_state_dicts_of_bitsandbytes_own_layers_load_bit_for_bit(mode, device, tmp_path):
    if mode == "int8":
        theirs = bnb.nn.Linear8bitLt(65, 33, has_fp16_weights=False, threshold=6.0)
    else:
        theirs = bnb.nn.Linear4bit(65, 33, compress_statistics=mode.endswith("dq"), quant_type=mode[:3])
    theirs = theirs.half().to(device)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = built(quantizing(mode, "16-true", device.type), lambda: nn.Linear(65, 33), empty=True)
    load_checkpoint(ours, tmp_path / "a.pth")
    assert_equal_states(ours, theirs.state_dict())


def test_packed_values_in_another_storage_dtype_load_bit_for_bit(tmp_path):
    weight = torch.randn(64, 32)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    parts = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    torch.save({"weight": packed, **parts}, tmp_path / "a.pth")
    ours = built(quantizing("nf4", "32-true"), lambda: nn.Linear(32, 64, bias=False))
    load_checkpoint(ours, tmp_path / "a.pth")
    assert_quantized_as_by_bitsandbytes(ours, weight, "nf4")


@pytest.mark.parametrize("kept", MODES)
@pytest.mark.parametrize("asked", MODES)
def test_a_checkpoint_of_another_mode_is_refused_with_the_reason(kept, asked, tmp_path):
    torch.save(built(quantizing(kept), NamedNet).state_dict(), tmp_path / "a.pth")
    model = built(quantizing(asked), NamedNet)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if kept in (asked, "int8-training"):
        load_checkpoint(model, tmp_path / "a.pth")
        return
    for strict in (True, False):
        with pytest.raises(StateDictMismatchError, match=f'quantized as {kept}.*model is {asked}.*quantize="{kept}"'):
            load_checkpoint(model, tmp_path / "a.pth", strict=strict)
    with pytest.raises(RuntimeError, match=f"quantized as {kept}"):
        model.load_state_dict(torch.load(tmp_path / "a.pth"))
    assert_equal_states(model, before)


class NamedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = NamedLinear(64, 32)


@pytest.mark.parametrize("kept", PACKED)
@pytest.mark.parametrize("options", [{}, {"strict": False, "ignore_mismatched": True}])
def test_a_quantized_checkpoint_does_not_load_into_a_model_that_is_not_quantized(kept, options, tmp_path):
    torch.save(built(quantizing(kept), NamedNet).state_dict(), tmp_path / "a.pth")
    model = NamedNet()
    expected = copy.deepcopy(model.state_dict())
    with pytest.raises(StateDictMismatchError, match=r"layer.weight: quantized in the checkpoint.*quantize="):
        load_checkpoint(model, tmp_path / "a.pth", **options)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_a_missing_weight_is_missing(mode, tmp_path):
    state = build_eagerly(Mixed, torch.bfloat16, torch.device("cpu")).state_dict()
    del state["body.2.weight"]
    torch.save(state, tmp_path / "a.pth")
    model = built(quantizing(mode), Mixed, empty=True)
    with pytest.raises(StateDictMismatchError) as caught:
        load_checkpoint(model, tmp_path / "a.pth")
    assert caught.value.missing == ("body.2.weight",)
    report = load_checkpoint(model, tmp_path / "a.pth", strict=False)
    assert report.initialized == ("body.2.weight",)
    assert_same_weight(model.body[2], build_eagerly(Mixed, torch.bfloat16, torch.device("cpu")).body[2].weight, mode)


def assert_same_weight(layer, weight, mode):
    if mode == "int8-training":
        assert torch.equal(layer.weight, weight)
    else:
        assert_quantized_as_by_bitsandbytes(layer, weight, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_shape_that_differs_is_a_mismatch_in_full_shapes(mode, tmp_path):
    torch.save({"layer.weight": torch.randn(32, 63), "layer.bias": torch.zeros(32)}, tmp_path / "a.pth")
    model = built(quantizing(mode), NamedNet)
    with pytest.raises(StateDictMismatchError) as caught:
        plan_load(model, tmp_path / "a.pth")
    assert caught.value.mismatched == {"layer.weight": ((32, 64), (32, 63))}


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_a_missing_part_of_a_quantized_weight_is_missing(mode, tmp_path):
    state = built(quantizing(mode), NamedNet).state_dict()
    parts = [name for name in state if name not in {"layer.weight", "layer.bias", "layer.weight_format"}]
    for part in parts:
        torch.save({name: value for name, value in state.items() if name != part}, tmp_path / "a.pth")
        with pytest.raises(StateDictMismatchError) as caught:
            load_checkpoint(built(quantizing(mode), NamedNet), tmp_path / "a.pth")
        assert part in caught.value.missing or "quantized as" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": 128}, "blocksize 64, found 128"),
        ({"shape": [64, 32]}, r"shape \[32, 64\], found \[64, 32\]"),
        ({"dtype": "no_such"}, "'dtype' is 'no_such'"),
        ({"dtype": "save"}, "'dtype' is 'save'"),
        ({"quant_type": None}, "'quant_type' is None"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change, message, tmp_path):
    state = built(quantizing("nf4"), NamedNet).state_dict()
    key = "layer.weight.quant_state.bitsandbytes__nf4"
    notes = {**json.loads(bytes(state[key].tolist())), **change}
    state[key] = torch.tensor(list(json.dumps(notes).encode()), dtype=torch.uint8)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(StateDictMismatchError, match=message):
        load_checkpoint(built(quantizing("nf4"), NamedNet), tmp_path / "a.pth")


@pytest.mark.parametrize("junk", [b"", b"[1]", b"\xff\xfe", b"{" * 5000])
def test_a_description_that_is_no_json_is_refused(junk, tmp_path):
    state = built(quantizing("nf4"), NamedNet).state_dict()
    state["layer.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(junk), dtype=torch.uint8)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(StateDictMismatchError, match="description of the quantization cannot be read"):
        load_checkpoint(built(quantizing("nf4"), NamedNet), tmp_path / "a.pth")


def test_int8_in_another_layout_is_refused(tmp_path):
    state = built(quantizing("int8"), NamedNet).state_dict()
    state["layer.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(StateDictMismatchError, match=r"row-major order \(0\), found 2"):
        load_checkpoint(built(quantizing("int8"), NamedNet), tmp_path / "a.pth")


@pytest.mark.parametrize("mode", PACKED)
def test_a_parent_with_loading_code_of_its_own_loads_quantized_layers(mode, tmp_path):
    class Renames(nn.Module):
        def __init__(self):
            super().__init__()
            self.new = nn.Linear(64, 32)

        def _load_from_state_dict(self, state_dict, prefix, *args):
            for name in [key for key in state_dict if key.startswith(f"{prefix}old.")]:
                state_dict[f"{prefix}new.{name[len(prefix) + 4 :]}"] = state_dict.pop(name)
            super()._load_from_state_dict(state_dict, prefix, *args)

    weight = torch.randn(32, 64).to(torch.bfloat16)
    torch.save({"old.weight": weight, "old.bias": torch.zeros(32)}, tmp_path / "a.pth")
    model = built(quantizing(mode), Renames, empty=True)
    report = load_checkpoint(model, tmp_path / "a.pth", strict=False)
    assert "new.weight" in report.loaded
    assert_quantized_as_by_bitsandbytes(model.new, weight, mode)


@pytest.mark.parametrize("mode", PACKED)
def test_a_quantized_weight_cannot_be_the_files_own_memory(mode, tmp_path):
    torch.save({"layer.weight": torch.randn(32, 64), "layer.bias": torch.zeros(32)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="mmap=False"):
        load_checkpoint(built(quantizing(mode, "32-true"), NamedNet), tmp_path / "a.pth", mmap=True)


def test_tied_layers_that_are_both_linear_are_left_alone_and_load(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
        model[1].weight = model[0].weight
        return model

    fabric = quantizing("nf4", "32-true")
    model = built(fabric, make)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    other = built(fabric, make, seed=1, empty=True)
    load_checkpoint(other, tmp_path / "a.pth")
    assert other[0].weight is other[1].weight
    assert_equal_states(other, model.state_dict())
