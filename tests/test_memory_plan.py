"""``plan_memory``: against what processes really take, and against bitsandbytes' own layers."""

import re

import bitsandbytes as bnb
import measured
import pytest
import torch
from ranks import run_ranks
from torch import nn

from lightning_efficient_init import EfficientInit, deferred_init, plan_load
from lightning_efficient_init.bench.llama import SIZES, LLaMA
from lightning_efficient_init.bench.processes import in_fresh_process
from lightning_efficient_init.errors import QuantizationError, StateDictMismatchError, UsageError
from lightning_efficient_init.memory_plan import Question, answer, plan_memory, remedies
from lightning_efficient_init.model_names import constructor_of

MIB = 1 << 20
GIB = 1 << 30


def built(name, dtype=torch.float32):
    torch.set_default_dtype(dtype)
    try:
        with deferred_init():
            return constructor_of(name)()
    finally:
        torch.set_default_dtype(torch.float32)


def assert_close(predicted, measured):
    """Within 5 % or 64 MiB."""
    assert abs(predicted - measured) <= max(0.05 * measured, 64 * MIB)


CASES = {
    "as they are": ("8x16000000", torch.bfloat16, "bf16-true", None),
    "cast on the way": ("8x16000000", torch.float32, "bf16-true", None),
    "many tensors": ("10000x1000", torch.bfloat16, "bf16-true", None),
    "trained with AdamW": ("4x16000000", torch.float32, "32-true", torch.optim.AdamW),
    "trained with plain SGD": ("2x32000000", torch.float32, "32-true", torch.optim.SGD),
}


@pytest.mark.parametrize("case", CASES)
def test_predictions_are_what_a_process_takes(case, tmp_path, device):
    name, stored, precision, optimizer = CASES[case]
    count, numel = map(int, name.split("x"))
    value = torch.ones(numel, dtype=stored)
    keys = built(name).state_dict().keys()
    torch.save({key: value.clone() for key in keys}, tmp_path / "a.pth")
    dtype = {"bf16-true": torch.bfloat16, "32-true": torch.float32}[precision]
    plan = plan_memory(
        built(name, dtype), tmp_path / "a.pth", precision=precision, optimizer=optimizer, device_type=device.type
    )
    host, on_device, read = in_fresh_process(
        measured.load, name, str(tmp_path / "a.pth"), precision, device.type, optimizer
    )
    assert plan.final_bytes == pytest.approx(count * numel * dtype.itemsize, rel=0.01 if numel > 1000 else 6)
    assert plan.bytes_read == count * value.nbytes
    assert_close(plan.host_peak_bytes, host)
    assert_close(plan.device_peak_bytes if device.type == "cuda" else 0, on_device)
    # what lies between tensors and the headers are read, too
    assert plan.bytes_read <= read <= plan.bytes_read + count * 4096 + 16 * MIB


@pytest.mark.parametrize("mode", ["int8", "nf4", "nf4-dq"])
def test_predictions_are_what_a_quantized_load_takes(mode, tmp_path, device):
    model = built("0.1B", torch.bfloat16)
    torch.save({name: torch.ones(t.shape).bfloat16() for name, t in model.state_dict().items()}, tmp_path / "a.pth")
    kwargs = {"precision": "bf16-true", "quantize": mode, "device_type": device.type}
    plan = plan_memory(model, tmp_path / "a.pth", **kwargs)
    host, on_device, read = in_fresh_process(
        measured.load, "0.1B", str(tmp_path / "a.pth"), "bf16-true", device.type, quantize=mode
    )
    assert plan.final_bytes < 0.7 * sum(parameter.nbytes for parameter in model.parameters())
    assert_close(plan.host_peak_bytes, host)
    assert_close(plan.device_peak_bytes if device.type == "cuda" else 0, on_device)
    assert plan.bytes_read <= read <= 1.05 * plan.bytes_read


def test_tensors_that_are_stored_transposed_need_scratch(tmp_path):
    model = nn.Linear(4096, 4096, bias=False)
    torch.save({"weight": model.weight.detach().t().contiguous().t()}, tmp_path / "a.pth")
    plan = plan_memory(model, tmp_path / "a.pth", device_type="cuda")
    assert plan.loading == model.weight.nbytes
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert plan_memory(model, tmp_path / "a.pth", device_type="cuda").loading == 0


@pytest.mark.parametrize(
    ("mode", "make"),
    [
        ("int8", lambda w: bnb.nn.Int8Params(w, has_fp16_weights=False)),
        ("nf4", lambda w: bnb.nn.Params4bit(w, quant_type="nf4", compress_statistics=False)),
        ("nf4-dq", lambda w: bnb.nn.Params4bit(w, quant_type="nf4", compress_statistics=True)),
        ("fp4", lambda w: bnb.nn.Params4bit(w, quant_type="fp4", compress_statistics=False)),
        ("fp4-dq", lambda w: bnb.nn.Params4bit(w, quant_type="fp4", compress_statistics=True)),
    ],
)
@pytest.mark.parametrize("shape", [(512, 640), (33, 7)])
def test_quantized_sizes_are_those_of_bitsandbytes(mode, make, shape):
    weight = make(torch.randn(shape, dtype=torch.bfloat16))
    if mode == "int8":
        values, row_scales, _ = bnb.functional.int8_vectorwise_quant(weight.data.half())
        tensors = [values, row_scales]
    else:
        weight = weight.to("cpu")
        state = weight.quant_state
        tensors = [weight.data, state.absmax, state.code]
        if state.nested:
            tensors += [state.state2.absmax, state.state2.code, state.offset]
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False))
    plan = plan_memory(model, precision="bf16-true", quantize=mode, device_type="cpu")
    assert plan.final_bytes == sum(tensor.nbytes for tensor in tensors)


def test_what_is_not_quantized_keeps_its_size():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(100, 64)
            self.blocks = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(11))
            self.attention = nn.MultiheadAttention(64, 2, bias=False)
            self.head = nn.Linear(64, 100, bias=False)
            self.head.weight = self.embed.weight

    with torch.device("meta"):
        model = Net()
    plan = plan_memory(model, quantize="int8", skip_modules=["blocks.1"], device_type="cpu")
    whole, layer = 100 * 64 * 4 + 4 * 64 * 64 * 4, 64 * 64
    assert plan.final_bytes == whole + layer * 4 + 10 * (layer + 64 * 4)  # blocks.10 is not blocks.1


@pytest.mark.parametrize(
    ("optimizer", "multiple"),
    [
        (torch.optim.SGD, 0),
        (lambda ps: torch.optim.SGD(ps, momentum=0.9), 1),
        (torch.optim.AdamW, 2),
        (lambda ps: torch.optim.Adam(ps, amsgrad=True), 3),
    ],
)
def test_optimizer_state_is_what_the_optimizer_makes(optimizer, multiple):
    with torch.device("meta"):
        model = nn.Linear(1000, 1000, bias=False)
    plan = plan_memory(model, precision="bf16-true", optimizer=optimizer, device_type="cpu")
    assert plan.device["optimizer state"] == multiple * 2_000_000
    assert plan.device["gradients"] == 2_000_000


class Shapes(nn.Module):
    """Matrices, vectors, convolutions; short, long, square and not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3000, 128)
        self.blocks = nn.ModuleList(nn.Linear(500, 500) for _ in range(3))
        self.conv = nn.Conv2d(200, 300, 3)
        self.norm = nn.LayerNorm(40_000)
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("name", ["Adafactor", "AdamW", "ASGD", "NAdam", "Rprop", "SGD"])
def test_optimizer_state_is_counted_for_the_shapes_that_the_model_has(name):
    model, make = Shapes(), getattr(torch.optim, name)
    optimizer = make(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    expected = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))
    plan = plan_memory(model, optimizer=make, device_type="cpu")
    assert plan.device["optimizer state"] == pytest.approx(expected, abs=200)  # scalars are not counted


def test_state_of_8_bits_is_counted_with_what_is_too_small_for_it():
    model = Shapes()
    optimizer = bnb.optim.AdamW8bit(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {id(v): v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)}
    plan = plan_memory(Shapes(), optimizer=bnb.optim.AdamW8bit, device_type="cpu")
    assert plan.device["optimizer state"] == pytest.approx(sum(v.nbytes for v in state.values()), rel=0.02)


@pytest.mark.parametrize(("strategy", "is_factored"), [("efficient_init_fsdp2", True), ("efficient_init_fsdp", False)])
def test_a_strategy_that_flattens_parameters_gives_optimizers_vectors(strategy, is_factored):
    with torch.device("meta"):
        model = nn.Linear(4096, 4096, bias=False)
    plan = plan_memory(model, optimizer=torch.optim.Adafactor, strategy=strategy, num_devices=2)
    assert plan.device["optimizer state"] == (2 * 4 * 4096 if is_factored else 4 * 4096 * 4096) / 2


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_an_optimizer_that_refuses_a_shape_of_the_model_is_refused():
    with torch.device("meta"):
        model = nn.Linear(1000, 1000)
    with pytest.raises(UsageError, match=r"found ValueError: Muon only supports 2D parameters .*\[1000\]"):
        plan_memory(model, optimizer=torch.optim.Muon)
    model.bias = None
    assert plan_memory(model, optimizer=torch.optim.Muon).device["optimizer state"] == 4_000_000


def test_frozen_parameters_have_neither_gradients_nor_state():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))
    model[0].requires_grad_(False)
    plan = plan_memory(model, optimizer=torch.optim.AdamW, device_type="cpu")
    assert (plan.device["gradients"], plan.device["optimizer state"]) == (40_000, 80_000)


def test_a_rank_has_its_share_and_a_block():
    with torch.device("meta"):
        model = LLaMA(SIZES["7B"]).bfloat16()
    whole = plan_memory(model)
    shard = plan_memory(model, strategy="efficient_init_fsdp2", num_devices=4)
    block = sum(p.nbytes for p in model.h[0].parameters())
    assert whole.final_bytes == pytest.approx(13.48e9, rel=0.001)
    assert shard.device["parameters"] == pytest.approx(whole.device["parameters"] / 4, rel=0.001)
    assert shard.loading == pytest.approx(block, rel=0.001)
    copy = plan_memory(model, strategy="efficient_init_ddp", num_devices=4)
    assert copy.final_bytes == whole.final_bytes


def test_each_rank_reads_an_even_share(tmp_path):
    model = nn.Linear(64, 64, bias=False)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    reads = {
        strategy: plan_memory(model, tmp_path / "a.pth", strategy=strategy, num_devices=2).bytes_read
        for strategy in ("efficient_init_ddp", "efficient_init_fsdp", "efficient_init_fsdp2")
    }
    assert set(reads.values()) == {8192}


def test_offloading_moves_what_stays_to_the_host():
    with torch.device("meta"):
        model = nn.Linear(1000, 1000, bias=False)
    kwargs = {"num_devices": 2, "precision": "bf16-true", "optimizer": torch.optim.AdamW}
    on_device = plan_memory(model, strategy="efficient_init_deepspeed_stage_3", **kwargs)
    offloaded = plan_memory(model, strategy="efficient_init_deepspeed_stage_3_offload", **kwargs)
    assert on_device.device["optimizer state"] == 12 * 1_000_000 / 2  # values and two moments in float32
    assert offloaded.host_stays == sum(
        on_device.device[name] for name in ("parameters", "gradients", "optimizer state")
    )
    assert offloaded.final_bytes == 0


def test_what_would_fit_is_the_least_change_of_each_kind():
    with torch.device("meta"):
        model = LLaMA(SIZES["7B"])
    asked = Question(precision="32-true")
    assert answer(model, None, asked).fits(28 * GIB)
    found = remedies(model, None, asked, 13 * GIB)
    assert [(p.precision, p.quantize, p.num_devices) for p in found] == [
        ("bf16-true", None, 1),
        ("32-true", "int8", 1),
        ("32-true", None, 4),  # on two, half of it and a block is a little too much
    ]
    assert all(plan.fits(13 * GIB) for plan in found)
    assert [p.quantize for p in remedies(model, None, asked, 5 * GIB)] == ["nf4", None]
    assert remedies(model, None, asked, int(4.6e9))[0].quantize == "nf4-dq"
    training = Question(precision="32-true", optimizer=torch.optim.AdamW)
    assert not any(plan.quantize for plan in remedies(model, None, training, 80 * GIB))


def test_pairs_of_changes_are_tried_where_one_is_not_enough():
    with torch.device("meta"):
        layers = [nn.Linear(1000, 10_000, bias=False) for _ in range(100)]
        model = nn.Sequential(nn.Embedding(1_000_000, 1000), *layers)
    asked = Question(precision="32-true", device_type="cpu")
    found = remedies(model, None, asked, int(3.3e9))  # 2 GB of embeddings in 16 bits, 1 GB of the rest in 8
    assert [(plan.precision, plan.quantize) for plan in found] == [("bf16-true", "int8")]
    assert remedies(model, None, asked, int(2e9)) == []
    on_gpus = remedies(model, None, Question(precision="32-true"), int(3.3e9))
    assert [(plan.quantize, plan.num_devices) for plan in on_gpus] == [("int8", 1), (None, 4)]
    assert remedies(model, None, Question(precision="32-true"), 1000) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "ddp"}, "strategy 'ddp': expected one of 'efficient_init'"),
        ({"precision": "bf16"}, "precision 'bf16'"),
        ({"quantize": "int4"}, "quantize 'int4'"),
        ({"device_type": "tpu"}, "device_type 'tpu'"),
        ({"strategy": "efficient_init_fsdp2", "quantize": "nf4"}, "does not go with 'efficient_init_fsdp2'"),
        ({"num_devices": 2}, "exactly one for 'efficient_init'"),
        ({"num_devices": 0, "strategy": "efficient_init_ddp"}, "at least one"),
    ],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        plan_memory(nn.Linear(2, 2), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "x"}, r"model: expected a torch.nn.Module, found str\. The checkpoint comes second"),
        ({"checkpoint": 3}, "checkpoint: expected a path or a plan, found int"),
        ({"num_devices": "2"}, "num_devices: expected an int, found '2'"),
        ({"num_devices": 1.5}, r"num_devices: expected an int, found 1\.5"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        plan_memory(**{"model": nn.Linear(2, 2), "strategy": "efficient_init_fsdp2", **arguments})


@pytest.mark.parametrize(
    ("precision", "arguments"),
    [
        ("64-true", {"quantize": "int8"}),
        ("32-true", {"quantize": "int8", "skip_modules": ["nope"]}),
        ("32-true", {"quantize": "nf4", "skip_modules": ["0"]}),
        ("32-true", {"quantize": "nf4", "skip_modules": "0"}),
        ("32-true", {"skip_modules": ["0"]}),
    ],
)
def test_what_the_plugin_refuses_is_refused_in_its_words(precision, arguments):
    with pytest.raises((QuantizationError, TypeError)) as refused:
        EfficientInit(precision, **arguments).convert_module(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(type(refused.value), match=re.escape(str(refused.value))):
        plan_memory(nn.Sequential(nn.Linear(2, 2)), precision=precision, **arguments)


def test_a_model_without_layers_to_quantize_has_the_other_remedies():
    model, asked = nn.Embedding(1000, 1000), Question(precision="64-true", device_type="cpu")
    assert [plan.precision for plan in remedies(model, None, asked, 3_000_000)] == ["bf16-true"]
    assert remedies(model, None, asked, 1_000_000) == []


def test_a_checkpoint_that_does_not_fit_the_model_is_an_error(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "a.pth")
    with pytest.raises(StateDictMismatchError):
        plan_memory(nn.Linear(2, 2), tmp_path / "a.pth")


def test_nothing_is_allocated_for_it():
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**6)  # 4 TB
    assert plan_memory(model, optimizer=torch.optim.AdamW).final_bytes > 4 * 10**12


def test_a_plan_of_a_load_can_be_handed_over(tmp_path):
    model = nn.Linear(8, 8)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    plan = plan_load(model, tmp_path / "a.pth")
    assert plan_memory(model, plan) == plan_memory(model, tmp_path / "a.pth")


RANKS = [
    ("efficient_init", 1),
    ("efficient_init_ddp", 1),
    ("efficient_init_ddp", 2),
    ("efficient_init_fsdp", 1),
    ("efficient_init_fsdp", 2),
    ("efficient_init_fsdp2", 1),
    ("efficient_init_fsdp2", 2),
    ("efficient_init_deepspeed_stage_3", 1),
    ("efficient_init_deepspeed_stage_3", 2),
]


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW], ids=["loaded", "trained"])
@pytest.mark.parametrize(("strategy", "world_size"), RANKS)
def test_predictions_are_what_each_rank_takes(strategy, world_size, optimizer, tmp_path):
    if optimizer and strategy == "efficient_init_fsdp2" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch cannot run FSDP2 on a CPU")
    state = {name: torch.ones(p.shape) for name, p in measured.Blocks().state_dict().items()}
    torch.save(state, tmp_path / "a.pth")
    with deferred_init():
        model = measured.Blocks()
    options = {"strategy": strategy, "num_devices": world_size, "optimizer": optimizer, "device_type": "cpu"}
    plan = plan_memory(model, tmp_path / "a.pth", **options)
    for host, read in run_ranks(
        measured.load_on_rank, world_size, strategy, world_size, str(tmp_path / "a.pth"), optimizer
    ):
        assert abs(read - plan.bytes_read) <= 0.05 * plan.bytes_read + 4 * MIB
        assert_close(plan.host_peak_bytes, host)
