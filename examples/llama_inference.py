"""Generate text with a LLaMA: built in place, its checkpoint streamed, with Fabric.

    python examples/llama_inference.py                             # small, with random weights; runs anywhere
    python examples/llama_inference.py --model Llama-2-7b-hf       # 7B with random weights; 13.5 GB of disk and of GPU
    python examples/llama_inference.py --model Llama-2-7b-hf --checkpoint lit_model.pth --tokenizer its/folder

Models are litgpt's, by the names of its configurations; ``--set n_layer=4`` changes one of their fields.
"""

from __future__ import annotations

import argparse
import ast
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from litgpt import GPT, Config, Tokenizer
from litgpt.generate.base import generate
from rich.console import Console

from lightning_efficient_init import EfficientInit
from lightning_efficient_init.memory import PeakMemory

SMALL = {"name": "tiny-llama-1.1b", "n_layer": 2}

console = Console(soft_wrap=True)


def build_config(args: argparse.Namespace) -> Config:
    """The configuration that was asked for, or a small one."""
    fields: dict[str, Any] = SMALL if args.model is None else {"name": args.model}
    changes = {key: ast.literal_eval(value) for key, value in (change.split("=") for change in args.set)}
    return Config.from_name(**{**fields, **changes})


def write_random_checkpoint(fabric: L.Fabric, config: Config, path: Path) -> None:
    """Stand-in for a checkpoint: the model's own initialization."""
    with fabric.init_module():
        weights = GPT(config).state_dict()
    torch.save(weights, path)
    console.print(f"no --checkpoint given: wrote random weights, {path.stat().st_size / 1e9:.3f} GB")


def load_model(fabric: L.Fabric, config: Config, path: Path) -> GPT:
    """The two lines this is about."""
    with fabric.init_module(empty_init=True):
        model = GPT(config)
    fabric.load_raw(path, model)
    return model


def load_and_report(fabric: L.Fabric, config: Config, path: Path) -> GPT:
    """Load the model, and print what it took."""
    torch.zeros(1, device=fabric.device)  # starting CUDA is not part of loading
    with PeakMemory([fabric.device], in_background=True) as memory:
        started = time.perf_counter()
        model = load_model(fabric, config, path)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed_s = time.perf_counter() - started
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    console.print(
        f"[bold]{config.name}[/], {num_bytes / 1e9:.3f} GB of weights: built and loaded in {elapsed_s:.2f} s "
        f"({num_bytes / elapsed_s / 1e9:.1f} GB/s); host memory peak +{memory.host_bytes / 1e9:.3f} GB"
        + f"; device memory peak {memory.device_bytes / 1e9:.3f} GB"
        * (fabric.device.type == "cuda")
    )
    return model


def encode_prompt(args: argparse.Namespace, tokenizer: Tokenizer | None, config: Config) -> torch.Tensor:
    """The prompt's token ids; without a tokenizer, any."""
    if tokenizer is None:
        return torch.randint(config.vocab_size, (8,))
    return tokenizer.encode(args.prompt)


def generate_tokens(fabric: L.Fabric, model: GPT, prompt: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """Continue the prompt, and print how fast."""
    with fabric.init_tensor():
        model.max_seq_length = len(prompt) + max_new_tokens
        model.set_kv_cache(batch_size=1)
    model = fabric.setup(model.eval())
    started = time.perf_counter()
    tokens = generate(model, prompt.to(fabric.device), model.max_seq_length, temperature=0.8, top_k=200)
    elapsed_s = time.perf_counter() - started
    console.print(f"generated {max_new_tokens} tokens, {max_new_tokens / elapsed_s:.1f} per second")
    return tokens.cpu()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """What can be chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"name of a litgpt configuration (default: {SMALL})")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change the configuration")
    parser.add_argument("--checkpoint", type=Path, help="weights for litgpt's GPT, in any format that can be read")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer; without one, token ids are printed")
    parser.add_argument("--prompt", default="Hello, my name is")
    parser.add_argument("--max-new-tokens", type=int, default=50)
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("--precision", default="bf16-true", help="as for EfficientInit (default: bf16-true)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Build, load, generate."""
    args = parse_arguments(argv)
    config = build_config(args)
    plugin = EfficientInit(args.precision)
    fabric = L.Fabric(accelerator=args.accelerator, devices=1, strategy="efficient_init", plugins=[plugin])
    fabric.seed_everything(args.seed, verbose=False)

    with tempfile.TemporaryDirectory() as folder:
        path = args.checkpoint or Path(folder) / "random.pth"
        if args.checkpoint is None:
            write_random_checkpoint(fabric, config, path)
        model = load_and_report(fabric, config, path)

    tokenizer = None if args.tokenizer is None else Tokenizer(args.tokenizer)
    tokens = generate_tokens(fabric, model, encode_prompt(args, tokenizer, config), args.max_new_tokens)
    console.print(str(tokens.tolist()) if tokenizer is None else tokenizer.decode(tokens))


if __name__ == "__main__":
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    main()
