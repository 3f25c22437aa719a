"""Which modules are quantized, and which are left alone."""

import logging

import lightning as L
import pytest
import torch
from lightning_models import ADVICE, quiet_trainer
from quantized_models import Mixed, NamedLinear, assert_quantized_as_by_bitsandbytes, build_eagerly, built
from quantized_models import quantizing_fabric as quantizing
from torch import nn

from lightning_efficient_init import EfficientInit
from lightning_efficient_init import fabric as fabric_library
from lightning_efficient_init import trainer as trainer_library
from lightning_efficient_init.errors import QuantizationError
from lightning_efficient_init.quantize import MODES, QuantizedLayer
from lightning_efficient_init.quantize.choose import matches


def quantized(model):
    return {path for path, module in model.named_modules() if isinstance(module, QuantizedLayer)}


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))

    def forward(self, x):
        return self.mlp(self.attn(x))


class Stack(nn.Module):
    def __init__(self, num_blocks=11):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.lm_head = nn.Linear(16, 8)


@pytest.mark.parametrize("mode", MODES)
def test_layers_are_replaced_however_they_are_imported_made_and_derived(mode):
    model = built(quantizing(mode), Mixed)
    assert quantized(model) == {"body.0", "body.2", "named"}
    assert isinstance(model.named, NamedLinear)
    assert model.named.describe() == "65 to 65"


def test_skip_modules_work_under_init_module_by_whole_segments():
    skip = ["lm_head", "blocks.1", "blocks.*.attn"]
    model = built(quantizing("nf4", skip_modules=skip), Stack)
    expected = {f"blocks.{i}.mlp.{j}" for i in range(11) if i != 1 for j in range(2)}
    assert quantized(model) == expected  # blocks.10 is not blocks.1


@pytest.mark.parametrize(
    ("path", "pattern", "is_match"),
    [
        ("net.1", "net.1", True),
        ("net.10", "net.1", False),
        ("net.1.fc", "net.1", True),
        ("model.lm_head", "lm_head", False),
        ("model.lm_head", "*.lm_head", True),
        ("h.3.attn.q", "h.*.attn", True),
        ("h.3.x.attn", "h.*.attn", False),
        ("h.3", "h.[12]", False),
    ],
)
def test_a_pattern_names_whole_segments_from_the_start(path, pattern, is_match):
    assert matches(path, pattern) is is_match


def test_a_pattern_that_names_nothing_is_an_error_with_what_is_near():
    fabric = quantizing("nf4", skip_modules=["attn"])
    model = built(fabric, Stack)
    with pytest.raises(QuantizationError, match=r"'attn' names no module of Stack.*'blocks.0.attn'"):
        fabric.setup(model)


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("lm_hed", "'lm_head'"),
        ("LM_HEAD", "'lm_head'"),
        ("layers.*.atn", "'h.0.attn', 'h.1.attn'"),
        ("lm_head.weight", None),
    ],
)
def test_what_is_near_is_found_by_its_spelling(pattern, near):
    model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(2, 2)}) for _ in range(2))})
    model["lm_head"] = nn.Linear(2, 2)
    with pytest.raises(QuantizationError) as caught:
        EfficientInit("32-true", quantize="nf4", skip_modules=[pattern]).convert_module(model)
    hint = f"stands for one segment. Did you mean {near}?" if near else "stands for one segment."
    assert str(caught.value).endswith(hint)


def test_a_part_that_was_built_by_itself_cannot_be_skipped_by_its_later_path():
    fabric = quantizing("nf4", skip_modules=["0"])
    head = built(fabric, lambda: nn.Linear(8, 8))
    with pytest.raises(QuantizationError, match="built and quantized as a part"):
        fabric.setup(nn.Sequential(head, nn.Linear(8, 8)))


def test_a_model_with_nothing_to_quantize_is_refused():
    fabric = quantizing("int8")
    with pytest.raises(QuantizationError, match="Conv2d has no layer to quantize"):
        fabric.setup(built(fabric, lambda: nn.Conv2d(3, 3, 3)))


def test_tied_heads_stay_tied_and_are_logged(caplog):
    with caplog.at_level(logging.DEBUG, "lightning_efficient_init.quantize"):
        model = built(quantizing("nf4"), Mixed)
    assert model.head.weight is model.embed.weight
    assert type(model.head) is nn.Linear
    assert "head is not quantized: something else shares its weight" in caplog.text


def test_heads_tied_by_data_are_left_alone():
    def make():
        model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
        model["head"].weight.data = model["embed"].weight.data
        return model

    model = built(quantizing("nf4"), make)
    assert quantized(model) == set()
    assert model["head"].weight.data_ptr() == model["embed"].weight.data_ptr()


@pytest.mark.parametrize("mode", MODES)
def test_attention_computes_with_its_projection_left_in_full(mode, caplog, device):
    fabric = quantizing(mode, "32-true", device.type)
    with caplog.at_level(logging.DEBUG, "lightning_efficient_init.quantize"):
        attention = built(fabric, lambda: nn.MultiheadAttention(16, 4, batch_first=True))
    assert quantized(attention) == set()
    assert "MultiheadAttention) reads its weight directly" in caplog.text
    x = torch.randn(2, 3, 16, device=device)
    expected = build_eagerly(lambda: nn.MultiheadAttention(16, 4, batch_first=True), torch.float32, device)
    assert torch.equal(attention(x, x, x)[0], expected(x, x, x)[0])


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers_do_not_take_the_fast_path_that_reads_weights(mode, training, device):
    def make():
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    model = built(quantizing(mode, "32-true", device.type), make).train(training)
    assert quantized(model) == {f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)}
    expected = build_eagerly(make, torch.float32, device).train(training)
    x = torch.randn(2, 3, 16, device=device)
    with torch.no_grad():
        assert (model(x) - expected(x)).abs().max() < 0.5


class ReadsDtype(nn.Module):
    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.project(self.wi(x.to(self.wi.weight.device)))

    def project(self, x):
        return self.wo(x.to(self.wo.weight.dtype))

    def show(self):
        return self.wi.weight


def test_a_weight_that_forward_asks_for_its_dtype_is_left_alone_and_one_asked_for_its_device_is_not():
    assert quantized(built(quantizing("nf4"), ReadsDtype)) == {"wi"}


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_a_forward_that_was_replaced_is_looked_at_anew(monkeypatch):
    def fused(self, x):
        return self.mlp(nn.functional.linear(x, self.attn.weight, self.attn.bias))

    assert quantized(built(quantizing("nf4"), Block)) == {"attn", "mlp.0", "mlp.1"}
    monkeypatch.setattr(Block, "forward", fused)
    model = built(quantizing("nf4"), Block)
    assert quantized(model) == {"mlp.0", "mlp.1"}
    model(torch.ones(1, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "make",
    [
        lambda: OwnForward(8, 8),
        lambda: nn.Bilinear(4, 4, 4),
        lambda: nn.Linear(0, 8),
        lambda: nn.Linear(8, 8, dtype=torch.float64),
        lambda: nn.LazyLinear(8),
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Lazy modules")
def test_what_does_not_compute_as_linear_does_is_left_alone(make):
    assert quantized(built(quantizing("nf4"), lambda: nn.Sequential(make()))) == set()


@pytest.mark.parametrize("mode", MODES)
def test_conv1d_of_transformers_is_quantized_in_the_orientation_of_linear(mode, device, tmp_path):
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    layer = built(quantizing(mode, "32-true", device.type), lambda: conv1d(24, 10)).eval()
    expected = build_eagerly(lambda: conv1d(24, 10), torch.float32, device)
    x = torch.randn(3, 10, device=device)
    with torch.no_grad():
        assert (layer(x) - expected(x)).abs().max() < 0.3 * expected(x).abs().max()
    assert (layer.in_features, layer.out_features) == (10, 24)
    if mode != "int8-training":
        assert_quantized_as_by_bitsandbytes(layer, expected.weight.t().contiguous(), mode)
    torch.save({"weight": expected.weight * 2, "bias": expected.bias}, tmp_path / "a.pth")
    quantizing(mode, "32-true", device.type).load_raw(tmp_path / "a.pth", layer)
    if mode != "int8-training":
        assert_quantized_as_by_bitsandbytes(layer, expected.weight.t().contiguous() * 2, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_was_built_elsewhere_is_quantized_at_setup(mode, device):
    fabric = quantizing(mode, "32-true", device.type)
    model = build_eagerly(Mixed, torch.float32, torch.device("cpu"))
    weight = model.named.weight.detach().clone()
    fabric.setup(model)
    assert quantized(model) == {"body.0", "body.2", "named"}
    if mode != "int8-training":
        assert_quantized_as_by_bitsandbytes(model.named, weight.to(device), mode)


def test_what_was_skipped_when_it_was_built_may_be_wrapped_before_setup():
    peft = pytest.importorskip("peft")
    fabric = quantizing("nf4", skip_modules=["mlp.1"])
    model = peft.get_peft_model(built(fabric, Block), peft.LoraConfig(r=2, target_modules=["attn"]))
    fabric.setup(model)
    assert quantized(model) == {"base_model.model.attn.base_layer", "base_model.model.mlp.0"}


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("where", ["inside init_module", "elsewhere"])
def test_what_peft_has_added_stays_in_full_and_is_trained(mode, where, device):
    peft = pytest.importorskip("peft")

    def make():
        config = peft.LoraConfig(r=4, target_modules=["named", "body.0"], modules_to_save=["body.2"])
        return peft.get_peft_model(Mixed(), config)

    fabric = quantizing(mode, "32-true", device.type)
    model = built(fabric, make) if where == "inside init_module" else make()
    trained = [param for param in model.parameters() if param.requires_grad]
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(trained, 0.01))
    base = {"named.base_layer", "body.0.base_layer", "body.2.original_module"}
    assert quantized(model) == {f"base_model.model.{path}" for path in base}
    assert len(trained) == 5
    before, losses = [param.clone() for param in trained], []
    for _ in range(3):
        loss = wrapped(torch.arange(12, device=fabric.device).view(3, 4)).square().mean()
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(one, other) for one, other in zip(before, trained, strict=True))


def test_a_model_that_is_not_moved_at_setup_is_quantized_at_first_use():
    fabric = quantizing("nf4", "32-true")
    model = build_eagerly(Mixed, torch.float32, torch.device("cpu"))
    wrapped = fabric.setup(model, move_to_device=False)
    wrapped(torch.arange(4))
    assert model.named.weight.dtype == torch.uint8


def test_quantize_goes_with_16_and_32_bits_only():
    with pytest.raises(ValueError, match="64-true"):
        EfficientInit("64-true", quantize="nf4")
    with pytest.raises(ValueError, match="must be one of int8, int8-training, nf4"):
        EfficientInit("bf16-true", quantize="nf8")
    with pytest.raises(ValueError, match="skip_modules"):
        EfficientInit("bf16-true", skip_modules=["lm_head"])
    with pytest.raises(TypeError, match="sequence"):
        EfficientInit("bf16-true", quantize="nf4", skip_modules="lm_head")
    for skip_modules in ([1], 1, (path for path in ["lm_head"])):
        with pytest.raises(TypeError, match=r"must be a sequence of module paths, found .* Paths are strings"):
            EfficientInit("bf16-true", quantize="nf4", skip_modules=skip_modules)
    with pytest.raises(QuantizationError, match="expected paths of modules, found '', which is the whole model"):
        EfficientInit("bf16-true", quantize="nf4", skip_modules=["lm_head", ""])
    for mode in ("nf4", "int8"):
        with pytest.raises(QuantizationError, match=r'Use "32-true" or "bf16-true"\.'):
            EfficientInit("64-true", quantize=mode)


@pytest.mark.parametrize("name", ["efficient_init_fsdp", "efficient_init_fsdp2"])
@pytest.mark.parametrize("mode", ["nf4", "int8-training"])
@pytest.mark.parametrize("library", ["fabric", "trainer"])
def test_strategies_that_shard_parameters_refuse_before_anything_is_built(name, mode, library):
    plugin = EfficientInit("bf16-true", quantize=mode)
    with pytest.raises(
        QuantizationError, match=rf'"{mode}" does not go with a strategy that shards.*efficient_init_ddp'
    ):
        if library == "fabric":
            L.Fabric(accelerator="cpu", devices=1, strategy=name, plugins=[plugin])
        else:
            quiet_trainer(plugins=[plugin], strategy=name)


@ADVICE
@pytest.mark.parametrize("name", ["efficient_init_fsdp", "efficient_init_fsdp2"])
def test_strategies_that_shard_parameters_refuse_a_model_that_was_quantized_elsewhere(name):
    model = built(quantizing("nf4"), Stack)
    fabric = L.Fabric(accelerator="cpu", devices=1, strategy=name, precision="bf16-true")
    fabric.launch()
    with pytest.raises(QuantizationError, match="does not go with a strategy that shards"):
        fabric.setup(model)


def test_deepspeed_refuses_too():
    plugin = EfficientInit("bf16-true", quantize="nf4")
    for library in (fabric_library, trainer_library):
        strategy = library.EfficientDeepSpeedStrategy.__new__(library.EfficientDeepSpeedStrategy)
        name = "precision" if library is fabric_library else "precision_plugin"
        with pytest.raises(QuantizationError, match="does not go with a strategy that shards"):
            setattr(strategy, name, plugin)


def test_tensors_made_in_init_tensor_are_real():
    fabric = quantizing("nf4")
    with fabric.init_tensor():
        tensor = torch.randn(3)
        assert not tensor.is_meta
        assert tensor.data_ptr()
    assert isinstance(fabric, L.Fabric)
