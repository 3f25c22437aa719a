"""The README's code runs as it is written there, with only what it needs around it."""

import re
import shutil
import subprocess
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_efficient_init import EfficientInit

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)


class LLaMA(nn.Module):
    """Stands for the one in the README."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(32, width), nn.Linear(width, width), nn.LayerNorm(width))

    @classmethod
    def from_name(cls, name):
        return cls({"7B": 16}[name])


class MyLightningModule(L.LightningModule):
    """Stands for the one in the README; it trains for one batch."""

    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def train_dataloader(self):
        return DataLoader(torch.randn(4, self.hparams["width"]))

    def training_step(self, batch, _):
        self.trainer.should_stop = True
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ACCELERATORS = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def run(snippet, accelerator, **names):
    """Run a snippet, on this accelerator, and return its variables."""
    exec(compile(snippet.replace('"cuda"', repr(accelerator)), "README.md", "exec"), names)
    return names


def snippet_with(text):
    (found,) = [snippet for snippet in SNIPPETS if text in snippet]
    return found


@pytest.fixture
def llama_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(LLaMA.from_name("7B").state_dict(), "lit-llama.pth")
    return tmp_path / "lit-llama.pth"


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_the_fabric_snippet_runs(accelerator, llama_file):
    model = run(snippet_with('"efficient_init", plugins=[EfficientInit("bf16-true")]'), accelerator, LLaMA=LLaMA)[
        "model"
    ]
    saved = torch.load(llama_file)
    for name, value in model.state_dict().items():
        assert value.device.type == accelerator
        assert torch.equal(value.cpu(), saved[name].bfloat16())


def test_the_snippet_on_several_devices_runs_on_one(llama_file):
    snippet = snippet_with("efficient_init_fsdp2").replace("devices=8", "devices=1")
    model = run(snippet, "cpu", L=L, EfficientInit=EfficientInit, LLaMA=LLaMA)["model"]
    torch.distributed.destroy_process_group()
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_the_snippet_on_quantized_models_runs(accelerator, llama_file):
    pytest.importorskip("bitsandbytes")
    names = {"L": L, "EfficientInit": EfficientInit, "LLaMA": LLaMA}
    model = run(snippet_with('quantize="nf4"'), accelerator, **names)["model"]
    assert type(model.layers[1].weight).__name__ == "Params4bit"
    assert model.layers[1].weight.device.type == accelerator


@pytest.mark.filterwarnings(
    "ignore:`max_epochs` was not set",  # the snippet keeps to what it is about
    "ignore:.*does not have many workers",
    "ignore:.*number of training batches .* is smaller than the logging interval",
    "ignore:.*`tensorboardX` has been removed as a dependency",
)
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_the_trainer_snippet_runs(accelerator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    trainer.fit(MyLightningModule(width=4))
    trainer.save_checkpoint("my/checkpoint/path.ckpt")
    saved = torch.load("my/checkpoint/path.ckpt")["state_dict"]

    snippet, fit = snippet_with("load_from_checkpoint").split("trainer.fit(model)\n")
    assert fit == ""
    names = run(snippet, accelerator, MyLightningModule=MyLightningModule)
    for name, value in names["model"].state_dict().items():
        assert value.device.type == accelerator
        assert torch.equal(value.cpu(), saved[name].half())
    run("trainer.fit(model)", accelerator, **names)
    assert names["model"].hparams["width"] == 4
    assert names["trainer"].global_step == 1


def test_the_load_checkpoint_snippet_runs(llama_file, capsys):
    model = LLaMA.from_name("7B")
    run(snippet_with("load_checkpoint(model"), "cpu", model=model)
    assert "loaded 5 tensors" in capsys.readouterr().out
    assert all(torch.equal(value, torch.load(llama_file)[name]) for name, value in model.state_dict().items())


def test_the_plan_load_snippet_runs(llama_file, capsys):
    run(snippet_with("plan_load(model"), "cpu", model=LLaMA.from_name("7B"))
    num_bytes = sum(tensor.nbytes for tensor in torch.load(llama_file).values())
    assert str(num_bytes) in capsys.readouterr().out


def test_the_plan_memory_snippet_runs(llama_file, capsys):
    names = run(snippet_with("plan_memory("), "cpu", LLaMA=LLaMA, torch=torch)
    numel = sum(parameter.numel() for parameter in LLaMA.from_name("7B").parameters())
    printed = [int(word) for word in capsys.readouterr().out.split()]
    assert printed[0] == 4 * numel
    assert names["plan"].device["optimizer state"] == 2 * 2 * numel


def test_every_snippet_is_run_here():
    assert len(SNIPPETS) == 7


def test_precisions_are_those_of_the_plugin():
    (listed,) = re.findall(r"`EfficientInit` takes (.*?), and trains", README, re.DOTALL)
    for precision in (names := re.findall(r'"([\w-]+)"', listed)):
        EfficientInit(precision)
    assert len(names) == 6


def test_the_commands_name_files_that_exist_and_extras_that_are_declared():
    project = (ROOT / "pyproject.toml").read_text()
    for command in COMMANDS:
        extra = re.search(r"[.]\[(\w+)\]", command)[1]
        assert f"\n{extra} = [" in project
        assert all((ROOT / path).is_file() for path in re.findall(r"examples/\S+\.py", command))
    assert len(COMMANDS) == 2


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_continuous_integration_finds_the_test_command():
    pattern = re.search(r"grep -E '(.*?)' README.md", (ROOT / ".ci" / "run").read_text())[1]
    found = subprocess.run(["grep", "-E", pattern, ROOT / "README.md"], capture_output=True, text=True, check=True)
    assert found.stdout == COMMANDS[1]


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists()
