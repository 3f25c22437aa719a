"""What is recognized, what is refused, and where the weights are."""

import gc
import io
import os
import re
import threading

import pytest
import torch
import torchmetrics

import lightning_efficient_init.checkpoint as checkpoint
from lightning_efficient_init.checkpoint import index_checkpoint, index_tree, read_entry, weights_of
from lightning_efficient_init.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReadError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)

WEIGHTS = {"layer.weight": torch.ones(2, 2), "layer.bias": torch.zeros(2)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2, 2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def save(obj, path):
    torch.save(obj, path)
    return path


def test_all_names_are_exported():
    assert sorted(checkpoint.__all__) == sorted(
        name for name, value in vars(checkpoint).items() if not name.startswith("_") and not hasattr(value, "__path__")
        and type(value).__name__ != "module"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        (WEIGHTS, None),
        ({"state_dict": WEIGHTS, "epoch": 1, "optimizer_states": [OPTIMIZER]}, "state_dict"),
        ({"state_dict": WEIGHTS, "model": WEIGHTS}, "state_dict"),
        ({"model": WEIGHTS, "optimizer": OPTIMIZER, "step": 3}, "model"),
        ({"model": WEIGHTS, "ema": WEIGHTS}, "model"),
        ({"net": WEIGHTS, "optimizer": OPTIMIZER, "step": torch.tensor(3)}, "net"),
        (WEIGHTS | {"layer._extra_state": {"scale": torch.ones(1)}}, None),
        (WEIGHTS | {"epoch": 3, "note": None, "config": {"sizes": [2]}}, None),
        ({"state_dict": WEIGHTS | {"epoch": 3}, "ema": WEIGHTS}, "state_dict"),
        ({"model": WEIGHTS | {"epoch": 3}, "ema": WEIGHTS, "loss": torch.tensor(3.0)}, "model"),
        ({"model": {"name": "net", "scale": torch.tensor(3.0)}, "net": WEIGHTS}, "net"),
        ({"net": WEIGHTS, "loss": torch.tensor(3.0), "epoch": 3}, "net"),
        ({}, None),
        ({"state_dict": {}}, "state_dict"),
    ],
)
def test_the_weights_are_found(tmp_path, tree, key):
    index = index_checkpoint(save(tree, tmp_path / "a.pt"))
    assert index.weights_key == key
    assert index_checkpoint(tmp_path / "a.pt", weights_key=key).weights == index.weights
    assert index.weights.keys() == (tree if key is None else tree[key]).keys()


def test_several_candidates_are_listed_and_one_may_be_named(tmp_path):
    path = save({"generator": WEIGHTS, "critic": WEIGHTS, "optimizer": OPTIMIZER}, tmp_path / "a.pt")
    with pytest.raises(UnsupportedCheckpointError, match=r"'generator', 'critic'.*fabric.load\(path, \{\"generator"):
        index_checkpoint(path)
    assert index_checkpoint(path, weights_key="critic").weights_key == "critic"
    tree = index_tree(path).tree
    assert weights_of(tree, "generator", path=str(path)).entries is tree["generator"]
    with pytest.raises(CheckpointNotFoundError, match=r"'net'.*'generator'"):
        weights_of(tree, "net", path=str(path))
    with pytest.raises(CheckpointNotFoundError, match=r"'optimizer', found .*'exp_avg': a tensor, float32 \[2, 2\]"):
        weights_of(tree, "optimizer", path=str(path))


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ({"a": 1}, "the keys 'a'"),
        ([torch.ones(1)], "[a tensor, float32 [1]]"),
        (torch.ones(2, 3), "a tensor, float32 [2, 3]"),
        (3, "3"),
        ({"optimizer": OPTIMIZER}, "the keys 'optimizer'"),
        (WEIGHTS | {"optimizer": OPTIMIZER}, "the keys 'layer.weight', 'layer.bias', 'optimizer'"),
        (WEIGHTS | {3: "epoch"}, "the keys 'layer.weight', 'layer.bias', 3"),
    ],
)
def test_a_checkpoint_without_weights_is_reported(tmp_path, tree, found):
    with pytest.raises(
        CheckpointNotFoundError, match=re.escape(f"expected a state dict somewhere in it, found {found}. ")
    ):
        index_checkpoint(save(tree, tmp_path / "a.pt"))


def test_the_path_is_kept_and_the_files_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(WEIGHTS, tmp_path / "a.pt")
    index = index_checkpoint("a.pt")
    assert index.path == "a.pt"
    assert index.files == (os.path.abspath("a.pt"),)
    assert index.weights["layer.bias"].file == os.path.abspath("a.pt")


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="nothing at this path"):
        index_checkpoint(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        index_checkpoint(save(WEIGHTS, tmp_path / "b.pt") / "c")


@pytest.mark.parametrize("path", ["\0", "a" * 5000])
def test_an_impossible_path_is_reported(path):
    with pytest.raises((CheckpointReadError, CheckpointNotFoundError)):
        index_checkpoint(path)


@pytest.mark.parametrize("path", ["file://{}/a.pt", "~/a.pt"])
def test_paths_may_be_written_as_lightning_takes_them(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(WEIGHTS, tmp_path / "a.pt")
    assert index_checkpoint(path.format(tmp_path)).weights.keys() == WEIGHTS.keys()


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert index_checkpoint(".").weights.keys() == WEIGHTS.keys()
    for path in ("", b"", "file://"):
        with pytest.raises(CheckpointNotFoundError, match="an empty one"):
            index_checkpoint(path)


def test_a_url_is_refused_with_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(CheckpointNotFoundError, match=r"a URL\. Download it"):
        index_checkpoint("s3://bucket/a.pt")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    save(WEIGHTS, tmp_path / "s3:" / "bucket" / "a.pt")
    assert index_checkpoint("s3://bucket/a.pt").weights.keys() == WEIGHTS.keys()


@pytest.mark.parametrize("path", [None, WEIGHTS, 3, io.BytesIO(), torch.nn.ReLU()])
def test_what_is_no_path_is_refused_with_what_to_do(path):
    with pytest.raises(TypeError, match=f"found {type(path).__name__}.*load_state_dict"):
        index_checkpoint(path)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_reported(tmp_path):
    path = save(WEIGHTS, tmp_path / "a.pt")
    path.chmod(0)
    with pytest.raises(CheckpointReadError, match="permission"):
        index_checkpoint(path)


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsupportedCheckpointError, match="regular file"):
        index_checkpoint(tmp_path / "pipe")
    with pytest.raises(UnsupportedCheckpointError, match="regular file"):
        index_checkpoint("/dev/zero")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"hello", "starts with b'hello'"),
        (b"\x80\x04]\x94.", "plain pickle"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (bytes(257) + b"ustar\0", "tar file"),
        (b"PK\x05\x06" + bytes(18), "empty zip"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, found):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    with pytest.raises((CorruptCheckpointError, UnsupportedCheckpointError), match=rf"a\.ckpt.*{found}"):
        index_checkpoint(path)


def test_a_folder_without_weights_is_reported_with_what_is_in_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointNotFoundError, match=r"config\.json"):
        index_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_torch_distributed_folder_of_bare_weights_is_read(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "dcp")
    found = index_checkpoint(tmp_path / "dcp")
    assert found.format == "torch distributed checkpoint folder"
    assert torch.equal(read_entry(found.weights["w"]), torch.ones(2))


def test_a_deepspeed_folder_of_whole_weights_is_read(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    save({"module": WEIGHTS, "ds_version": "0"}, tmp_path / "checkpoint" / "mp_rank_00_model_states.pt")
    for folder in (tmp_path, tmp_path / "checkpoint"):
        index = index_checkpoint(folder)
        assert index.format == "DeepSpeed folder"
        assert list(index.weights) == list(WEIGHTS)


def test_a_deepspeed_folder_of_model_parallel_training_is_refused(tmp_path):
    for rank in range(2):
        save({"module": WEIGHTS}, tmp_path / f"mp_rank_0{rank}_model_states.pt")
    with pytest.raises(UnsupportedCheckpointError, match="mp_rank_01_model_states"):
        index_checkpoint(tmp_path)


def test_garbage_collection_is_as_it_was_afterwards(tmp_path):
    path = save(WEIGHTS, tmp_path / "a.pt")
    bad = tmp_path / "bad.pt"
    bad.write_bytes(path.read_bytes()[:-30])

    def work():
        for _ in range(20):
            index_checkpoint(path)
            with pytest.raises(CheckpointError):
                index_checkpoint(bad)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gc.isenabled()
    gc.disable()
    try:
        index_checkpoint(path)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_large_file_is_indexed_without_a_pass_over_its_data(tmp_path):
    import time

    layers = {f"layers.{i}.weight": torch.empty(0) for i in range(291)}
    base = torch.empty(1 << 26, dtype=torch.uint8)  # pages nobody wrote take no memory
    path = save(layers | {"base": base}, tmp_path / "a.pt")
    start = time.perf_counter()
    index = index_checkpoint(path)
    assert time.perf_counter() - start < 1.0
    assert index.weights["base"].num_bytes == 1 << 26


def test_a_state_dict_may_hold_lists_of_tensors(tmp_path):
    metric = torchmetrics.CatMetric()
    metric.persistent(True)
    metric.update(torch.ones(2))
    state = {"w": torch.zeros(3), **metric.state_dict(prefix="metric.")}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "a.ckpt")
    weights = index_checkpoint(tmp_path / "a.ckpt").weights
    assert [entry.shape for entry in weights["metric.value"]] == [(2,)]
