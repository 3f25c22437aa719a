"""Fine-tune a sentence encoder whose weights take four bits each, by adapters (QLoRA).

    python examples/qlora_minilm.py                        # with the Trainer, on a GPU if there is one, else the CPU
    python examples/qlora_minilm.py --runner fabric        # with Fabric
    python examples/qlora_minilm.py --quantize int8 --precision bf16-true

The task, the weights and the texts are those of finetune_minilm.py. Here the model's Linear layers are quantized while
their weights stream in, and stay as they are; adapters of peft learn. Only the adapters are saved, and a second model
that is built from the published weights and the adapters gives the same embeddings.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from finetune_minilm import (
    SentenceEncoder,
    add_arguments,
    build_loaders,
    build_trainer,
    console,
    ignore_known_warnings,
    read_pretrained,
)
from peft import LoraConfig, PeftModel, get_peft_model
from stdlib_pairs import Pair
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_efficient_init import EfficientInit
from lightning_efficient_init.quantize import MODES


class AdaptedEncoder(SentenceEncoder):
    """A sentence encoder of which only the adapters learn."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the adapters."""
        adapters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(adapters, lr=self.hparams["learning_rate"])


def build_base(runner: L.Trainer | L.Fabric, learning_rate: float) -> AdaptedEncoder:
    """MiniLM, quantized while its published weights stream in."""
    with runner.init_module(empty_init=True):
        model = AdaptedEncoder.from_folder(learning_rate)
    read_pretrained(model)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    console.print(f"the base takes {num_bytes / 1e6:.1f} MB, its embeddings in full included")
    return model


def add_adapters(model: AdaptedEncoder, rank: int) -> None:
    """Freeze the base, and put a pair of small matrices beside every Linear of its encoder."""
    layers = ["query", "key", "value", "dense"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, exclude_modules=["pooler.dense"])
    model.bert = get_peft_model(model.bert, config)
    model.bert.print_trainable_parameters()


def fit_with_trainer(trainer: L.Trainer, model: AdaptedEncoder, loader: DataLoader[Pair]) -> None:
    """The Trainer does it all."""
    model.train()
    trainer.fit(model, loader)


def fit_with_fabric(fabric: L.Fabric, model: AdaptedEncoder, loader: DataLoader[Pair], max_steps: int) -> None:
    """The same in a loop of one's own."""
    wrapped, optimizer = fabric.setup(model, model.configure_optimizers())
    wrapped.mark_forward_method("training_step")
    batches = iter(fabric.setup_dataloaders(loader))
    wrapped.train()
    for step in range(max_steps):
        batch = next(batches, None)
        if batch is None:
            batches = iter(fabric.setup_dataloaders(loader))
            batch = next(batches)
        optimizer.zero_grad()
        fabric.backward(wrapped.training_step(batch, step))
        fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()


@torch.no_grad()
def score(fabric: L.Fabric, model: AdaptedEncoder, loader: DataLoader[Pair]) -> tuple[Tensor, float, float]:
    """Embeddings of the summaries; how often one finds its own name first; the loss of the held-out pairs."""
    model = model.to(fabric.device).eval()
    names, summaries, losses = [], [], []
    with fabric.autocast():
        for batch in map(fabric.to_device, loader):
            names.append(model(batch["names"]).float())
            summaries.append(model(batch["summaries"]).float())
            losses.append(model.training_step(batch, 0).item())
    found = torch.cat(summaries)
    best = (found @ torch.cat(names).T).argmax(dim=1)
    hits = best == torch.arange(len(best), device=best.device)
    return found, hits.float().mean().item(), sum(losses) / len(losses)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """What can be chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, learning_rate=1e-3)
    parser.add_argument("--runner", default="trainer", choices=["trainer", "fabric"])
    parser.add_argument("--quantize", default="nf4-dq", choices=[mode for mode in MODES if mode != "int8-training"])
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--adapters", type=Path, help="folder to save the adapters in; by default they are not kept")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Quantize, adapt, save the adapters, build it all again."""
    args = parse_arguments(argv)
    L.seed_everything(args.seed, verbose=False)
    train_loader, held_out_loader = build_loaders(args)
    plugin = EfficientInit(args.precision, quantize=args.quantize)
    fabric = L.Fabric(accelerator=args.accelerator, devices=1, plugins=[plugin])

    runner = fabric if args.runner == "fabric" else build_trainer(args, quantize=args.quantize)
    model = build_base(runner, args.learning_rate)
    add_adapters(model, args.rank)
    _, recall, loss = score(fabric, model, held_out_loader)
    console.print(f"[bold]before[/]: loss {loss:.3f}, recall@1 {recall:.3f}")
    if isinstance(runner, L.Trainer):
        fit_with_trainer(runner, model, train_loader)
    else:
        fit_with_fabric(runner, model, train_loader, args.max_steps)
    embeddings, recall, loss = score(fabric, model, held_out_loader)
    console.print(f"[bold]after {args.max_steps} steps[/]: loss {loss:.3f}, recall@1 {recall:.3f}")

    with tempfile.TemporaryDirectory() as folder:
        path = args.adapters or Path(folder)
        model.bert.save_pretrained(path, save_embedding_layers=False)
        num_bytes = (path / "adapter_model.safetensors").stat().st_size
        console.print(f"saved the adapters: {num_bytes / 1e6:.1f} MB")
        reloaded = build_base(runner, args.learning_rate)
        reloaded.bert = PeftModel.from_pretrained(reloaded.bert, path)
        plugin.convert_module(reloaded)
        if not torch.equal(score(fabric, reloaded, held_out_loader)[0], embeddings):
            raise RuntimeError("The reloaded model gives other embeddings than the one that was saved.")
        console.print(f"reloaded: all {len(embeddings)} embeddings are equal")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ignore_known_warnings()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft reads it
    main()
