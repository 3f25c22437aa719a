"""``inspect_checkpoint``: what it says of each kind of checkpoint, and what it costs."""

import json
import struct
import time
import warnings

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed import checkpoint as distributed_checkpoint

from lightning_efficient_init.contents import inspect_checkpoint
from lightning_efficient_init.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError

GB = 10**9


class Net(L.LightningModule):
    def __init__(self, width=4):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, width)

    def training_step(self, batch, _):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(2, 4)))


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:.*`tensorboardX` has been removed", "ignore:`max_epochs` was not set")
def test_a_lightning_checkpoint_tells_weights_hyperparameters_and_optimizer(tmp_path):
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, barebones=False)
    trainer.fit(Net())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    contents = inspect_checkpoint(tmp_path / "a.ckpt")
    (weights,) = contents.weights
    assert (weights.key, set(weights.tensors), weights.num_bytes) == ("state_dict", {"layer.weight", "layer.bias"}, 80)
    assert contents.hyperparameters["width"] == 4
    assert contents.has_optimizer_state
    (state,) = [part for part in contents.parts if part.kind == "optimizer state"]
    assert state.key == "optimizer_states"
    assert state.num_bytes == 2 * 80 + 2 * 4  # Adam's two moments, and a step for each of the two parameters
    assert next(part.value for part in contents.parts if part.key == "global_step") == 1


def test_several_models_in_one_file_are_all_weights(tmp_path):
    models = {"generator": nn.Linear(2, 2).state_dict(), "critic": nn.Linear(3, 3).state_dict(), "epoch": 3}
    torch.save(models, tmp_path / "a.pt")
    contents = inspect_checkpoint(tmp_path / "a.pt")
    assert {part.key: part.num_bytes for part in contents.weights} == {"generator": 24, "critic": 48}
    assert not contents.has_optimizer_state


def test_ties_and_views_are_told_apart_and_bytes_count_once(tmp_path):
    base = torch.randn(8, 8)
    state = {"a": base, "b": base, "rows": base[2:4], "columns": base[:, 1:3], "alone": torch.randn(3)}
    state |= {"empty": torch.empty(0, 3), "none": torch.empty(0, 3)}
    torch.save(state, tmp_path / "a.pt")
    contents = inspect_checkpoint(tmp_path / "a.pt")
    assert contents.ties == [("a", "b")]
    assert contents.views == [("a", "columns", "rows")]
    assert contents.weights[0].num_bytes == 8 * 8 * 4 + 3 * 4
    assert len(contents.weights[0].tensors) == 7


def test_a_parameter_saved_under_two_names_counts_under_both(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False)})
    model["b"] = model["a"]
    torch.save(model.state_dict(keep_vars=True), tmp_path / "a.pt")
    assert inspect_checkpoint(tmp_path / "a.pt").ties == [("a.weight", "b.weight")]


def test_a_hugging_face_folder_tells_its_files_and_its_config(tmp_path):
    for name in ("x", "y"):
        save_file({name: torch.zeros(2, 2)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in ("x", "y")}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8-sig")
    contents = inspect_checkpoint(tmp_path)
    assert set(contents.weights[0].tensors) == {"x", "y"}
    assert contents.files == {str(file): file.stat().st_size for file in tmp_path.glob("*.safetensors")}
    assert contents.hyperparameters == {"model_type": "llama"}
    (tmp_path / "config.json").write_text("{")
    assert inspect_checkpoint(tmp_path).hyperparameters == {}


def test_metrics_with_lists_of_tensors_and_extra_states_are_shown(tmp_path):
    state = {"layer.weight": torch.ones(2), "metric": [torch.ones(3)], "layer._extra_state": {"x": torch.ones(4)}}
    torch.save(state, tmp_path / "a.pt")
    assert set(inspect_checkpoint(tmp_path / "a.pt").weights[0].tensors) == {
        "layer.weight",
        "metric.0",
        "layer._extra_state.x",
    }


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_values_among_the_tensors_of_a_model_leave_it_one(key, tmp_path):
    state = {"layer.weight": torch.ones(2), "epoch": 3, "layer._extra_state": 4}
    torch.save(state if key is None else {key: state, "loss": 0.5}, tmp_path / "a.pt")
    contents = inspect_checkpoint(tmp_path / "a.pt")
    assert [(part.key, list(part.tensors)) for part in contents.weights] == [(key, ["layer.weight"])]
    others = {part.key: part.value for part in contents.parts if part.kind == "values"}
    assert others == ({"epoch": 3} if key is None else {"loss": 0.5})


def test_a_folder_of_torch_distributed_is_shown_like_a_file(tmp_path):
    state = {"model": nn.Linear(4, 4).state_dict(), "steps": torch.arange(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no other processes
        distributed_checkpoint.save(state, checkpoint_id=tmp_path / "folder")
    contents = inspect_checkpoint(tmp_path / "folder")
    (weights,) = contents.weights
    assert {name: entry.shape for name, entry in weights.tensors.items()} == {"weight": (4, 4), "bias": (4,)}
    assert weights.num_bytes == 80
    assert contents.views == []
    assert contents.ties == []


def _safetensors_of(path, num_bytes):
    tenth = num_bytes // 10
    tensors = [
        {"dtype": "BF16", "shape": [tenth // 2], "data_offsets": [i * tenth, (i + 1) * tenth]} for i in range(10)
    ]
    header = {f"h.{i}": tensor for i, tensor in enumerate(tensors)}
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + num_bytes)


def _torch_zip_of(path, num_bytes):
    hole = path.with_suffix(".hole")
    with open(hole, "wb") as file:
        file.truncate(num_bytes // 10)
    storages = [torch.UntypedStorage.from_file(str(hole), shared=True, nbytes=num_bytes // 10) for _ in range(10)]
    tensors = [torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (num_bytes // 20,)) for storage in storages]
    with torch.serialization.skip_data():
        torch.save({f"h.{i}": tensor for i, tensor in enumerate(tensors)}, path)


@pytest.mark.parametrize("write", [_safetensors_of, _torch_zip_of], ids=["safetensors", "torch zip"])
def test_100_gb_take_well_under_a_second_and_hardly_a_byte(write, tmp_path, bytes_read):
    write(tmp_path / "large", 100 * GB)
    assert (tmp_path / "large").stat().st_blocks * 512 < 1 << 20  # a hole, or the test would fill the disk
    before, started = bytes_read(), time.perf_counter()
    contents = inspect_checkpoint(tmp_path / "large")
    elapsed = time.perf_counter() - started
    assert contents.weights[0].num_bytes == 100 * GB
    assert elapsed < 0.5
    assert bytes_read() - before < 1 << 20


class Evil:
    def __reduce__(self):
        return print, ("run",)


def test_no_code_from_the_file_runs(tmp_path, capsys):
    torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": {"x": Evil()}}, tmp_path / "a.ckpt")
    with pytest.raises(UnsafeCheckpointError, match="print"):
        inspect_checkpoint(tmp_path / "a.ckpt")
    assert capsys.readouterr().out == ""


def test_errors_are_those_of_loading(tmp_path):
    with pytest.raises(CheckpointNotFoundError):
        inspect_checkpoint(tmp_path / "nothing")
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 10) + b'{"a": {}}')
    with pytest.raises(CorruptCheckpointError):
        inspect_checkpoint(tmp_path / "a.safetensors")
