"""Adapters of peft on a quantized base, under the Trainer on several ranks, by real processes."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning_models import ADVICE, quiet_trainer
from quantized_models import Mixed, built, quantizing_fabric
from ranks import run_ranks
from torch.utils.data import DataLoader

from lightning_efficient_init import EfficientInit, load_checkpoint, uninitialized_parameters

peft = pytest.importorskip("peft")
pytestmark = [ADVICE, pytest.mark.filterwarnings("ignore:.*does not have many workers")]
WIDTH = 512
TARGETS = ["named", "body.0", "body.2"]


class Adapted(L.LightningModule):
    """A base that is read in ``configure_model``, and frozen, with adapters that are all that is trained and saved."""

    def __init__(self, path):
        super().__init__()
        self.path, self.net, self.losses = path, None, []
        self.strict_loading = False  # the base is not in the checkpoints of a Trainer

    def configure_model(self):
        if self.net is None:
            base = Mixed(WIDTH)
            before = _rchar()
            self.report = load_checkpoint(base, self.path)
            self.num_bytes_read = _rchar() - before
            self.net = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=TARGETS))

    def training_step(self, batch, _):
        loss = self.net(batch).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 0.01)

    def on_save_checkpoint(self, checkpoint):
        trained = {name for name, param in self.named_parameters() if param.requires_grad}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}


def _rchar():
    with open("/proc/self/io") as io:
        return int(io.readline().split()[1])


def trainer_of(**kwargs):
    plugin = EfficientInit("32-true", quantize="nf4")
    options = {"strategy": "efficient_init_ddp", "devices": 2, "max_steps": 4, "max_epochs": -1, **kwargs}
    return quiet_trainer(plugins=[plugin], **options)


def batches():
    return DataLoader(torch.arange(32).view(8, 4) % 40, batch_size=2)


class Saves(L.Callback):
    """After the second step."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


def tensors(model):
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def _fit(rank, folder, resume):
    torch.manual_seed(50 + rank)  # adapters are random, too
    trainer = trainer_of(callbacks=[] if resume else [Saves(folder / "a.ckpt")])
    model = Adapted(folder / "base.pth")
    trainer.fit(model, batches(), ckpt_path=folder / "a.ckpt" if resume else None)
    assert not uninitialized_parameters(model)
    names = {name: type(module).__module__ for name, module in model.net.named_modules() if name.endswith("named")}
    assert set(names.values()) == {"peft.tuners.lora.bnb"}
    if rank == 0 and not resume:
        model.net.save_pretrained(folder / "adapters")
    with torch.no_grad():
        output = model.net.eval()(torch.arange(4))
    trained = [name for name, param in model.net.named_parameters() if param.requires_grad]
    return tensors(model.net), trained, model.losses, output, model.report, model.num_bytes_read


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_adapters_train_in_step_on_a_base_that_is_read_once_and_only_they_are_saved(tmp_path):
    torch.save(Mixed(WIDTH).state_dict(), tmp_path / "base.pth")
    base = built(quantizing_fabric("nf4", "32-true"), lambda: Mixed(WIDTH), empty=True)
    total = load_checkpoint(base, tmp_path / "base.pth").num_bytes
    first, second = run_ranks(_fit, 2, tmp_path, False)
    state, trained, losses, output, report, _ = first
    assert_same(second[0], state)
    assert losses != second[2]  # each rank has batches of its own
    assert losses[-1] < losses[0]

    assert len(trained) == 2 * len(TARGETS)
    assert all("lora_" in name for name in trained)
    for name, value in tensors(base).items():
        path = next((target for target in TARGETS if name.startswith(f"{target}.")), "")
        adapted = name.replace(path, f"{path}.base_layer", 1) if path else name
        assert torch.equal(state[f"base_model.model.{adapted}"], value), name

    assert sum(report.bytes_per_rank) == total
    for *_, found, num_bytes_read in (first, second):
        assert found.num_bytes < 0.7 * total
        assert num_bytes_read < 0.7 * total

    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"]
    assert set(saved) == {f"net.{name}" for name in trained}

    alone = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
    with torch.no_grad():
        assert torch.equal(alone.eval()(torch.arange(4)), output)

    for found, expected in zip(run_ranks(_fit, 2, tmp_path, True), (first, second), strict=True):
        assert found[2] == expected[2][2:]
        assert_same(found[0], expected[0])
