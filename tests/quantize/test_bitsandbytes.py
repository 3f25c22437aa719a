"""Values: quantized from recipes or on loading, each bit is that of bitsandbytes."""

import copy
import io
import pickle

import pytest
import torch
from quantized_models import (
    QUANTIZED,
    Mixed,
    NamedLinear,
    assert_outputs_equal,
    assert_quantized_as_by_bitsandbytes,
    bnb,
    build_eagerly,
    built,
    by_bitsandbytes,
    quantizing_fabric,
)
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_efficient_init import load_checkpoint
from lightning_efficient_init.quantize import MODES, QuantizedLayer

PACKED = [mode for mode in MODES if mode != "int8-training"]
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("mode", PACKED)
def test_weights_from_recipes_are_what_bitsandbytes_makes_of_eager_ones(mode, precision, device):
    expected = build_eagerly(Mixed, DTYPES[precision], device)
    model = built(quantizing_fabric(mode, precision, device.type), Mixed)
    for path in QUANTIZED:
        assert_quantized_as_by_bitsandbytes(model.get_submodule(path), expected.get_submodule(path).weight, mode)
    for name in ("embed.weight", "norm.bias", "body.0.bias", "named.bias"):
        assert torch.equal(model.get_parameter(name), expected.get_parameter(name)), name


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 1), (1, 64), (127, 129), (300, 700)])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", PACKED)
def test_loaded_weights_are_cast_to_the_precision_and_then_quantized(mode, source, shape, device, tmp_path):
    weight = torch.randn(shape, dtype=torch.float64).to(source)
    torch.save({"weight": weight}, tmp_path / "a.pth")
    layer = built(quantizing_fabric(mode, "bf16-true", device.type), lambda: nn.Linear(*shape[::-1], bias=False))
    load_checkpoint(layer, tmp_path / "a.pth")
    assert_quantized_as_by_bitsandbytes(layer, weight.to(device, torch.bfloat16), mode)


@pytest.mark.parametrize("mode", PACKED)
def test_a_weight_that_arrives_in_many_parts_has_the_same_values(mode, device, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_efficient_init.sinks.bitsandbytes.PART_BYTES", 4096)
    monkeypatch.setattr("lightning_efficient_init.load.load.BATCH_BYTES", 8192)
    weight = torch.randn(257, 129, dtype=torch.bfloat16)
    torch.save({"weight": weight, "other": weight}, tmp_path / "a.pth")
    layer = built(quantizing_fabric(mode, "bf16-true", device.type), lambda: nn.Linear(129, 257, bias=False))
    load_checkpoint(layer, tmp_path / "a.pth", strict=False)
    assert_quantized_as_by_bitsandbytes(layer, weight.to(device), mode)


def _code_of_each(values, mode):
    """The nearest of the values that four bits stand for, worked out element by element."""
    scaled = values.view(-1, 64) / values.view(-1, 64).abs().amax(dim=1, keepdim=True)
    code = bnb.functional.get_4bit_type(mode, device="cpu")
    return code[(scaled.view(-1, 1) - code).abs().argmin(dim=1)]


def _quantized_after_a_model_in_bf16(rank, mode, values):
    built(quantizing_fabric(mode), Mixed)
    packed = built(quantizing_fabric(mode, "32-true"), lambda: nn.Linear(64, len(values) // 64, bias=False)).weight
    with torch.no_grad():
        packed.copy_(values.view(-1, 64))
    return torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1).long()


@pytest.mark.parametrize("mode", ["nf4", "fp4"])
def test_the_dtype_of_the_first_model_in_a_process_is_not_that_of_its_tables(mode):
    # bitsandbytes makes tables for the CPU when it first quantizes, in the default dtype of that moment
    values = torch.randn(1 << 16)
    (found,) = run_ranks(_quantized_after_a_model_in_bf16, 1, mode, values)
    code = bnb.functional.get_4bit_type(mode, device="cpu")
    assert torch.equal(code[found], _code_of_each(values, mode))


@pytest.mark.parametrize("mode", PACKED)
def test_a_transposed_view_in_the_checkpoint_is_put_in_order_first(mode, device, tmp_path):
    weight = torch.randn(70, 30).t()
    torch.save({"weight": weight}, tmp_path / "a.pth")
    layer = built(quantizing_fabric(mode, "32-true", device.type), lambda: nn.Linear(70, 30, bias=False))
    load_checkpoint(layer, tmp_path / "a.pth")
    assert_quantized_as_by_bitsandbytes(layer, weight.contiguous().to(device), mode)


@pytest.mark.parametrize("mode", PACKED)
def test_large_values_in_bf16_stay_finite(mode, device):
    weight = torch.randn(8, 64).to(torch.bfloat16)
    weight[3, 7] = 1e5  # more than float16 can hold
    if not mode.endswith("dq"):  # which loses all else beside such a scale
        weight[5] *= 1e30
    layer = built(quantizing_fabric(mode, "bf16-true", device.type), lambda: nn.Linear(64, 8, bias=False))
    layer.load_state_dict({"weight": weight})
    found = dequantized(layer).cpu()
    assert found.isfinite().all()
    assert torch.allclose(found[3, 7], weight[3, 7].float(), rtol=0.02)
    if not mode.endswith("dq"):
        assert torch.allclose(found[5], weight[5].float(), atol=0.2 * weight[5].float().abs().max().item())


def dequantized(layer):
    if layer.mode == "int8":
        return layer.weight.data.float() * layer.weight.SCB.unsqueeze(1) / 127
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def test_int8_rows_that_float16_can_hold_are_not_touched_by_those_that_it_cannot():
    weight = torch.randn(6, 64).to(torch.bfloat16)
    expected = by_bitsandbytes(weight, "int8")
    weight[2] *= 2.0**20
    layer = built(quantizing_fabric("int8"), lambda: nn.Linear(64, 6, bias=False))
    layer.load_state_dict({"weight": weight})
    assert torch.equal(layer.weight.data, expected["weight"])  # a power of two changes the scale alone
    factors = torch.ones(6)
    factors[2] = 2.0**20
    assert torch.equal(layer.weight.SCB, expected["SCB"] * factors)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_are_those_of_bitsandbytes_own_layers(mode, device):
    if mode == "int8-training":
        theirs = bnb.nn.Linear8bitLt(64, 32, threshold=6.0)
    elif mode == "int8":
        theirs = bnb.nn.Linear8bitLt(64, 32, threshold=6.0, has_fp16_weights=False)
    else:
        dtype = torch.float16
        theirs = bnb.nn.Linear4bit(64, 32, compute_dtype=dtype, compress_statistics="dq" in mode, quant_type=mode[:3])
    theirs = theirs.half()
    weights = {name: value.clone() for name, value in theirs.state_dict().items() if name in {"weight", "bias"}}
    theirs = theirs.to(device).eval().requires_grad_(False)  # on a CPU it fails in eval with a trained weight
    ours = built(quantizing_fabric(mode, "16-true", device.type), lambda: nn.Linear(64, 32)).eval()
    ours.load_state_dict(weights)
    x = torch.randn(3, 5, 64, device=device, dtype=torch.float16)
    x[..., 4] *= 20  # outliers, for int8
    with torch.no_grad():
        assert_outputs_equal(ours(x), theirs(x), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (2, 3, 4, 64), (0, 64)])
@pytest.mark.parametrize("training", [False, True])
def test_inputs_of_any_number_of_dims_give_outputs_and_gradients(mode, shape, training, device):
    layer = built(quantizing_fabric(mode, "32-true", device.type), lambda: nn.Linear(64, 32)).train(training)
    x = torch.randn(shape, device=device, requires_grad=True)
    out = layer(x)
    assert out.shape == (*shape[:-1], 32)
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.bias.grad.shape == (32,)


@pytest.mark.parametrize("mode", MODES)
def test_deep_copies_and_pickles_give_the_same_outputs(mode, device):
    model = built(quantizing_fabric(mode, "bf16-true", device.type), Mixed).eval()
    tokens = torch.arange(12, device=device).view(3, 4)
    expected = model(tokens)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for copied in copies:
        assert isinstance(copied.named, NamedLinear)
        assert copied.named.describe() == "65 to 65"
        assert copied.head.weight is copied.embed.weight
        assert torch.equal(copied(tokens), expected)
        assert copied.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        for part in copies[0].state_dict().values():
            part.zero_()
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("mode", MODES)
def test_casting_and_moving_keep_the_quantized_values(mode, device):
    model = built(quantizing_fabric(mode, "32-true", device.type), Mixed).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = model.body[0].weight
    tokens = torch.arange(12, device=device).view(3, 4)
    expected = model(tokens)
    assert model.to("cpu").to(device).to(torch.float64).float() is model
    assert torch.equal(model(tokens), expected)
    assert model.body[0].weight is weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("mode", PACKED)
def test_a_model_computes_on_the_cpu_after_it_was_moved_there(mode):
    model = built(quantizing_fabric(mode, "32-true", "cuda"), Mixed).eval()
    state = {name: value.cpu() for name, value in model.state_dict().items()}
    tokens = torch.arange(12).view(3, 4)
    expected = model(tokens.cuda()).cpu()
    found = model.cpu()(tokens)
    assert (found - expected).norm() < 0.02 * expected.norm()  # CUDA's int8 kernels quantize inputs, the CPU's do not
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    assert {part.device.type for layer in layers for part in layer.weight.parts().values()} == {"cpu"}


@pytest.mark.parametrize("mode", PACKED)
def test_a_cast_of_packed_values_is_refused(mode):
    model = built(quantizing_fabric(mode), Mixed)
    with pytest.raises(TypeError, match=f"quantized as {mode} cannot become torch.float32"):
        model.body[0].type(torch.float32)


@pytest.mark.parametrize("mode", PACKED)
def test_copying_a_tensor_into_a_weight_quantizes_it_or_says_why_not(mode):
    layer = built(quantizing_fabric(mode, "32-true"), lambda: nn.Linear(64, 6, bias=False))
    weight = torch.randn(6, 64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    assert_quantized_as_by_bitsandbytes(layer, weight, mode)
    with pytest.raises(RuntimeError, match=r"takes values of shape \[6, 64\].*found \[6, 63\]"):
        layer.weight.copy_(torch.randn(6, 63))


@pytest.mark.parametrize("mode", PACKED)
def test_reset_parameters_quantizes_the_new_weight(mode):
    layer = built(quantizing_fabric(mode, "32-true"), lambda: nn.Linear(64, 6))
    torch.manual_seed(3)
    layer.reset_parameters()
    expected = nn.Linear(64, 6)
    torch.manual_seed(3)
    expected.reset_parameters()
    assert_quantized_as_by_bitsandbytes(layer, expected.weight, mode)
    assert torch.equal(layer.bias, expected.bias)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_gives_the_same_gradients(mode, device):
    model = built(quantizing_fabric(mode, "32-true", device.type), Mixed).train()
    x = torch.randn(2, 5, 65, device=device, requires_grad=True)
    gradients = []
    for run in (model.body, lambda x: checkpoint(model.body, x, use_reentrant=False)):
        x.grad = None
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


COMPILER_TALK = (  # of torch's compiler, about its own code and about that of bitsandbytes
    "ignore::DeprecationWarning",
    "ignore:bf16 and fp16 are mixed in the scheduler node",
    "ignore:TensorFloat32 tensor cores",
)


def _loss_and_gradients(fabric, wrapped, tokens):
    wrapped.zero_grad()
    output = wrapped(tokens)
    fabric.backward(output.float().square().mean())
    return output.detach(), {name: param.grad for name, param in wrapped.named_parameters() if param.grad is not None}


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="older compilers break the graph at bitsandbytes' parameters")
@pytest.mark.filterwarnings(*COMPILER_TALK)
@pytest.mark.parametrize(
    ("mode", "precision", "tolerance"),
    [
        ("nf4", "32-true", 1e-5),
        ("int8", "32-true", 1e-5),
        ("int8", "bf16-true", 2e-2),  # a few of bfloat16's rounding errors, of 4e-3
        ("int8-training", "32-true", 1e-5),
    ],
)
def test_a_model_compiled_by_inductor_in_one_graph_has_the_same_outputs_and_gradients(
    mode, precision, tolerance, device
):
    """Up to the order in which sums are taken where operations are fused: a relative error of at most ``tolerance``."""
    torch._dynamo.reset()
    fabric = quantizing_fabric(mode, precision, device.type)
    model = built(fabric, Mixed)
    tokens = torch.arange(12, device=device).view(3, 4)
    output, gradients = _loss_and_gradients(fabric, fabric.setup(model), tokens)
    compiled = fabric.setup(torch.compile(model, fullgraph=True))
    found, found_gradients = _loss_and_gradients(fabric, compiled, tokens)
    assert _error(found, output) <= tolerance
    assert {name.replace("_orig_mod.", "") for name in found_gradients} == gradients.keys()
    for name, gradient in found_gradients.items():
        assert _error(gradient, gradients[name.replace("_orig_mod.", "")]) <= tolerance, name


def _error(found, expected):
    return (found.float() - expected.float()).norm() / expected.float().norm()


@pytest.mark.filterwarnings("ignore:.*autograd.*should not be instantiated:DeprecationWarning")  # torch.compile itself
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8", "int8-training"])
def test_a_compiled_model_gives_the_same_outputs(mode, device):
    model = built(quantizing_fabric(mode, "32-true", device.type), Mixed).eval()
    tokens = torch.arange(12, device=device).view(3, 4)
    with torch.no_grad():
        expected = model(tokens)
        found = torch.compile(model, backend="eager")(tokens)
    assert torch.allclose(found, expected, atol=1e-5)


def test_int8_training_quantizes_the_weight_that_it_has_now(device):
    layer = built(quantizing_fabric("int8-training", "32-true", device.type), lambda: nn.Linear(64, 32))
    x = torch.randn(4, 64, device=device)
    layer.train()
    layer(x).sum().backward()  # bitsandbytes keeps what it quantized here as long as there are gradients
    with torch.no_grad():
        layer.weight.mul_(3)
        layer.bias.zero_()
    for training in (True, False):
        expected = x @ layer.weight.detach().t()
        found = layer.train(training)(x)
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_mode_is_shown():
    assert "quantize=nf4-dq" in repr(built(quantizing_fabric("nf4-dq"), Mixed).body[0])


def test_a_bias_keeps_its_dtype_in_mixed_precision():
    model = built(quantizing_fabric("nf4", "bf16-mixed"), Mixed)
    model.body[0](torch.randn(2, 65))
    assert model.body[0].bias.dtype == torch.float32
    assert model.body[0].compute_dtype == torch.bfloat16
    assert isinstance(model.body[0], QuantizedLayer)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", PACKED)
def test_values_do_not_depend_on_the_stream_that_is_current(mode, tmp_path):
    weight = torch.randn(2048, 1024, dtype=torch.bfloat16)
    torch.save({"weight": weight}, tmp_path / "a.pth")
    with torch.cuda.stream(torch.cuda.Stream()):
        layer = built(quantizing_fabric(mode, accelerator="cuda"), lambda: nn.Linear(1024, 2048, bias=False))
        load_checkpoint(layer, tmp_path / "a.pth")
    torch.cuda.synchronize()
    assert_quantized_as_by_bitsandbytes(layer, weight.cuda(), mode)
