"""What torch.save writes, in both of its formats."""

import argparse
import collections
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

from lightning_efficient_init.checkpoint import Entry, index_checkpoint, index_tree, unpickle
from lightning_efficient_init.errors import (
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedCheckpointError,
)

Pair = collections.namedtuple("Pair", "first second")

both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
both_unpicklers = pytest.mark.parametrize("weights_only", [True, False], ids=["restricted", "trusted"])


def save(obj, path, zipped=True, **options):
    torch.save(obj, path, _use_new_zipfile_serialization=zipped, **options)
    return path


@both_formats
@both_unpicklers
def test_every_tensor_is_found_bit_for_bit(tmp_path, state_dict, assert_same, zipped, weights_only):
    path = save(state_dict, tmp_path / "a.pt", zipped)
    index = index_checkpoint(path, weights_only=weights_only)
    assert index.format == ("torch zip" if zipped else "legacy torch")
    assert index.files == (str(path),)
    assert index.weights_key is None
    assert_same(index.weights, state_dict)
    if zipped:  # torch does not read back all dtypes of its legacy files
        assert_same(index.weights, torch.load(path, weights_only=True))


@both_formats
@both_unpicklers
def test_the_tree_keeps_its_containers(tmp_path, assert_same, zipped, weights_only):
    tree = {
        "state_dict": torch.nn.BatchNorm1d(3).state_dict(),
        "epoch": 3,
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(1.0), "avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
        ],
        "hyper_parameters": {
            "name": "ä",
            "sizes": (1, 2, 3, 4),
            "none": None,
            "flag": True,
            "big": 2**70,
            "bytes": b"\xff\0",
        },
        "counter": collections.Counter("abca"),
        "set": {1, 2},
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
        "complex": 1 + 2j,
        ("tuple", 1): [torch.zeros(2)],
    }
    assert_same(index_checkpoint(save(tree, tmp_path / "a.pt", zipped), weights_only=weights_only).tree, tree)


@both_formats
def test_tied_tensors_have_equal_entries_and_views_only_their_bytes(tmp_path, zipped):
    base = torch.arange(40.0).reshape(4, 10)
    weights = index_checkpoint(save({"a": base, "b": base, "row": base[2]}, tmp_path / "a.pt", zipped)).weights
    assert weights["a"] == weights["b"]
    assert weights["row"].offset == weights["a"].offset + 20 * 4
    assert weights["row"].extent_bytes == 40


def test_every_pickle_protocol_is_read(tmp_path, state_dict, assert_same):
    for protocol in (2, 3, 4, 5):
        path = save(state_dict, tmp_path / f"{protocol}.pt", pickle_protocol=protocol)
        assert_same(index_checkpoint(path).weights, state_dict)


def test_offsets_are_those_that_torch_finds(tmp_path, state_dict):
    path = save(dict(state_dict), tmp_path / "a.pt")
    theirs = torch.load(path, map_location="meta", weights_only=True)
    for key, entry in index_checkpoint(path).weights.items():
        tensor = theirs[key]
        if tensor.numel() and hasattr(tensor.untyped_storage(), "_checkpoint_offset"):  # torch 2.7 and later
            offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
            assert entry.offset == offset


def test_a_checkpoint_without_alignment_or_checksums_is_read(tmp_path, state_dict, assert_same, write_torch_zip):
    with zipfile.ZipFile(save(state_dict, tmp_path / "a.pt")) as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    assert_same(index_checkpoint(write_torch_zip(members.pop("data.pkl"), members)).weights, state_dict)


def test_a_whole_module_counts_as_weights_when_code_may_run(tmp_path, assert_same):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    path = save(module, tmp_path / "a.pt")
    index = index_checkpoint(path, weights_only=False)
    assert_same(index.weights, module.state_dict())
    assert index.weights_key is None
    nested = index_checkpoint(save({"net": module, "step": 1}, tmp_path / "b.pt"), weights_only=False)
    assert_same(nested.weights, module.state_dict())
    assert nested.weights_key == "net"


@both_formats
def test_a_module_is_refused_unless_code_may_run(tmp_path, zipped):
    path = save({"m": torch.nn.Linear(2, 2)}, tmp_path / "a.pt", zipped)
    with pytest.raises(
        UnsafeCheckpointError, match=r"a\.pt.*torch\.nn\.modules\.linear\.Linear.*add_safe_globals.*weights_only=False"
    ):
        index_checkpoint(path)


def test_entries_take_the_place_of_tensors_in_objects_when_code_may_run(tmp_path):
    value = argparse.Namespace(weight=torch.ones(3), name="x", inner=Pair(torch.zeros(2), 1))
    tree = index_tree(save({"a": torch.ones(1), "b": value}, tmp_path / "a.pt"), weights_only=False).tree
    assert isinstance(tree["b"].weight, Entry)
    assert isinstance(tree["b"].inner.first, Entry)
    assert type(tree["b"].inner) is Pair
    assert tree["b"].name == "x"


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@both_formats
def test_no_code_of_a_checkpoint_runs(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    path = save({"w": torch.ones(2), "evil": Evil()}, tmp_path / "a.pt", zipped)
    with pytest.raises(UnsafeCheckpointError):
        index_tree(path)
    assert not Path("ran").exists()
    index_tree(path, weights_only=False)
    assert Path("ran").exists()


def test_classes_allowed_with_add_safe_globals_are_made(tmp_path):
    value = argparse.Namespace(lr=0.1, weight=torch.ones(3))
    path = save({"w": torch.ones(2), "args": value, "d": collections.defaultdict(list, {"a": [1]})}, tmp_path / "a.pt")
    with pytest.raises(UnsafeCheckpointError, match=r"argparse\.Namespace"):
        index_tree(path)
    with torch.serialization.safe_globals([argparse.Namespace, collections.defaultdict, list]):
        tree = index_tree(path).tree
    assert tree["args"].lr == 0.1
    assert isinstance(tree["args"].weight, Entry)
    assert tree["d"] == {"a": [1]}


def test_modules_that_torch_blocks_stay_blocked_when_allowed(tmp_path, write_torch_zip):
    import os

    path = write_torch_zip(b"\x80\x02cposix\nsystem\nX\x06\x00\x00\x00echo x\x85R.")
    with torch.serialization.safe_globals([os.system]), pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        index_checkpoint(path)


@both_unpicklers
@pytest.mark.parametrize(
    ("what", "make"),
    [
        ("quantized", lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
        ("sparse", lambda: torch.eye(3).to_sparse()),
        ("lazy", lambda: torch.ones(2, dtype=torch.complex64).conj()),
        ("lazy", lambda: torch._neg_view(torch.ones(2))),
        ("device", lambda: torch.ones(2, device="meta")),
        ("storage", lambda: torch.ones(2).untyped_storage()),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensors_without_plain_memory_are_refused_by_name(tmp_path, what, make, weights_only):
    path = save({"net": {"layer.weight": make()}}, tmp_path / "a.pt")
    with pytest.raises(UnsupportedCheckpointError, match=rf"a\.pt.*'net/layer\.weight'.*{what}"):
        index_checkpoint(path, weights_only=weights_only)


class Subclass(torch.Tensor):
    pass


def test_tensor_subclasses_are_refused_by_name_even_when_allowed(tmp_path):
    path = save({"w": torch.ones(2).as_subclass(Subclass)}, tmp_path / "a.pt")
    with pytest.raises(UnsafeCheckpointError, match="Subclass"):
        index_checkpoint(path)
    with (
        torch.serialization.safe_globals([Subclass]),
        pytest.raises(UnsupportedCheckpointError, match=r"'w'.*Subclass"),
    ):
        index_checkpoint(path)


def test_attributes_of_a_parameter_stay_behind(tmp_path, assert_same):
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.note = "x"
    assert_same(index_checkpoint(save({"w": parameter}, tmp_path / "a.pt")).weights["w"], parameter)


def saved_as(tree):
    return {name: (entry.is_parameter, entry.requires_grad) for name, entry in tree.items()}


@both_formats
@both_unpicklers
def test_entries_say_what_was_a_parameter_and_what_required_gradients(tmp_path, zipped, weights_only):
    parameter = torch.nn.Parameter(torch.ones(3))
    tensors = {
        "parameter": parameter,
        "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "plain": parameter.detach(),
        "trained": torch.ones(4, requires_grad=True),
        "bits": torch.nn.Parameter(torch.ones(2, dtype=torch.uint16), requires_grad=False),
    }
    found = index_tree(save(tensors, tmp_path / "a.pt", zipped), weights_only=weights_only).tree
    assert saved_as(found) == {
        "parameter": (True, True),
        "frozen": (True, False),
        "plain": (False, False),
        "trained": (False, True),
        "bits": (True, False),
    }
    assert found["plain"] == found["parameter"]  # the same tensor
    assert len({found["plain"], found["parameter"]}) == 1


def test_big_endian_numbers_are_refused(tmp_path, write_torch_zip):
    with zipfile.ZipFile(save({"w": torch.ones(2)}, tmp_path / "a.pt")) as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    pickled = members.pop("data.pkl")
    with pytest.raises(UnsupportedCheckpointError, match="big-endian"):
        index_checkpoint(write_torch_zip(pickled, members | {"byteorder": b"big"}))
    with pytest.raises(CorruptCheckpointError, match="byte order"):
        index_checkpoint(write_torch_zip(pickled, members | {"byteorder": b"huh"}))
    legacy = save({"w": torch.ones(2)}, tmp_path / "l.pt", zipped=False)
    data = legacy.read_bytes()
    at = data.index(b"little_endian")
    legacy.write_bytes(data[:at] + data[at:].replace(b"\x88", b"\x89", 1))
    with pytest.raises(UnsupportedCheckpointError, match="big-endian"):
        index_checkpoint(legacy)


def test_a_torchscript_archive_is_refused(tmp_path):
    path = tmp_path / "a.pt"

    class Code(torch.nn.Module):
        def forward(self, x):
            return x

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Code()), path)
    with pytest.raises(UnsupportedCheckpointError, match=r"TorchScript.*torch\.jit\.load"):
        index_checkpoint(path)


def test_deflated_members_are_refused(write_torch_zip):
    path = write_torch_zip(pickle.dumps({}, 2), {"data/0": bytes(1000)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UnsupportedCheckpointError, match="stored as it is, found it compressed"):
        index_checkpoint(path)


@both_formats
def test_a_file_cut_anywhere_is_reported_as_damaged(tmp_path, state_dict, zipped):
    path = save({key: state_dict[key] for key in ("0.weight", "base", "scalar")}, tmp_path / "a.pt", zipped)
    data = path.read_bytes()
    for size in {*range(0, len(data), 7), *range(1, 64), len(data) - 1}:
        path.write_bytes(data[:size])
        with pytest.raises((CorruptCheckpointError, UnsupportedCheckpointError), match=r"a\.pt"):
            index_checkpoint(path)


def test_a_legacy_file_without_its_last_bytes_names_the_tensor(tmp_path):
    path = save({"first": torch.ones(2), "last": torch.ones(100)}, tmp_path / "a.pt", zipped=False)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptCheckpointError, match=r"tensor '(first|last)'.*truncated"):
        index_checkpoint(path)


def test_a_legacy_file_whose_pickle_is_longer_than_the_first_read_is_read(tmp_path, assert_same, monkeypatch):
    monkeypatch.setattr("lightning_efficient_init.checkpoint.torch_legacy._FIRST_BYTES", 100)
    tensors = {f"layer {i}": torch.full((i,), i) for i in range(50)}
    assert_same(index_checkpoint(save(tensors, tmp_path / "a.pt", zipped=False)).weights, tensors)


def test_parts_of_storages_in_old_legacy_files_are_read(tmp_path, assert_same):
    path = tmp_path / "a.pt"
    base = torch.arange(10.0)

    class OldPickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "k", "cpu", 10, ("v", 4, 5)) if obj == "STORAGE" else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor, ("STORAGE", 1, (2,), (1,))

    with open(path, "wb") as file:
        for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(value, file, 2)
        OldPickler(file, 2).dump({"w": Tensor()})
        pickle.dump(["k"], file, 2)
        file.write((10).to_bytes(8, "little") + bytes(base.view(torch.uint8).tolist()))
    assert_same(index_checkpoint(path).weights["w"], base[5:7])
    assert_same(index_checkpoint(path, weights_only=False).weights["w"], base[5:7])


def test_a_lightning_checkpoint_is_recognized(tmp_path, assert_same):
    lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):
        def __init__(self, width=3):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(width, 1)

        def training_step(self, batch, _):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    model = Model()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, torch.utils.data.DataLoader(torch.randn(4, 3)))
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    index = index_checkpoint(tmp_path / "a.ckpt")
    assert index.weights_key == "state_dict"
    assert_same(index.weights, model.state_dict())
    assert index.tree["hyper_parameters"] == {"width": 3}
    assert isinstance(index.tree["optimizer_states"][0]["state"][0]["exp_avg"], Entry)
    assert_same(index.tree, torch.load(tmp_path / "a.ckpt", weights_only=True))


def test_a_fabric_checkpoint_is_recognized(tmp_path, assert_same):
    fabric_module = pytest.importorskip("lightning.fabric")
    fabric = fabric_module.Fabric(accelerator="cpu", devices=1)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    fabric.save(tmp_path / "a.ckpt", {"net": model, "optimizer": optimizer, "step": 3})
    index = index_checkpoint(tmp_path / "a.ckpt")
    assert index.weights_key == "net"
    assert_same(index.weights, model.state_dict())
    assert index.weights_metadata == model.state_dict()._metadata


def many_kinds(count):
    """Tensors of all that a pickle spells differently: dims, dtypes, sizes of numbers, ties, views, parameters."""
    base, tree = torch.randn(300, 400), {}
    for i in range(count):
        dtype = (torch.float32, torch.bfloat16, torch.int64)[i % 3]
        tree[f"{i}.plain"] = torch.ones((), dtype=dtype).expand((2,) * (i % 6)).contiguous()
        tree[f"{i}.view"] = base[i % 7 : 200, i % 5 :: 2].t()
        tree[f"{i}.empty"] = torch.empty(0, 70_000, 3)
        tree[f"{i}.grad"] = torch.zeros(3, requires_grad=True)
        tree[f"{i}.parameter"] = torch.nn.Parameter(torch.zeros(1, 3))
        tree[f"{i}.tied"] = tree[f"{i}.grad"]
    return tree


def one_by_one(monkeypatch):
    monkeypatch.setattr(unpickle, "_CALL", re.compile(rb"(?!)"))


def test_tensors_taken_in_one_step_are_those_of_single_instructions(tmp_path, monkeypatch, assert_same):
    tree = many_kinds(100)
    path = save(tree, tmp_path / "a.pt")
    found = index_checkpoint(path).weights
    with zipfile.ZipFile(path) as content:
        assert len(unpickle._CALL.findall(content.read("a/data.pkl"))) > 250  # all but those that require gradients
    one_by_one(monkeypatch)
    assert found == index_checkpoint(path).weights
    assert saved_as(found) == saved_as(index_checkpoint(path).weights)
    assert_same(found, tree)


def test_what_one_step_leaves_out_can_still_be_asked_for(tmp_path, write_torch_zip):
    path = save({f"w{i}": torch.ones(4, 5) for i in range(80)}, tmp_path / "a.pt")
    with zipfile.ZipFile(path) as content:
        members = {name.split("/", 1)[1]: content.read(name) for name in content.namelist()}
    program = members.pop("data.pkl")
    *_, last = unpickle._CALL.finditer(program)
    shape_put = program.index(b"K\x04K\x05\x86r", last.start()) + 5
    asked = program[:-2] + b"X\x05\0\0\0shapej" + program[shape_put + 1 : shape_put + 5] + program[-2:]
    tree = index_tree(write_torch_zip(asked, members)).tree
    assert tree.pop("shape") == (4, 5)
    assert all(entry.shape == (4, 5) for entry in tree.values())


def test_a_state_dict_as_torch_writes_it_is_unpickled_in_one_go(tmp_path, monkeypatch):
    model = torch.nn.ModuleList(torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4)) for _ in range(20))
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "w.pt")
    start, starts = unpickle.SafeUnpickler._start, []
    monkeypatch.setattr(
        unpickle.SafeUnpickler, "_start", lambda *args, **how: starts.append(how) or start(*args, **how)
    )
    assert len(index_checkpoint(tmp_path / "w.pt").weights) == 160
    assert starts == [{"skips": True}]  # not again without skipping
