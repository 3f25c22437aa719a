"""Folders of torch.distributed.checkpoint: into one device, and hostile ones."""

from __future__ import annotations

import io
import pickle
import shutil

import pytest
import torch
from ranks import run_ranks
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_efficient_init import load_checkpoint
from lightning_efficient_init.checkpoint import Entry, index_checkpoint, index_tree, read_entry
from lightning_efficient_init.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedCheckpointError,
)

PLACEMENTS = {"rows": [Shard(0)], "columns": [Shard(1)], "whole": [Replicate()]}


def state():
    torch.manual_seed(3)
    shapes = {"rows": (7, 4), "columns": (3, 8), "whole": (5,)}
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {**values, "whole": values["whole"].bfloat16()}


def _save(rank, folder):
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (3,))
    model = {}
    for name, value in state().items():
        (placement,) = PLACEMENTS[name]
        local = value if name == "whole" else value.chunk(3, placement.dim)[rank].contiguous()
        shape = {"shape": value.shape, "stride": value.stride()}
        model[name] = DTensor.from_local(local, mesh, [placement], run_check=False, **shape)
    dcp.save({"model": model, "lists": [torch.ones(2), {"a": 1.5}], "step": 7}, checkpoint_id=folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed") / "a"
    run_ranks(_save, 3, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_tensors_that_three_ranks_have_saved_are_read_by_one(saved):
    found = index_checkpoint(saved)
    assert found.format == "torch distributed checkpoint folder"
    assert found.weights_key == "model"
    for name, value in state().items():
        entry = found.weights[name]
        assert (entry.shape, entry.dtype) == (tuple(value.shape), value.dtype)
        assert torch.equal(read_entry(entry), value)
    assert len(found.weights["rows"].chunks) == 3
    assert not found.weights["whole"].chunks


def test_the_tree_is_the_one_that_was_saved(saved):
    tree = index_tree(saved).tree
    assert tree["step"] == 7
    assert isinstance(tree["lists"][0], Entry)
    assert tree["lists"][1] == {"a": 1.5}


def test_a_model_takes_them_on_one_device(saved):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in state().items():
                self.register_parameter(name, nn.Parameter(torch.empty_like(value)))

    model = Net()
    report = load_checkpoint(model, saved)
    assert report.num_bytes == sum(value.nbytes for value in state().values())
    for name, value in state().items():
        assert torch.equal(getattr(model, name), value)


class Runs:
    def __reduce__(self):
        return print, ("code ran",)


def test_no_code_of_the_metadata_runs(folder, capsys):
    (folder / ".metadata").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(UnsafeCheckpointError, match=r"builtins\.print"):
        index_checkpoint(folder)
    assert not capsys.readouterr().out


def edit(folder, change):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def outside(metadata):
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"


def beyond(metadata):
    next(iter(metadata.storage_data.values())).offset = 1 << 40


def overlapping(metadata):
    chunks = metadata.state_dict_metadata["model.rows"].chunks
    chunks[1] = chunks[0]


def lost(metadata):
    metadata.state_dict_metadata["model.rows"].chunks.pop()


def larger(metadata):
    metadata.state_dict_metadata["model.rows"].size = torch.Size([70, 4])


def absent(metadata):
    metadata.storage_data.clear()


@pytest.mark.parametrize("change", [outside, beyond, overlapping, lost, larger, absent])
def test_metadata_that_contradicts_the_files_is_corrupt(folder, change):
    edit(folder, change)
    with pytest.raises(CorruptCheckpointError):
        index_checkpoint(folder)


def test_transformed_chunks_are_refused(folder):
    def compress(metadata):
        next(iter(metadata.storage_data.values())).transform_descriptors = ["zstd"]

    edit(folder, compress)
    with pytest.raises(UnsupportedCheckpointError, match=r"zstd.*Save it without"):
        index_checkpoint(folder)


def short(body):
    return b"\x80\x05" + body + b"."


@pytest.mark.parametrize(
    "program",
    [
        short(b"\x96" + (1 << 40).to_bytes(8, "little")),  # BYTEARRAY8
        short(b"})" + b"2\x86" * 64 + b"Ns"),  # a key of pairs of pairs
        short(b"})" + b"q\x00h\x00\x86" * 64 + b"Ns"),
        short(b"cpathlib\nPosixPath\n)" + b"q\x00h\x00\x86" * 64 + b"\x85R"),
        short(b"ctorch\nSize\nN}(X\x0c\x00\x00\x00__defaults__K\x07\x85u\x86b"),
    ],
    ids=["enormous", "duplicated keys", "keys", "paths", "functions"],
)
def test_metadata_that_takes_forever_or_changes_functions_is_refused(folder, program):
    (folder / ".metadata").write_bytes(program)
    with pytest.raises(CorruptCheckpointError, match=r"a sound pickle|a whole pickle"):
        index_tree(folder)


def test_an_object_that_spells_out_to_an_enormous_one_takes_no_time(folder):
    shared = {}
    for _ in range(64):
        shared = {"a": shared, "b": shared}
    saved = io.BytesIO()
    torch.save(shared, saved)

    def replace(metadata):
        info = next(info for index, info in metadata.storage_data.items() if index.offset is None)
        path = folder / info.relative_path
        info.offset, info.length = path.stat().st_size, len(saved.getvalue())
        path.write_bytes(path.read_bytes() + saved.getvalue())

    edit(folder, replace)
    assert index_tree(folder)


def confusing(metadata):
    metadata.state_dict_metadata["model.rows"].chunks = None


def nameless(metadata):
    metadata.planner_data["model.rows"] = ([], "rows")


@pytest.mark.parametrize("change", [confusing, nameless])
def test_metadata_of_other_kinds_is_corrupt(folder, change):
    edit(folder, change)
    with pytest.raises(CorruptCheckpointError):
        index_tree(folder)


def test_truncated_files_and_metadata_say_so(folder):
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for size in {0, 1, len(whole) // 3, len(whole) - 1}:
            path.write_bytes(whole[:size])
            with pytest.raises(CheckpointError):
                index_checkpoint(folder)
        path.write_bytes(whole)
    index_checkpoint(folder)
