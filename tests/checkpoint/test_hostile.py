"""Files made to mislead, to hang, to fill memory or to crash the reader."""

import json
import pickle
import random
import struct
import time
import zipfile
from collections import OrderedDict

import pytest
import safetensors.torch
import torch

from lightning_efficient_init.checkpoint import Entry, index_checkpoint, index_tree
from lightning_efficient_init.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedCheckpointError,
)

P = b"\x80\x02"


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def tensor(shape=(2,), stride=(1,), offset=0, numel=2, key="0", storage=b"ctorch\nFloatStorage\n", kind="storage"):
    """The program that rebuilds one tensor."""
    pid = b"(" + text(kind) + storage + text(key) + text("cpu") + number(numel) + b"tQ"
    sizes = b"(" + b"".join(map(number, shape)) + b"t"
    steps = b"(" + b"".join(map(number, stride)) + b"t"
    arguments = b"(" + pid + number(offset) + sizes + steps + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def state_dict(program, name="layer.w"):
    return P + b"}" + text(name) + program + b"s."


GRAPH = b"<a list or tuple that holds itself twice over, 200 levels deep>"
DATA = {"data/0": struct.pack("<2f", 1, 2)}


def test_the_programs_of_this_file_are_sound(write_torch_zip):
    entry = index_checkpoint(write_torch_zip(state_dict(tensor()), DATA)).weights["layer.w"]
    assert (entry.shape, entry.dtype, entry.num_bytes) == ((2,), torch.float32, 8)


@pytest.mark.parametrize(
    "program",
    [
        tensor(shape=(3,)),
        tensor(offset=1),
        tensor(stride=(2,)),
        tensor(shape=(-1,)),
        tensor(stride=(-1,)),
        tensor(offset=-1),
        tensor(shape=(2, 1)),
        tensor(shape=(1,) * 100, stride=(1,) * 100),
        tensor(shape=(2**62,), stride=(0,)),
        tensor(shape=(2**70,)),
        tensor(numel=3),
        tensor(numel=2**60, shape=(2**60,)),
        tensor(numel=0),
        tensor(key="1"),
        tensor(key="../data.pkl"),
        tensor(key="x" * 10_000),
    ],
)
def test_a_tensor_outside_its_storage_is_reported_by_name(write_torch_zip, program):
    with pytest.raises(
        CorruptCheckpointError, match=r"made\.pt', tensor 'layer\.w': expected .*, found .*\. .*\.$"
    ) as caught:
        index_checkpoint(write_torch_zip(state_dict(program), DATA))
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("is_item", [True, False])
def test_a_storage_that_grows_is_reported_by_name(write_torch_zip, is_item):
    grown = item("b", shape=b"K\x03\x85").replace(b"K\x02t", b"K\x03t")
    program = item("a") + grown if is_item else text("a") + tensor() + text("b") + tensor(shape=(3,), numel=3)
    with pytest.raises(CorruptCheckpointError, match=r"made\.pt', tensor 'b': expected storage '0' of 12 bytes"):
        index_checkpoint(write_torch_zip(P + MEMO + b"}(" + program + b"u.", DATA))


def test_a_storage_of_a_legacy_file_that_grows_is_reported(tmp_path):
    path, values = tmp_path / "l.pt", torch.arange(6.0)
    torch.save({"a": values, "b": values[1:]}, path, _use_new_zipfile_serialization=False)
    before, between, after = path.read_bytes().split(b"K\x06N")
    path.write_bytes(before + b"K\x06N" + between + b"K\x07N" + after)
    with pytest.raises(CorruptCheckpointError, match=r"a storage '.*' of 24 and of 28 bytes"):
        index_checkpoint(path)


@pytest.mark.parametrize(
    "program",
    [
        tensor(numel=-1),
        tensor(kind="module"),
        tensor(storage=b"N"),
        tensor(storage=text("FloatStorage")),
        P,
        b"",
        b".",
        b"0.",
        b"t.",
        b"h\x07.",
        b"}]s.",
        b"}}Ns.",
        b"NN\x81.",
        b"]NR.",
        b"N)R.",
        b"NNb.",
        b"Na.",
        b"\xff.",
        b"ctorch\nfloat32\n)R.",
        b"ctorch.nn.parameter\nParameter\n)R.",
        b"ctorch\nTensor\n" + number(2**50) + b"\x85R.",
        b"c__builtin__\nbytearray\n" + number(2**50) + b"\x85R.",
        b"c__builtin__\nbytes\n" + number(2**50) + b"\x85R.",
        b"c_codecs\nencode\n" + text("x") + text("zlib") + b"\x86R.",
        b"ctorch\nSize\n(" + text("x") + b"t\x85R.",
        b"ctorch\ndevice\n" + text("nonsense") + b"\x85R.",
        b"ccollections\nOrderedDict\n)R}" + text("items") + b"Nsb.",
        b"ccollections\nOrderedDict\n)R}" + text("__class__") + b"Nsb.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__") + b"Nsb.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch\ndevice\nN(tNtR.",
        b"X\xff\xff\xff\x7fabc.",
        b"\x8a\xff.",
        b"r\xff\xff\xff\xff.",
        b"}" + number(2**80) + b"Ns.",
        b"(" * 100_000,
    ],
)
def test_a_damaged_program_is_reported(write_torch_zip, program):
    with pytest.raises(CorruptCheckpointError, match=r"made\.pt"):
        index_tree(write_torch_zip(P + program, DATA))


def put(index):
    return b"r" + struct.pack("<I", index)


def get(index):
    return b"j" + struct.pack("<I", index)


REBUILD, STORAGE, TYPE, CPU, ORDERED, VERSION = range(1000, 1006)
MEMO = b"".join(
    name + put(index) + b"0"
    for name, index in [
        (b"ctorch._utils\n_rebuild_tensor_v2\n", REBUILD),
        (text("storage"), STORAGE),
        (b"ctorch\nFloatStorage\n", TYPE),
        (text("cpu"), CPU),
        (b"ccollections\nOrderedDict\n", ORDERED),
        (text("version"), VERSION),
    ]
)


def item(name="layer.w", function=REBUILD, hooks=ORDERED, kind=STORAGE, shape=b"K\x02\x85", length=1):
    """A name and its tensor with the instructions that torch writes for all but the first few of a state dict."""
    pid = (
        get(kind) + get(TYPE) + b"X" + struct.pack("<I", length) + b"0" + put(1) + get(CPU) + b"K\x02t" + put(2) + b"Q"
    )
    arguments = b"(" + pid + b"K\x00" + shape + put(3) + b"K\x01\x85" + put(4) + b"\x89" + get(hooks) + b")R" + put(5)
    return text(name) + put(0) + get(function) + b"(" + arguments + b"t" + put(6) + b"R" + put(7)


def test_an_item_is_what_its_instructions_make_one_by_one(write_torch_zip):
    program = P + MEMO + b"}(" + item() + text("tied") + get(7) + b"u."
    weights = index_checkpoint(write_torch_zip(program, DATA)).weights
    assert weights["layer.w"] is weights["tied"]
    assert (weights["tied"].shape, weights["tied"].num_bytes) == ((2,), 8)


@pytest.mark.parametrize(("index", "value"), [(0, "layer.w"), (1, "0"), (3, (2,)), (4, (1,)), (5, OrderedDict())])
def test_what_an_item_puts_into_the_memo_can_be_asked_for(write_torch_zip, index, value):
    program = P + MEMO + b"}(" + text("weights") + b"}" + item() + b"s" + text("again") + get(index) + b"u."
    tree = index_tree(write_torch_zip(program, DATA)).tree
    assert tree["again"] == value
    assert tree["weights"]["layer.w"].shape == (2,)


def test_an_item_that_replaces_what_another_one_put_is_what_its_instructions_make_one_by_one(write_torch_zip):
    again = text("x") + get(0) + text("y") + get(7)
    tree = index_tree(write_torch_zip(P + MEMO + b"}(" + item("a") + item("b") + again + b"u.", DATA)).tree
    assert tree["x"] == "b"
    assert tree["y"] is tree["b"]
    assert tree["b"] is not tree["a"]


def test_an_item_that_replaces_what_rebuilds_tensors_is_reported(write_torch_zip):
    replaced = item("a").replace(put(7), put(REBUILD))
    with pytest.raises(CorruptCheckpointError, match="a call of StoredTensor"):
        index_tree(write_torch_zip(P + MEMO + b"}(" + replaced + item("b") + b"u.", DATA))


def test_a_version_that_an_item_puts_into_the_memo_can_be_asked_for(write_torch_zip):
    program = (
        P + MEMO + b"}(" + text("a") + put(0) + b"}" + put(1) + get(VERSION) + b"K\x05s" + text("b") + get(1) + b"u."
    )
    tree = index_tree(write_torch_zip(program)).tree
    assert tree == {"a": {"version": 5}, "b": {"version": 5}}
    assert tree["a"] is tree["b"]


@pytest.mark.parametrize(
    "program",
    [
        item(function=STORAGE),
        item(function=7777),
        item(hooks=CPU),
        item(kind=CPU),
        item(kind=REBUILD),
        item(length=2),
        item(shape=b"K\x02K\x01\x85"),
        item(shape=b"(K\x02\x85"),
        item(shape=b"K\x03\x85"),
        item(shape=b"J\xff\xff\xff\xff\x85"),
        item()[:-9],
        text("a") + put(0) + b"}" + put(1) + get(ORDERED) + b"K\x05s",
        text("a") + put(0) + b"}" + put(1) + get(7777) + b"K\x05s",
    ],
)
def test_a_damaged_item_is_reported_or_harmless(write_torch_zip, assert_inside, program):
    check(write_torch_zip(P + MEMO + b"}(" + program + b"u.", DATA), assert_inside)


def test_a_shape_that_changes_after_a_tensor_has_taken_it_changes_nothing(write_torch_zip):
    shape = b"](K\x02e" + put(3)
    program = tensor().replace(b"(\x8a\x01\x02t(", shape + b"(", 1)
    assert program != tensor()
    path = write_torch_zip(P + b"}(" + text("layer.w") + program + text("x") + get(3) + b"K\x7fau.", DATA)
    tree = index_tree(path).tree
    assert tree["layer.w"].shape == (2,)
    assert tree["x"] == [2, 127]


def test_a_large_memo_index_takes_no_memory(write_torch_zip):
    program = state_dict(b"Nr\xff\xff\xff\xff0" + tensor())
    assert "layer.w" in index_checkpoint(write_torch_zip(program, DATA)).weights


@pytest.mark.parametrize(
    "program",
    [
        GRAPH + b".",
        GRAPH + b")R.",
        GRAPH + b"Nb.",
        GRAPH + b")\x81.",
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + GRAPH + b"NK\x02tQ.",
        b"(" + GRAPH + b"ctorch\nFloatStorage\n" + text("0") + b"NK\x02tQ.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(N" + GRAPH + b"NN\x89NtR.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NNNN\x89N" + GRAPH + b"tR.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(" + GRAPH + b"N)NtR.",
        b"ctorch.serialization\n_get_layout\n" + GRAPH + b"\x85R.",
        b"ccollections\nCounter\n" + GRAPH + b"\x85R.",
        b"ccollections\nOrderedDict\n" + GRAPH + b"\x85R.",
        b"ctorch\nSize\n" + GRAPH + b"\x85R.",
        b"ctorch\ndevice\n" + GRAPH + b"\x85R.",
        b"c__builtin__\ncomplex\n" + GRAPH + b"\x85R.",
        b"c_codecs\nencode\n" + GRAPH + b"\x85R.",
    ],
)
@pytest.mark.parametrize("wrap", [b"q\x00h\x00\x86", b"q\x000]q\x01(h\x00h\x00e"], ids=["tuples", "lists"])
def test_a_graph_of_shared_containers_is_never_spelled_out(write_torch_zip, program, wrap):
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        index_checkpoint(write_torch_zip(P + program.replace(GRAPH, b"N\x85" + wrap * 200)))
    assert len(str(caught.value)) < 3000
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("depth", [10_000, 1_000_000])
@pytest.mark.parametrize("wrap", [b"\x85", b"]"])
def test_deep_nesting_is_reported(write_torch_zip, depth, wrap):
    program = b"N" + b"\x85" * depth + b"." if wrap == b"\x85" else b"]" * depth + b"a" * (depth - 1) + b"."
    with pytest.raises(CorruptCheckpointError, match="nested too deep"):
        index_checkpoint(write_torch_zip(P + program))


def test_keys_that_take_forever_to_hash_are_reported(write_torch_zip):
    program = P + b"}" + b"N\x85" + b"q\x00h\x00\x86" * 200 + b"Ns."
    start = time.perf_counter()
    with pytest.raises(CorruptCheckpointError):
        index_checkpoint(write_torch_zip(program))
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("add", [b"\x90", b"a", b"e"])
def test_members_that_take_forever_to_hash_are_reported(write_torch_zip, add):
    nested = b"N\x85" + b"q\x00h\x00\x86" * 200
    program = P + b"\x8f(" + nested + b"\x90." if add == b"\x90" else P + b"c__builtin__\nset\n](" + nested + b"e\x85R."
    with pytest.raises(CorruptCheckpointError):
        index_checkpoint(write_torch_zip(program))


@pytest.mark.parametrize(
    "program",
    [
        b"c_codecs\nencode\nq\x000X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"q\x010](" + b"h\x00h\x01\x85R" * 64 + b"e",
        b"ccollections\nOrderedDict\nq\x000]("
        + b"K\x01K\x02\x86" * 100_000
        + b"eq\x010]("
        + b"h\x00h\x01\x85R" * 99
        + b"e",
        b"ctorch\nSize\n](" + b"K\x01" * 200_000 + b"e\x85Rq\x000}q\x010" + b"h\x01h\x00Ns0" * 9,
    ],
    ids=["bytes", "dicts", "keys"],
)
def test_copies_of_copies_are_refused(write_torch_zip, program):
    with pytest.raises(CorruptCheckpointError, match=r"copy after copy|too many parts"):
        index_checkpoint(write_torch_zip(b"\x80\x02" + program + b"."))


def test_a_tree_that_spells_out_to_an_enormous_one_takes_no_time(write_torch_zip):
    program = b"]" + b"q\x000](h\x00h\x00e" * 200
    index = index_checkpoint(
        write_torch_zip(P + b"}(" + text("x") + program + text("model") + state_dict(tensor())[2:-1] + b"u.", DATA)
    )
    assert index.weights_key == "model"


def test_a_tree_that_contains_itself_is_read(write_torch_zip):
    program = P + b"}q\x00(" + text("me") + b"h\x00" + text("model") + state_dict(tensor())[2:-1] + b"u."
    index = index_checkpoint(write_torch_zip(program, DATA))
    assert index.tree["me"] is index.tree


def test_too_many_instructions_are_refused(write_torch_zip, monkeypatch):
    monkeypatch.setattr("lightning_efficient_init.checkpoint.unpickle._MAX_INSTRUCTIONS", 1000)
    with pytest.raises(UnsupportedCheckpointError, match="1000 instructions"):
        index_checkpoint(write_torch_zip(P + b"]0" * 1000 + b"N."))


@pytest.mark.parametrize(
    "name", ["builtins\neval", "os\nsystem", "posix\nsystem", "builtins\ngetattr", "torch\nload", "torch.hub\nload",
             "functools\npartial", "numpy\nload", "torch._utils\n_import_dotted_name", "__main__\nx",
             "a" * 9999 + "\nb"]
)  # fmt: skip
def test_names_that_are_not_allowed_are_refused(write_torch_zip, name):
    for program in (f"c{name}\n.".encode(), text(name.split("\n")[0]) + text(name.split("\n")[1]) + b"\x93."):
        with pytest.raises(UnsafeCheckpointError) as caught:
            index_checkpoint(write_torch_zip(P + program))
        assert len(str(caught.value)) < 1500


# --- Zip archives


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"first": torch.ones(4), "second": torch.zeros(4)}, path)
    return path


def patch(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("field", "data"),
    [
        (0, b"XXXX"),
        (8, b"\x08\0"),
        (6, b"\x09\0"),
        (18, b"\x05\0\0\0"),
        (26, b"\x05\0"),
        (28, b"\xff\xff"),
        (30, b"zzzz"),
    ],
)
def test_a_local_header_that_disagrees_with_the_directory_is_reported(archive, field, data):
    with zipfile.ZipFile(archive) as content:
        member = next(item for item in content.infolist() if item.filename.endswith("data/1"))
    patch(archive, member.header_offset + field, data)
    with pytest.raises(CorruptCheckpointError, match=r"a\.pt"):
        index_checkpoint(archive)


@pytest.mark.parametrize("field", [10, 20, 24, 28, 30, 32, 42])
@pytest.mark.parametrize("value", [b"\xff\xff", b"\x01\x01", b"\0\x80"])
def test_a_directory_that_lies_is_reported_or_harmless(archive, assert_inside, field, value):
    at = archive.read_bytes().rindex(b"PK\x01\x02")
    patch(archive, at + field, value)
    check(archive, assert_inside)


def test_two_members_of_one_name_are_reported(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as content:
        content.writestr("a/data.pkl", P + b"}.")
        with pytest.warns(UserWarning, match="Duplicate"):
            content.writestr("a/data.pkl", P + b"}.")
    with pytest.raises(CorruptCheckpointError, match="two of the name"):
        index_checkpoint(path)


def test_bytes_before_or_after_the_archive_are_reported(archive):
    data = archive.read_bytes()
    for changed in (data + b"x", data[:4] + b"x" + data[4:]):
        archive.write_bytes(changed)
        with pytest.raises(CorruptCheckpointError):
            index_checkpoint(archive)


def test_a_zip_file_that_torch_did_not_write_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as content:
        content.writestr("readme.txt", "hello")
    with pytest.raises(UnsupportedCheckpointError, match=r"data\.pkl"):
        index_checkpoint(path)


def test_64_bit_fields_in_headers_are_read(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as content:
        content.writestr("a/data.pkl", state_dict(tensor()))
        with content.open(zipfile.ZipInfo("a/data/0"), "w", force_zip64=True) as member:
            member.write(DATA["data/0"])
    entry = index_checkpoint(path).weights["layer.w"]
    assert path.read_bytes()[entry.offset : entry.offset + 8] == DATA["data/0"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_storages_beyond_4_gib_are_found(tmp_path, zipped):
    """The file is sparse: its large storage is a hole that takes no disk."""
    path, num_bytes = tmp_path / "a.pt", (4 << 30) + 12
    program = P + b"}(" + text("big") + tensor((num_bytes // 4,), (1,), 0, num_bytes // 4, "0")
    program += text("end") + tensor((2,), (1,), 0, 2, "1") + b"u."
    end = struct.pack("<2f", 3, 4)
    if zipped:
        _write_sparse_zip(path, {"a/data.pkl": program, "a/data/0": num_bytes, "a/data/1": end})
    else:
        with open(path, "wb") as file:
            for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
                pickle.dump(value, file, 2)
            file.write(program.replace(b"tQ", b"NtQ"))
            pickle.dump(["0", "1"], file, 2)
            file.write(struct.pack("<q", num_bytes // 4))
            file.seek(num_bytes, 1)
            file.write(struct.pack("<q", 2) + end)
    entries = index_checkpoint(path).weights
    assert entries["big"].num_bytes == num_bytes
    with open(path, "rb") as file:
        file.seek(entries["end"].offset)
        assert file.read(8) == end
    assert entries["end"].offset > num_bytes


def _write_sparse_zip(path, members):
    directory = b""
    with open(path, "wb") as file:
        for name, data in members.items():
            at, raw = file.tell(), name.encode()
            size = data if isinstance(data, int) else len(data)
            wide = struct.pack("<HHQQ", 1, 16, size, size)
            file.write(
                struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(raw), 20)
                + raw
                + wide
            )
            file.seek(size, 1) if isinstance(data, int) else file.write(data)
            extra = struct.pack("<HHQQQ", 1, 24, size, size, at)
            fields = (45, 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(raw), 28, 0, 0, 0, 0, 2**32 - 1)
            directory += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *fields) + raw + extra
        start = file.tell()
        file.write(directory)
        end, n = file.tell(), len(members)
        file.write(struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, n, n, len(directory), start))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, n, n, len(directory), 2**32 - 1, 0))


# --- Mutations: whatever the damage, an error of this package or a sound index


def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 1] = rng.randbytes(1)
        elif kind == 2:
            del data[at : at + rng.choice([1, 1, 4, 50])]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 8]))
        else:
            data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
    return bytes(data)


def small_tree():
    weights = torch.nn.Linear(3, 2).state_dict()
    weights["view"] = torch.randn(4, 4)[1:3].t()
    weights["u"] = torch.arange(3).to(torch.uint16)
    weights["p"] = torch.nn.Parameter(torch.ones(2))
    return {
        "state_dict": weights,
        "epoch": 1,
        "x": {"a": [1.5, (2, b"x"), None, True, {1, 2}, 2**70], "o": OrderedDict(a=1)},
    }


def check(path, assert_inside):
    start = time.perf_counter()
    try:
        index = index_checkpoint(path)
    except CheckpointError as error:
        assert path.parent.name in str(error)  # noqa: PT017
    else:
        assert_inside(index.tree)
        assert all(isinstance(value, Entry) or key.endswith("_extra_state") for key, value in index.weights.items())
    assert time.perf_counter() - start < 5


ROUNDS = 400


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}], ids=str)
def test_mutated_torch_files_give_an_error_or_a_sound_index(tmp_path, assert_inside, options):
    path, rng = tmp_path / "a.pt", random.Random(0)
    torch.save(small_tree(), path, **options)
    data = path.read_bytes()
    for _ in range(ROUNDS):
        path.write_bytes(mutate(data, rng))
        check(path, assert_inside)


@pytest.mark.parametrize("protocol", [2, 4])
def test_mutated_pickles_in_sound_archives_give_an_error_or_a_sound_index(
    tmp_path, assert_inside, write_torch_zip, protocol
):
    torch.save(small_tree(), tmp_path / "a.pt", pickle_protocol=protocol)
    with zipfile.ZipFile(tmp_path / "a.pt") as content:
        members = {name.split("/", 1)[1]: content.read(name) for name in content.namelist()}
    pickled, rng = members.pop("data.pkl"), random.Random(0)
    for _ in range(ROUNDS):
        check(write_torch_zip(mutate(pickled, rng), members), assert_inside)


def test_mutated_pickles_of_many_tensors_give_an_error_or_a_sound_index(tmp_path, assert_inside, write_torch_zip):
    """As many as it takes until nearly all are taken in one step."""
    torch.save({f"w{i}": torch.ones(i % 4 + 1, 300) for i in range(60)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as content:
        members = {name.split("/", 1)[1]: content.read(name) for name in content.namelist()}
    pickled, rng = members.pop("data.pkl"), random.Random(0)
    for _ in range(ROUNDS):
        check(write_torch_zip(pickled[:3000] + mutate(pickled[3000:], rng), members), assert_inside)


def test_mutated_safetensors_give_an_error_or_a_sound_index(tmp_path, assert_inside):
    path, rng = tmp_path / "a", random.Random(0)
    tensors = {key: value.contiguous() for key, value in small_tree()["state_dict"].items() if key != "u"}
    data = safetensors.torch.save({key: value.detach() for key, value in tensors.items()})
    (size,) = struct.unpack("<Q", data[:8])
    for _ in range(ROUNDS):
        path.write_bytes(mutate(data, rng))
        check(path, assert_inside)
        header = mutate(data[8 : 8 + size], rng)
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
        check(path, assert_inside)


def test_mutated_indexes_of_shards_give_an_error_or_a_sound_index(tmp_path, assert_inside):
    rng = random.Random(0)
    tensors = {"a": torch.ones(2), "b": torch.ones(3)}
    safetensors.torch.save_file(tensors, tmp_path / "s.safetensors")
    index = json.dumps({"weight_map": dict.fromkeys(tensors, "s.safetensors")}).encode()
    for _ in range(ROUNDS):
        (tmp_path / "model.safetensors.index.json").write_bytes(mutate(index, rng))
        check(tmp_path, assert_inside)
