"""Loaded values are those of ``load_state_dict(torch.load(...))``, bit for bit."""

import json
import zipfile

import lightning as L
import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_efficient_init import driver, load_checkpoint
from lightning_efficient_init.errors import StateDictMismatchError, UnsupportedCheckpointError
from lightning_efficient_init.load import pipeline

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def save_zip(state, folder):
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


def save_legacy(state, folder):
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return folder / "legacy.pt"


def save_safetensors(state, folder):
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def save_folder(state, folder, save, index, suffix):
    names = list(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for number, half in enumerate(halves):
        name = f"shard-{number}.{suffix}"
        save({key: state[key].contiguous() for key in half}, folder / name)
        weight_map |= dict.fromkeys(half, name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def save_safetensors_folder(state, folder):
    return save_folder(state, folder, safetensors.torch.save_file, "model.safetensors.index.json", "safetensors")


def save_torch_folder(state, folder):
    return save_folder(state, folder, torch.save, "pytorch_model.bin.index.json", "bin")


def save_lightning(state, folder):
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(50, 16)}}, "param_groups": []}
    torch.save({"epoch": 1, "state_dict": state, "optimizer_states": [optimizer]}, folder / "epoch=1.ckpt")
    return folder / "epoch=1.ckpt"


def save_fabric(state, folder):
    L.Fabric(accelerator="cpu").save(folder / "fabric.ckpt", {"model": state, "step": 3})
    return folder / "fabric.ckpt"


SAVERS = [
    save_zip,
    save_legacy,
    save_safetensors,
    save_safetensors_folder,
    save_torch_folder,
    save_lightning,
    save_fabric,
]


@pytest.mark.parametrize("found", FLOATS, ids=str)
@pytest.mark.parametrize("wanted", FLOATS, ids=str)
@pytest.mark.parametrize("save", SAVERS, ids=lambda save: save.__name__)
def test_values_equal_those_of_load_state_dict_in_every_format_and_dtype(
    save, wanted, found, device, tmp_path, make_net, bits
):
    source = make_net(1).to(found)
    path = save(source.state_dict(), tmp_path)
    expected = make_net(2).to(wanted)
    expected.load_state_dict(source.state_dict())
    model = make_net(2).to(device, wanted)
    report = load_checkpoint(model, path)
    assert bits(model) == bits(expected)
    assert all(tensor.device == device for tensor in model.state_dict().values())
    assert report.loaded == tuple(model.state_dict())


ODD = {
    "int8": torch.arange(-8, 9, dtype=torch.int8),
    "int64": torch.tensor([-(2**62), 0, 2**62]),
    "bool": torch.tensor([True, False, True]),
    "uint16": torch.tensor([0, 1, 65535]).to(torch.uint16),
    "complex": torch.randn(3, 2, dtype=torch.complex64),
    "fp8": torch.randn(5).to(torch.float8_e4m3fn),
    "fp8 e5m2": torch.randn(5).to(torch.float8_e5m2),
    "nothing": torch.empty(0, 3),
    "nothing at all": torch.empty(0),
    "scalar": torch.tensor(1.5),
    "one element": torch.tensor([1.5]),
    "transposed": torch.randn(4, 6).t(),
    "strided": torch.randn(8, 6)[::2, 1::3],
    "expanded": torch.randn(1, 6).expand(4, 6),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
}


def targets(name, value):
    """Tensors of the model that ``value`` can go to, as makers."""
    yield "same", lambda: torch.zeros(value.shape, dtype=value.dtype)
    if value.is_floating_point():
        yield "float64", lambda: torch.zeros(value.shape, dtype=torch.float64)
        yield "bfloat16", lambda: torch.zeros(value.shape, dtype=torch.bfloat16)
    if name == "one element":
        yield "scalar", lambda: torch.zeros(())
    if value.dim() == 2 and value.numel():
        yield "transposed", lambda: torch.zeros(value.shape[::-1], dtype=value.dtype).t()
        yield "gaps", lambda: torch.zeros(value.shape[0], 2 * value.shape[1], dtype=value.dtype)[:, ::2]


CASES = [
    pytest.param(value, make, id=f"{name} into {kind}")
    for name, value in ODD.items()
    for kind, make in targets(name, value)
]


@pytest.mark.parametrize(("value", "make"), CASES)
@pytest.mark.parametrize("save", [save_zip, save_legacy], ids=lambda save: save.__name__)
def test_odd_tensors_load_as_load_state_dict_loads_them(value, make, save, device, tmp_path, params, bits):
    path = save({"t": value}, tmp_path)
    expected = params(t=make())
    # cast where the model is: which NaN comes of a cast is the device's own affair
    expected.load_state_dict({"t": value.to(device).to(expected.t.dtype).cpu()})
    target = make()
    moved = torch.empty_strided(target.shape, target.stride(), dtype=target.dtype, device=device)
    model = params(t=moved)
    stride = model.t.stride()
    load_checkpoint(model, path)
    assert bits(model) == bits(expected)
    assert model.t.stride() == stride


@pytest.mark.parametrize("view", [lambda t: t.conj(), lambda t: t.imag._neg_view()], ids=["conj", "neg"])
def test_parameters_that_are_lazily_conjugated_or_negated_get_the_right_values(view, tmp_path, params):
    value = view(torch.randn(4, dtype=torch.complex64)).resolve_conj().resolve_neg()
    torch.save({"t": value}, tmp_path / "w.pt")
    model = params(t=view(torch.zeros(4, dtype=torch.complex64)))
    load_checkpoint(model, tmp_path / "w.pt")
    assert torch.equal(model.t.resolve_conj().resolve_neg(), value)


@pytest.mark.parametrize("value", [torch.ones(3).to(torch.cfloat).conj(), torch.ones(3).to(torch.cfloat).conj().imag])
def test_lazily_conjugated_or_negated_tensors_of_a_checkpoint_are_refused_with_the_remedy(value, tmp_path, params):
    torch.save({"t": value}, tmp_path / "w.pt")
    model = params(t=torch.zeros_like(value))
    with pytest.raises(UnsupportedCheckpointError, match=r"tensor 't'.*resolve_conj\(\) or resolve_neg\(\)"):
        load_checkpoint(model, tmp_path / "w.pt")


def test_an_expanded_parameter_is_refused_before_anything_changes(tmp_path, params, bits):
    torch.save({"a": torch.ones(3), "t": torch.ones(3, 4)}, tmp_path / "w.pt")
    model = params(a=torch.zeros(3), t=torch.zeros(1, 4).expand(3, 4))
    before = bits(model)
    with pytest.raises(StateDictMismatchError, match=r"t: expected memory .* expanded"):
        load_checkpoint(model, tmp_path / "w.pt")
    assert bits(model) == before


@pytest.mark.parametrize("wanted", FLOATS, ids=str)
def test_misaligned_safetensors_are_cast_right(wanted, device, tmp_path, params, bits):
    state = {"b": torch.randn(33), "c": torch.randn(7).double()}
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [33], "data_offsets": [3, 135]},
        "c": {"dtype": "F64", "shape": [7], "data_offsets": [135, 191]},
    }
    text = json.dumps(header).encode()
    data = b"\1\2\3" + b"".join(bytes(t.view(torch.uint8).numpy()) for t in state.values())
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    model = params(**{name: torch.zeros(t.shape, dtype=wanted, device=device) for name, t in state.items()})
    load_checkpoint(model, tmp_path / "m.safetensors", key_map={"a": None})
    assert bits(model) == bits({name: t.to(wanted) for name, t in state.items()})


def test_overlapping_views_are_read_once(device, tmp_path, params, bits, bytes_read):
    base = torch.randn(1000, 1000)
    state = {"whole": base, "top": base[:600], "middle": base[300:900], "columns": base[:, :500]}
    torch.save(state, tmp_path / "w.pt")
    model = params(**{name: torch.zeros(t.shape, device=device) for name, t in state.items() if name != "columns"})
    before = bytes_read()
    report = load_checkpoint(model, tmp_path / "w.pt", key_map={"columns": None}, progress=False)
    assert bytes_read() - before < 1.05 * base.nbytes
    assert report.num_bytes == base.nbytes
    assert bits(model) == bits({name: state[name] for name in ("whole", "top", "middle")})


def test_a_view_reads_its_part_of_a_storage_only(tmp_path, params, bytes_read):
    base = torch.randn(4 << 20)
    torch.save({"t": base[1 << 20 : (1 << 20) + 1000]}, tmp_path / "w.pt")
    model = params(t=torch.zeros(1000))
    before = bytes_read()
    assert load_checkpoint(model, tmp_path / "w.pt").num_bytes == 4000
    assert bytes_read() - before < 200_000
    assert torch.equal(model.t, base[1 << 20 : (1 << 20) + 1000])


def test_optimizer_state_is_not_read(tmp_path, make_net, bytes_read):
    net = make_net(1)
    torch.save({"state_dict": net.state_dict(), "optimizer_states": [torch.randn(8 << 20)]}, tmp_path / "m.ckpt")
    before = bytes_read()
    load_checkpoint(make_net(2), tmp_path / "m.ckpt")
    assert bytes_read() - before < 500_000


def test_memory_that_two_parameters_share_is_written_in_the_order_of_the_state_dict(tmp_path, bits):
    def build():
        model = nn.Module()
        memory = torch.zeros(10_000)
        model.first = nn.Parameter(memory[:6000])
        model.second = nn.Parameter(memory[4000:])
        model.third = nn.Parameter(memory[4000:])
        return model

    state = {"first": torch.full((6000,), 1.0), "second": torch.full((6000,), 2.0), "third": torch.full((6000,), 3.0)}
    torch.save(dict(reversed(state.items())), tmp_path / "w.pt")
    expected, model = build(), build()
    expected.load_state_dict(state)
    for _ in range(5):
        load_checkpoint(model, tmp_path / "w.pt", host_buffer_bytes=64 << 10)
        assert bits(model) == bits(expected)


def test_parameters_whose_memory_lies_in_one_buffer_are_loaded(tmp_path, bits):
    memory = torch.zeros(1000)
    state = {f"p{i}": torch.randn(10, 10) for i in range(10)}
    model = nn.ParameterDict(
        {name: nn.Parameter(part.view(10, 10)) for name, part in zip(state, memory.split(100), strict=True)}
    )
    torch.save(state, tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    assert bits(model) == bits(state)
    assert torch.equal(memory, torch.cat([t.flatten() for t in state.values()]))


def test_frozen_parameters_gradients_and_references_survive(device, tmp_path, make_net):
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    model = make_net(2).to(device)
    model.embed.weight.requires_grad_(False)
    weight = model.layers[0].weight
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = weight.data_ptr(), weight.grad, model.cache.clone(), model.cache._version
    load_checkpoint(model, tmp_path / "w.pt")
    assert not model.embed.weight.requires_grad
    assert model.layers[0].weight is weight is optimizer.param_groups[0]["params"][1]
    assert weight.data_ptr() == before[0]
    assert weight.grad is before[1]
    assert torch.equal(model.cache, before[2])
    assert model.cache._version == before[3]


def test_loading_over_a_tensor_that_backward_needs_is_noticed(tmp_path):
    model = nn.Linear(4, 4)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    loss = model(model.weight).sum()
    load_checkpoint(model, tmp_path / "w.pt")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("built_in", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("loaded_in", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grad_and_inference_modes_make_no_difference(built_in, loaded_in, dtype, device, tmp_path, make_net, bits):
    source = make_net(1)
    source.table = source.table.t().contiguous().t()
    torch.save(source.state_dict(), tmp_path / "w.pt")
    with built_in():
        model = make_net(2).to(device, dtype).eval()
        expected = make_net(2).to(dtype)
    with loaded_in():
        load_checkpoint(model, tmp_path / "w.pt")
    with torch.inference_mode():
        expected.load_state_dict(source.state_dict())
    assert bits(model) == bits(expected)
    assert not model.training
    assert model.embed.weight.requires_grad


def test_a_path_in_unicode_with_spaces_is_read(tmp_path, make_net, bits):
    folder = tmp_path / "模型 é (1)"
    folder.mkdir()
    torch.save(make_net(1).state_dict(), folder / "w w.pt")
    model = make_net(2)
    load_checkpoint(model, str(folder / "w w.pt"))
    assert bits(model) == bits(make_net(1))


def test_a_checkpoint_without_tensors_fills_a_model_without_tensors(tmp_path):
    torch.save({}, tmp_path / "w.pt")
    report = load_checkpoint(nn.Identity(), tmp_path / "w.pt")
    assert report.loaded == ()
    assert report.num_bytes == 0


def test_values_do_not_depend_on_how_the_archive_was_laid_out(tmp_path, make_net, bits):
    torch.save(make_net(1).state_dict(), tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as old, zipfile.ZipFile(tmp_path / "again.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))  # no padding: tensors start anywhere
    model = make_net(2)
    load_checkpoint(model, tmp_path / "again.pt")
    assert bits(model) == bits(make_net(1))
    half = make_net(2).half()
    load_checkpoint(half, tmp_path / "again.pt")
    assert bits(half) == bits(make_net(1).half())


def test_very_many_tensors_are_loaded(tmp_path, device):
    expected = {f"{i}": torch.full((1000 + i % 7,), float(i)) for i in range(20_000)}  # hundreds to a read
    torch.save(expected, tmp_path / "a.pth")
    model = nn.ParameterList(torch.empty(1000 + i % 7, device=device) for i in range(20_000))
    load_checkpoint(model, tmp_path / "a.pth", host_buffer_bytes=64 << 20)
    found = torch.stack([parameter.amin() for parameter in model] + [parameter.amax() for parameter in model])
    assert torch.equal(found.cpu(), torch.arange(20_000.0).repeat(2))


@pytest.mark.gpu
@pytest.mark.parametrize("is_direct", [True, False])
def test_large_values_are_the_same_by_the_drivers_copy_and_by_torchs(is_direct, tmp_path, monkeypatch):
    assert (driver.copy_to_device() is None) == (torch.version.hip is not None)
    if not is_direct:
        monkeypatch.setattr(pipeline, "copy_to_device", lambda: None)
    layers = [nn.Linear(3001, 1999), nn.Linear(3001, 1999, dtype=torch.bfloat16)]  # of several reads, cut anywhere
    expected = {f"{i}.{name}": value for i, layer in enumerate(layers) for name, value in layer.state_dict().items()}
    torch.save(expected, tmp_path / "a.pth")
    model = nn.ModuleList(nn.Linear(3001, 1999, dtype=layer.weight.dtype, device="cuda") for layer in layers)
    load_checkpoint(model, tmp_path / "a.pth", host_buffer_bytes=8 << 20)
    assert all(torch.equal(value.cpu(), expected[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
def test_memory_that_cannot_be_pinned_is_no_error_of_the_kernel_that_comes_next():
    slots = pipeline._Ring(pipeline.SLOTS_PER_THREAD, 1 << 20).slots(0)
    with pipeline._CudaLane(torch.cuda.current_stream(), slots) as lane:
        lane._pin(slots[0])
        lane._pin(slots[0])  # which CUDA refuses, as it is pinned already
        assert torch.ones(1, device="cuda") == 1
