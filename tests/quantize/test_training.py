"""Quantized models in Fabric and the Trainer: built in every way, trained, saved, reloaded."""

import lightning as L
import pytest
import torch
from lightning_models import ADVICE, Regression, loader, quiet_trainer
from quantized_models import Mixed, assert_quantized_as_by_bitsandbytes, bnb, build_eagerly, built
from quantized_models import quantizing_fabric as quantizing
from torch import nn
from torch.utils.data import DataLoader

from lightning_efficient_init import EfficientInit, deferred_init, is_deferred, load_checkpoint, materialize
from lightning_efficient_init.deferred import UninitializedParameterWarning
from lightning_efficient_init.quantize import MODES, QuantizedLayer

pytestmark = [
    ADVICE,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]
PACKED = [mode for mode in MODES if mode != "int8-training"]
EAGER = torch.device("cpu")


class Model(L.LightningModule):
    """Wraps a network that is built in ``__init__``, or in ``configure_model``."""

    def __init__(self, late=False):
        super().__init__()
        self.save_hyperparameters()
        self.late = late
        self.net = None if late else Mixed()

    def configure_model(self):
        if self.net is None:
            self.net = Mixed()

    def training_step(self, batch, _):
        loss = self.net(batch).float().square().mean()
        self.log("loss", loss)
        return loss

    predict_step = validation_step = lambda self, batch, _: self.net(batch)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def quantized(model):
    return {path for path, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def tokens():
    return DataLoader(torch.arange(40).view(10, 4), batch_size=5)


def quantizing_trainer(mode, precision="bf16-true", strategy="auto", accelerator="cpu", skip_modules=(), **kwargs):
    plugin = EfficientInit(precision, quantize=mode, skip_modules=skip_modules)
    return quiet_trainer(accelerator, plugins=[plugin], strategy=strategy, max_steps=2, **kwargs)


@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_trainer_quantizes_in_init_module_and_in_configure_model(mode, late, strategy):
    trainer = quantizing_trainer(mode, strategy=strategy, skip_modules=["net.body.0"])
    torch.manual_seed(0)
    if late:
        model = Model(late=True)
    else:
        with trainer.init_module():
            model = Model()
        assert quantized(model) == {"net.body.2", "net.named"}
    torch.manual_seed(0)
    trainer.fit(model, tokens())
    assert quantized(model) == {"net.body.2", "net.named"}
    if mode != "int8-training":
        expected = build_eagerly(Mixed, torch.bfloat16, EAGER)
        assert_quantized_as_by_bitsandbytes(model.net.named, expected.named.weight, mode)


@pytest.mark.parametrize("strategy", ["auto", "efficient_init"])
@pytest.mark.parametrize("mode", PACKED)
def test_load_from_checkpoint_inside_init_module_quantizes_what_it_streams(mode, strategy, tmp_path):
    torch.manual_seed(3)
    stock = quiet_trainer(max_steps=1)
    stock.fit(Model(), tokens())
    stock.save_checkpoint(tmp_path / "a.ckpt")
    weight = stock.model.net.named.weight.detach().to(torch.bfloat16)
    trainer = quantizing_trainer(mode, strategy=strategy)
    with trainer.init_module(empty_init=True):
        model = Model.load_from_checkpoint(tmp_path / "a.ckpt")
        assert model.net.named.weight.dtype in {torch.uint8, torch.int8}  # inside already: it is never there in full
    assert_quantized_as_by_bitsandbytes(model.net.named, weight, mode)
    trainer.fit(model, tokens())
    trainer.save_checkpoint(tmp_path / "b.ckpt")
    with trainer.init_module(empty_init=True):
        reloaded = Model.load_from_checkpoint(tmp_path / "b.ckpt")
    assert_quantized_as_by_bitsandbytes(reloaded.net.named, weight, mode)
    outputs = [torch.cat(trainer.predict(m, tokens())) for m in (model, reloaded)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("mode", PACKED)
def test_ckpt_path_restores_a_quantized_model(mode, tmp_path):
    trainer = quantizing_trainer(mode, strategy="efficient_init")
    with trainer.init_module():
        model = Model()
    trainer.fit(model, tokens())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(9)
    other = Model(late=True)
    outputs = quantizing_trainer(mode, strategy="efficient_init").predict(
        other, tokens(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert torch.equal(torch.cat(outputs), torch.cat(trainer.predict(model, tokens())))


@pytest.mark.parametrize("when", ["before setup", "after setup"])
@pytest.mark.parametrize("mode", PACKED)
def test_loading_before_or_after_setup_gives_the_same_model(mode, when, device, tmp_path):
    expected = build_eagerly(Mixed, torch.float32, EAGER, seed=4)
    torch.save(expected.state_dict(), tmp_path / "a.pth")
    fabric = quantizing(mode, "bf16-true", device.type)
    model = built(fabric, Mixed, empty=True)
    if when == "before setup":
        fabric.load_raw(tmp_path / "a.pth", model)
    wrapped = fabric.setup(model)
    if when == "after setup":
        fabric.load_raw(tmp_path / "a.pth", wrapped)
    weight = expected.named.weight.to(device, torch.bfloat16)
    assert_quantized_as_by_bitsandbytes(model.named, weight, mode)
    wrapped(torch.arange(4, device=device))  # no warning: everything was written


@pytest.mark.parametrize("mode", PACKED)
def test_what_nobody_loads_is_initialized_and_quantized_at_first_use(mode, device):
    fabric = quantizing(mode, "bf16-true", device.type)
    model = built(fabric, Mixed, empty=True)
    wrapped = fabric.setup(model)
    with pytest.warns(UninitializedParameterWarning, match=r"body\.0\.weight"):
        wrapped(torch.arange(4, device=device))
    expected = build_eagerly(Mixed, torch.bfloat16, device)
    assert_quantized_as_by_bitsandbytes(model.named, expected.named.weight, mode)


@pytest.mark.parametrize("mode", PACKED)
def test_inside_deferred_init_weights_wait_and_are_quantized_when_they_get_values(mode, tmp_path):
    expected = build_eagerly(Mixed, torch.bfloat16, EAGER)
    with deferred_init():
        torch.manual_seed(0)
        with quantizing(mode).init_module():
            model = Mixed()
    assert is_deferred(model)
    with deferred_init(), quantizing(mode).init_module():
        loaded, copied = Mixed(), Mixed()
    assert_quantized_as_by_bitsandbytes(materialize(model).named, expected.named.weight, mode)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    load_checkpoint(loaded, tmp_path / "a.pth")
    assert_quantized_as_by_bitsandbytes(loaded.named, expected.named.weight, mode)
    copied.load_state_dict(expected.state_dict())
    assert_quantized_as_by_bitsandbytes(copied.named, expected.named.weight, mode)


def test_an_exception_in_init_module_leaves_no_hook_behind():
    hooks = torch.nn.modules.module._global_parameter_registration_hooks
    before = len(hooks)
    with pytest.raises(KeyError), quantizing("nf4").init_module():
        nn.Linear(3, 3)
        raise KeyError
    assert len(hooks) == before
    assert type(nn.Linear(3, 3)) is nn.Linear


def test_models_built_for_real_inside_are_quantized_too():
    fabric = quantizing("nf4", "32-true")
    from lightning_efficient_init import eager

    with fabric.init_module(), eager():
        model = Mixed()
        weight = model.named.weight.detach().clone()
    assert_quantized_as_by_bitsandbytes(model.named, weight, "nf4")


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_int8_training_lowers_the_loss(precision, device):
    fabric = quantizing("int8-training", precision, device.type)
    torch.manual_seed(0)
    with fabric.init_module():
        model = Regression(width=32)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), 0.02))
    losses = []
    for _ in range(5):
        for (x,) in loader():
            optimizer.zero_grad(set_to_none=False)  # gradients stay, and weights are quantized again all the same
            loss = model(x.to(fabric.device)).float().square().mean()
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_each_row_counts_in_the_gradient_of_an_int8_weight_as_much_as_its_own_gradient_is(precision, device):
    fabric = quantizing("int8-training", precision, device.type)
    with fabric.init_module():
        layer = nn.Linear(32, 48)
    dtype = layer.weight.dtype
    x = torch.randn(64, 32, device=device, dtype=dtype)
    grad = (
        torch.randn(64, 48, device=device, dtype=dtype) * torch.logspace(-3, 0, 64, device=device, dtype=dtype)[:, None]
    )
    layer(x).backward(grad)
    expected = grad.double().t() @ x.double()
    assert torch.linalg.norm(layer.weight.grad.double() - expected) < 0.01 * torch.linalg.norm(expected)


OPTIMIZERS = ["Adam8bit", "AdamW8bit", "Lion8bit", "SGD8bit", "RMSprop8bit", "AdEMAMix8bit"]
PAGED = [pytest.param(name, marks=pytest.mark.gpu) for name in ("PagedAdamW8bit", "PagedAdamW32bit", "PagedLion8bit")]


@pytest.mark.parametrize("name", [*OPTIMIZERS, *PAGED])
@pytest.mark.parametrize("mode", ["nf4", "int8", "int8-training"])
def test_optimizers_of_bitsandbytes_train_what_can_be_trained(mode, name, device):
    if name.startswith("Paged") and device.type == "cpu":
        pytest.skip("bitsandbytes pages memory of CUDA devices only")
    fabric = quantizing(mode, "32-true", device.type)
    model = built(fabric, lambda: nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64)))
    trained = [p for p in model.parameters() if p.requires_grad]
    kwargs = {"momentum": 0.9} if name == "SGD8bit" else {}
    optimizer = getattr(bnb.optim, name)(trained, lr=1e-3, **kwargs)
    model, optimizer = fabric.setup(model, optimizer)
    x = torch.randn(16, 128, device=device)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert len(trained) == (4 if mode == "int8-training" else 2)


@pytest.mark.filterwarnings("ignore:Merge lora module to")  # which is what is tested
@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "int8"])
def test_adapters_of_peft_train_on_a_quantized_base_and_merge(mode, device):
    peft = pytest.importorskip("peft")
    fabric = quantizing(mode, "32-true", device.type)
    base = built(fabric, Mixed)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules=["named", "body.0", "body.2"], init_lora_weights=True)
    model = peft.get_peft_model(base, config)
    kind = {"int8": "Linear8bitLt"}.get(mode, "Linear4bit")
    assert type(base.named).__name__ == kind
    assert type(base.named).__module__ == "peft.tuners.lora.bnb"
    wrapped, optimizer = fabric.setup(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
    )
    x, losses = torch.arange(12, device=device).view(3, 4), []
    for _ in range(10):
        optimizer.zero_grad()
        loss = wrapped(x).square().mean()
        fabric.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    packed = model.state_dict()
    for name, value in before.items():
        if name.startswith("named.weight") or name == "named.SCB":
            assert torch.equal(packed[f"base_model.model.named.base_layer.{name.removeprefix('named.')}"], value)
    with torch.no_grad():
        expected = wrapped(x)
    model.merge_adapter()
    with torch.no_grad():
        assert (wrapped(x) - expected).abs().max() < 0.5 * expected.abs().max()
