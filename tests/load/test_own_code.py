"""Modules that load by code of their own come out as ``load_state_dict`` leaves them."""

import copy

import lightning as L
import pytest
import torch
import torchmetrics
from torch import nn

from lightning_efficient_init import (
    EfficientInit,
    deferred_init,
    load_checkpoint,
    materialize,
    plan_load,
    uninitialized_parameters,
)
from lightning_efficient_init.deferred import empty_init
from lightning_efficient_init.errors import StateDictMismatchError

CONTEXTS = [torch.enable_grad, deferred_init, empty_init]


class BareSum(nn.Module):
    """Its checkpoints had two matrices where it has one."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        parts = [state_dict.pop(f"{prefix}{name}", None) for name in ("upper", "lower")]
        if parts[0] is not None:
            state_dict[f"{prefix}weight"] = torch.cat(parts)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DataCopy(nn.Module):
    """Writes through ``.data``, a part at a time, and looks at what it wrote."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.largest = -1.0

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.weight.data.copy_(state_dict[f"{prefix}weight"])
        self.weight.data[0] = 0
        self.bias.data = state_dict[f"{prefix}bias"] * 2
        self.largest = self.weight.max().item()


class Resizing(nn.Module):
    """Takes the checkpoint's size, and keeps a table as a plain attribute."""

    def __init__(self, num_rows=2):
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_rows, 3))
        self.counts = None
        self.num_loads = 0

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.num_loads += 1
        self.counts = [state_dict.pop(f"{prefix}counts")]
        self.table = nn.Parameter(torch.empty_like(state_dict[f"{prefix}table"]))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Renaming(nn.Module):
    """A pre-hook gives old keys new names."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(module, state_dict, prefix, *args):
        if f"{prefix}old" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}old")


class Forgiving(nn.Module):
    """A post-hook forgives a missing key, and derives a buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.extra = nn.Parameter(torch.randn(2))
        self.register_buffer("norm", torch.zeros(()), persistent=False)
        self.seen = []
        self.register_load_state_dict_post_hook(self._forgive)

    @staticmethod
    def _forgive(module, incompatible):
        module.seen.append(list(incompatible.missing_keys))
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith("extra")]
        with torch.no_grad():
            module.norm.copy_(module.weight.norm())


class Writing(nn.Module):
    """Writes as torch's functions do that take what they write to in a list, by keyword or as ``out``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.scale = nn.Parameter(torch.randn(4))
        self.register_buffer("norm", torch.zeros(()), persistent=False)
        self.steps = torch.zeros(2)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        with torch.no_grad():
            torch._foreach_copy_([self.weight], [state_dict[f"{prefix}weight"]])
            torch.mul(state_dict[f"{prefix}bias"].to(self.bias.device), 2, out=self.bias)
            torch.relu_(input=self.scale.copy_(other=state_dict[f"{prefix}scale"]))
            torch.norm(state_dict[f"{prefix}weight"].to(self.norm.device), out=self.norm)
            self.steps += 1


class Keyword(nn.Linear):
    """Copies what it is given by keyword."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(other=state_dict[f"{prefix}{name}"])


class Extra(nn.Module):
    def __init__(self, state=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


CASES = {
    "concatenates": (BareSum, {"upper": torch.rand(2, 3), "lower": torch.rand(2, 3)}),
    "concatenates nothing": (BareSum, {"weight": torch.rand(4, 3)}),
    "writes through data": (DataCopy, {"weight": torch.rand(4, 3), "bias": torch.rand(4)}),
    "writes in other ways": (Writing, {"weight": torch.rand(4, 3), "bias": torch.rand(4), "scale": torch.randn(4)}),
    "copies by keyword": (lambda: Keyword(3, 4), {"weight": torch.rand(4, 3), "bias": torch.rand(4)}),
    "resizes": (Resizing, {"table": torch.rand(5, 3), "counts": torch.arange(3)}),
    "renames": (Renaming, {"old": torch.rand(4, 3)}),
    "forgives": (Forgiving, {"weight": torch.rand(4, 3)}),
    "forgives nothing": (Forgiving, {"weight": torch.rand(4, 3), "extra": torch.rand(2)}),
    "batch norm": (
        lambda: nn.BatchNorm1d(3),
        {k: torch.rand(3) for k in ("weight", "bias", "running_mean", "running_var")},
    ),
    "attention": (lambda: nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2).state_dict()),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)).state_dict(),
    ),
    "old weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        {"weight_g": torch.rand(4, 1), "weight_v": torch.rand(4, 3), "bias": torch.rand(4)},
    ),
    "one element into a scalar": (
        lambda: torch.nn.utils.parametrize.register_parametrization(nn.BatchNorm1d(2), "weight", nn.Identity()),
        {
            "parametrizations.weight.original": torch.rand(2),
            "num_batches_tracked": torch.tensor([7]),
            **{name: torch.rand(2) for name in ("bias", "running_mean", "running_var")},
        },
    ),
}


def visible(module):
    """What a load may have changed beside parameters."""
    names = ("seen", "largest", "counts", "num_loads", "state", "steps", "norm")
    return [{k: v for k, v in (vars(m) | m._buffers).items() if k in names} for m in module.modules()]


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("prefix", ["", "0."])
@pytest.mark.parametrize("case", CASES)
def test_a_module_with_loading_code_comes_out_as_load_state_dict_leaves_it(
    case, prefix, context, device, tmp_path, bits
):
    build, state = CASES[case]
    wrap = (lambda module: nn.Sequential(module, nn.Linear(2, 2))) if prefix else (lambda module: module)
    expected = wrap(build())
    state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    state |= {f"1.{name}": tensor for name, tensor in nn.Linear(2, 2).state_dict().items()} if prefix else {}
    torch.save(state, tmp_path / "w.pt")
    expected.load_state_dict(torch.load(tmp_path / "w.pt"))
    torch.manual_seed(0)
    with device, context():
        model = wrap(build())
    if case.startswith("forgives") and not case.endswith("nothing") and context is torch.enable_grad:
        expected.get_submodule(prefix[:-1]).extra = copy.deepcopy(model.get_submodule(prefix[:-1]).extra)
    report = load_checkpoint(model, tmp_path / "w.pt")
    missing = {f"{prefix}extra"} if case == "forgives" else set()
    found, wanted = bits(model), bits(expected)
    assert {k: v for k, v in found.items() if k not in missing} == {k: v for k, v in wanted.items() if k not in missing}
    assert {name for name in wanted if name not in missing} <= set(report.loaded)
    assert report.num_bytes == sum(tensor.nbytes for tensor in state.values())
    for one, other in zip(visible(model), visible(expected), strict=True):
        for name in ("counts", "largest", "num_loads", "steps", "norm"):
            assert str(one.get(name)).replace(", device='cuda:0'", "") == str(other.get(name))
    assert uninitialized_parameters(model) == []


@pytest.mark.parametrize("case", CASES)
def test_planning_leaves_a_module_with_loading_code_alone(case, tmp_path, bits):
    build, state = CASES[case]
    model = build()
    torch.save(state, tmp_path / "w.pt")
    before = bits(model), str(visible(model)), {id(t) for t in model.state_dict(keep_vars=True).values()}
    plan_load(model, tmp_path / "w.pt")
    assert (bits(model), str(visible(model)), {id(t) for t in model.state_dict(keep_vars=True).values()}) == before


def test_a_derived_buffer_of_a_post_hook_sees_the_loaded_values(tmp_path):
    torch.save({"weight": torch.full((4, 3), 2.0), "extra": torch.ones(2)}, tmp_path / "w.pt")
    with deferred_init():
        model = Forgiving()
    load_checkpoint(model, tmp_path / "w.pt")
    assert model.norm == torch.full((4, 3), 2.0).norm()
    assert model.seen == [[]]


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_forgiven_parameter_is_initialized_by_its_recipe(context, tmp_path, bits):
    torch.save({"weight": torch.rand(4, 3)}, tmp_path / "w.pt")
    torch.manual_seed(1)
    expected = Forgiving()
    torch.manual_seed(1)
    with context():
        model = Forgiving()
    load_checkpoint(model, tmp_path / "w.pt")
    assert bits(model)["extra"] == bits(expected)["extra"]


@pytest.mark.parametrize("shape", [(5, 3), (4,), (4, 3, 1)])
@pytest.mark.parametrize("key", ["old", "weight"])
def test_shapes_that_differ_after_a_rename_are_in_the_one_error(key, shape, tmp_path, bits):
    model = nn.Sequential(Renaming(), nn.Linear(2, 2))
    torch.save({f"0.{key}": torch.ones(shape), "1.weight": torch.ones(3, 3)}, tmp_path / "w.pt")
    before = bits(model)
    with pytest.raises(StateDictMismatchError) as caught:
        load_checkpoint(model, tmp_path / "w.pt")
    assert caught.value.mismatched == {"0.weight": ((4, 3), shape), "1.weight": ((2, 2), (3, 3))}
    assert caught.value.missing == ("1.bias",)
    assert bits(model) == before


def test_a_mismatch_after_a_rename_can_be_ignored_and_is_initialized(tmp_path, bits):
    torch.save({"old": torch.ones(5, 5)}, tmp_path / "w.pt")
    torch.manual_seed(2)
    expected = Renaming()
    torch.manual_seed(2)
    with deferred_init():
        model = Renaming()
    report = load_checkpoint(model, tmp_path / "w.pt", ignore_mismatched=True)
    assert report.initialized == report.mismatched == ("weight",)
    assert bits(model) == bits(expected)


STATES = [
    None,
    3,
    "text",
    {"a": torch.ones(2), "n": [torch.zeros(3), 1]},
    torch.ones(2),
    [nn.Parameter(torch.ones(2)), torch.ones(3, requires_grad=True)],
]


@pytest.mark.parametrize("state", STATES)
def test_extra_state_arrives_with_its_tensors_read(state, tmp_path):
    torch.save(nn.Sequential(Extra(state)).state_dict(), tmp_path / "w.pt")
    model = nn.Sequential(Extra())
    load_checkpoint(model, tmp_path / "w.pt")
    assert str(model[0].state) == str(state)
    assert type(model[0].state) is type(state)
    hooked = nn.Sequential(Extra())
    hooked.register_load_state_dict_post_hook(lambda module, keys: None)
    load_checkpoint(hooked, tmp_path / "w.pt")
    assert str(hooked[0].state) == str(state)


def test_extra_state_is_missing_or_unexpected_like_a_tensor(tmp_path):
    torch.save({"0.weight": torch.ones(2)}, tmp_path / "without.pt")
    with pytest.raises(StateDictMismatchError) as caught:
        load_checkpoint(nn.Sequential(Extra()), tmp_path / "without.pt")
    assert caught.value.missing == ("0._extra_state",)
    torch.save({"weight": torch.ones(2), "bias": torch.ones(2), "_extra_state": 3}, tmp_path / "with.pt")
    with pytest.raises(StateDictMismatchError) as caught:
        load_checkpoint(nn.LayerNorm(2), tmp_path / "with.pt")
    assert caught.value.unexpected == ("_extra_state",)


def test_a_number_under_the_name_of_a_parameter_is_in_the_one_error(tmp_path, params, bits):
    model = params(t_extra_state=torch.ones(2), u=torch.ones(2), v=torch.ones(2))
    torch.save({"t_extra_state": 3, "u": torch.zeros(2)}, tmp_path / "w.pt")
    before = bits(model)
    with pytest.raises(StateDictMismatchError, match="t_extra_state: expected a tensor, found int") as caught:
        load_checkpoint(model, tmp_path / "w.pt", strict=True)
    assert caught.value.missing == ("v",)
    assert bits(model) == before


def test_states_of_metrics_end_on_the_metrics_device_and_planning_leaves_them_alone(device, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.metric = torchmetrics.MeanMetric()
            self.metric.persistent(True)

    source = Net()
    source.metric.update(torch.tensor([1.0, 2.0, 6.0]))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model = Net().to(device)
    plan_load(model, tmp_path / "w.pt", strict=False)
    assert model.metric.mean_value == 0
    expected = Net()
    expected.load_state_dict(torch.load(tmp_path / "w.pt"), strict=False)
    load_checkpoint(model, tmp_path / "w.pt", strict=False)
    assert type(model.metric.mean_value) is torch.Tensor
    assert model.metric.mean_value.device == model.metric.weight.device == device
    assert [model.metric.mean_value.item(), model.metric.weight.item()] == [
        expected.metric.mean_value.item(),
        expected.metric.weight.item(),
    ]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_take_the_checkpoints_shapes_and_planning_leaves_them_without(tmp_path, bits):
    def build():
        return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())

    source = build()
    source(torch.randn(5, 3))
    torch.save(source.state_dict(), tmp_path / "w.pt")
    model = build()
    plan_load(model, tmp_path / "w.pt")
    assert torch.nn.parameter.is_lazy(model[0].weight)
    report = load_checkpoint(model, tmp_path / "w.pt")
    assert bits(model) == bits(source)
    assert "0.weight" in report.loaded
    assert torch.equal(model.eval()(torch.ones(2, 3)), source.eval()(torch.ones(2, 3)))


@pytest.mark.parametrize("context", CONTEXTS)
def test_litgpts_attention_loads_its_old_layout(context, tmp_path, bits):
    litgpt = pytest.importorskip("litgpt", reason="needs litgpt (pip install litgpt)")
    model_of = pytest.importorskip("litgpt.model").GPT
    config = litgpt.Config(n_layer=2, n_embd=16, n_head=4, n_query_groups=2, vocab_size=32, block_size=8, bias=True)
    expected = model_of(config)
    state = {}
    for name, tensor in expected.state_dict().items():
        state[name.replace("attn.qkv", "attn.attn")] = torch.randn_like(tensor)
    assert any("attn.attn" in name for name in state)
    torch.save(state, tmp_path / "w.pt")
    expected.load_state_dict(dict(state))
    with context():
        model = model_of(config)
    report = load_checkpoint(model, tmp_path / "w.pt")
    assert bits(model) == bits(expected)
    assert set(report.loaded) == set(expected.state_dict())


def test_code_that_computes_does_not_bring_the_checkpoint_into_memory(tmp_path):
    class Doubling(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"] * 2
            super()._load_from_state_dict(state_dict, prefix, *args)

    model = nn.Sequential(*[Doubling(1024, 1024, bias=False) for _ in range(32)])
    torch.save(model.state_dict(), tmp_path / "w.pt")
    weight = model[31].weight.clone()
    report = load_checkpoint(model, tmp_path / "w.pt")
    assert torch.equal(model[31].weight, weight * 2)
    assert report.peak_host_bytes < 64 << 20  # of 128 MiB


class Neighbour(nn.Module):
    """Exchanges the memory of another module as it is loaded, which was bound before."""

    def __init__(self, change):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.change = change
        self.first._register_load_state_dict_pre_hook(self._exchange)

    def _exchange(self, *_):
        self.second.weight.requires_grad_(False).data = self.change(self.second.weight.data)


@pytest.mark.parametrize("change", [torch.zeros_like, lambda weight: weight.view(torch.int32)])
def test_code_that_exchanges_the_memory_of_another_module_is_followed(change, tmp_path):
    source, model, expected = Neighbour(change), Neighbour(change), Neighbour(change)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    expected.load_state_dict(source.state_dict())
    assert model.second.weight.dtype == expected.second.weight.dtype
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), model.parameters(), strict=True))


class Migrating(nn.Module):
    """Knows old keys the first time that it is loaded, and counts how often that is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))
        self.loads = []
        self.handle = self._register_load_state_dict_pre_hook(self._migrate)

    def _migrate(self, state_dict, prefix, *args):
        if f"{prefix}old" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}old")
        else:
            parts = [state_dict.pop(f"{prefix}{name}") for name in ("upper", "lower")]
            state_dict[f"{prefix}weight"] = torch.cat(parts)
        self.loads.append(len(state_dict))
        self.handle.remove()


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("state", [{"old": torch.rand(4, 3)}, {"upper": torch.rand(2, 3), "lower": torch.rand(2, 3)}])
def test_a_hook_that_removes_itself_is_there_until_the_load(state, context, tmp_path, bits):
    torch.save(state, tmp_path / "w.pt")
    expected = Migrating()
    expected.load_state_dict(torch.load(tmp_path / "w.pt"))
    with context():
        model = Migrating()
    plan_load(model, tmp_path / "w.pt")
    assert len(model._load_state_dict_pre_hooks) == 1
    assert model.loads == []
    load_checkpoint(model, tmp_path / "w.pt")
    assert bits(model) == bits(expected)
    assert len(model._load_state_dict_pre_hooks) == 0
    assert model.loads == expected.loads


def test_code_that_forgets_keys_once_it_was_asked_is_an_error(tmp_path):
    waiting = [1]

    class Once(BareSum):
        def _load_from_state_dict(self, state_dict, *args):
            if waiting:
                waiting.pop()
                super()._load_from_state_dict(state_dict, *args)
            else:
                nn.Module._load_from_state_dict(self, state_dict, *args)

    torch.save({"upper": torch.rand(2, 3), "lower": torch.rand(2, 3)}, tmp_path / "w.pt")
    with pytest.raises(StateDictMismatchError, match="'weight': not missing when its loading code was first run"):
        load_checkpoint(Once(), tmp_path / "w.pt")


def test_an_error_in_loading_code_comes_through_and_nothing_changes(tmp_path, bits):
    class Broken(nn.Linear):
        def _load_from_state_dict(self, *args):
            raise KeyError("its own error")

    model = nn.Sequential(nn.Linear(2, 2), Broken(2, 2))
    torch.save({name: torch.zeros_like(t) for name, t in model.state_dict().items()}, tmp_path / "w.pt")
    before = bits(model)
    with pytest.raises(KeyError, match="its own error"):
        load_checkpoint(model, tmp_path / "w.pt")
    assert bits(model) == before


@pytest.mark.parametrize("is_inside", [True, False])
def test_deferred_parameters_are_copied_to_by_keyword_too(is_inside):
    value = torch.rand(4, 3)
    with deferred_init(), torch.no_grad():
        model = nn.Linear(3, 4)
        if is_inside:
            model.weight.copy_(other=value)
    with torch.no_grad():
        if not is_inside:
            model.weight.copy_(other=value)
    materialize(model)
    assert torch.equal(model.weight, value)


def test_quantized_weights_are_copied_to_by_keyword_too():
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    layers = []
    with L.Fabric(accelerator="cpu", plugins=[EfficientInit("32-true", quantize="nf4")]).init_module():
        layers += [nn.Linear(64, 4), nn.Linear(64, 4)]
    value = torch.rand(4, 64)
    with torch.no_grad():
        layers[0].weight.copy_(value)
        layers[1].weight.copy_(other=value)
    assert torch.equal(layers[0].weight, layers[1].weight)
