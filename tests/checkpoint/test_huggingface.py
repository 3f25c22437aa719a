"""Hugging Face folders."""

import json

import pytest
import safetensors.torch
import torch

from lightning_efficient_init.checkpoint import index_checkpoint
from lightning_efficient_init.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)

TENSORS = {f"layer.{i}.weight": torch.full((2, 3), float(i)) for i in range(4)}
FIRST, SECOND = dict(list(TENSORS.items())[:2]), dict(list(TENSORS.items())[2:])


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def sharded(folder, save=safetensors.torch.save_file, name="model.safetensors.index.json", suffix="safetensors"):
    save(FIRST, folder / f"1.{suffix}")
    save(SECOND, folder / f"2.{suffix}")
    weight_map = dict.fromkeys(FIRST, f"1.{suffix}") | dict.fromkeys(SECOND, f"2.{suffix}")
    return write_index(folder, weight_map, name)


def test_shards_of_safetensors_become_one_index(tmp_path, assert_same):
    index = index_checkpoint(sharded(tmp_path))
    assert index.format == "Hugging Face folder: model.safetensors.index.json"
    assert index.files == (str(tmp_path / "1.safetensors"), str(tmp_path / "2.safetensors"))
    assert_same(index.weights, TENSORS)


def test_shards_of_torch_become_one_index(tmp_path, assert_same):
    index = index_checkpoint(sharded(tmp_path, torch.save, "pytorch_model.bin.index.json", "bin"))
    assert_same(index.weights, TENSORS)


def test_what_transformers_saves_is_read(tmp_path, assert_same):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = index_checkpoint(tmp_path)
    assert len(index.files) > 1
    expected = model.state_dict()
    assert index.weights.keys() <= expected.keys()
    assert_same({k: index.weights[k] for k in index.weights}, {k: expected[k] for k in index.weights})


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_single_file_needs_no_index(tmp_path, assert_same, name):
    (safetensors.torch.save_file if name.endswith("safetensors") else torch.save)(TENSORS, tmp_path / name)
    index = index_checkpoint(tmp_path)
    assert index.format == f"Hugging Face folder: {name}"
    assert_same(index.weights, TENSORS)


def test_safetensors_are_preferred_and_the_format_says_so(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    index = index_checkpoint(tmp_path)
    assert index.format == "Hugging Face folder: model.safetensors (pytorch_model.bin not read)"
    assert index.files == (str(tmp_path / "model.safetensors"),)


def test_an_index_may_be_named_itself(tmp_path, assert_same):
    sharded(tmp_path, name="diffusion.safetensors.index.json")
    assert_same(index_checkpoint(tmp_path / "diffusion.safetensors.index.json").weights, TENSORS)
    assert_same(index_checkpoint(tmp_path).weights, TENSORS)
    write_index(tmp_path, {}, "other.safetensors.index.json")
    with pytest.raises(UnsupportedCheckpointError, match=r"diffusion.*other"):
        index_checkpoint(tmp_path)


def test_an_index_may_start_with_a_byte_order_mark(tmp_path, assert_same):
    index = sharded(tmp_path) / "model.safetensors.index.json"
    index.write_text(index.read_text(), encoding="utf-8-sig")
    for path in (tmp_path, index):
        assert_same(index_checkpoint(path).weights, TENSORS)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "", ".", "nul\0"])
def test_a_shard_outside_the_folder_is_refused(tmp_path, name):
    with pytest.raises(CorruptCheckpointError, match="inside the folder"):
        index_checkpoint(write_index(tmp_path, {"w": name}))


def test_a_missing_shard_is_named_with_what_it_holds(tmp_path):
    sharded(tmp_path)
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"2\.safetensors.*holds 2 tensors"):
        index_checkpoint(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    sharded(tmp_path)
    safetensors.torch.save_file({"layer.2.weight": TENSORS["layer.2.weight"]}, tmp_path / "2.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"2\.safetensors.*'layer\.3\.weight'"):
        index_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "[" * 100_000])
def test_a_damaged_index_is_reported(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=r"index\.json.*weight_map"):
        index_checkpoint(tmp_path)


def test_a_shard_that_is_no_checkpoint_is_reported(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"hello there, reader")
    with pytest.raises(CorruptCheckpointError, match=r"x\.safetensors"):
        index_checkpoint(write_index(tmp_path, {"w": "x.safetensors"}))


def test_a_shard_that_is_no_state_dict_is_refused(tmp_path):
    torch.save({"state_dict": TENSORS, "epoch": 1}, tmp_path / "x.bin")
    with pytest.raises(UnsupportedCheckpointError, match=r"x\.bin.*state dict"):
        index_checkpoint(write_index(tmp_path, {"w": "x.bin"}))
