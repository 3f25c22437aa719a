"""Say what loading a checkpoint, and training on it, will take on each device, before anything is allocated."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from torch.nn import Embedding, Linear, Module, ModuleList, Parameter

from lightning_efficient_init.checkpoint import Entry, index_checkpoint
from lightning_efficient_init.cli.console import console, plain, print_json, size, table
from lightning_efficient_init.deferred import deferred_init
from lightning_efficient_init.errors import UsageError
from lightning_efficient_init.load.plan import LoadPlan, plan_load, unwrap
from lightning_efficient_init.memory import available_bytes
from lightning_efficient_init.memory_plan import (
    PRECISIONS,
    QUANTIZATIONS,
    STRATEGIES,
    MakeOptimizer,
    MemoryPlan,
    Question,
    answer,
    remedies,
)
from lightning_efficient_init.model_names import callable_at, constructor_of

_POWERS = ("", "k", "m", "g", "t")
_CUDA_CONTEXT_BYTES = 512 << 20  # what the driver takes of a device that nobody uses yet, roughly
_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("path", nargs="?", help="the checkpoint; without one, the model's own initializers run")
    parser.add_argument(
        "--model",
        help="MODULE:CALLABLE, a litgpt configuration, a Hugging Face folder, or one of the benchmark's; by default "
        "what the checkpoint holds, matrices that are no embeddings counted as linear layers",
    )
    parser.add_argument("--model-args", help="what CALLABLE is called with: a JSON list or object")
    parser.add_argument("--strategy", default="efficient_init", choices=STRATEGIES)
    parser.add_argument("--devices", type=int, default=1, help="how many (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, help="by default the model's own dtypes")
    parser.add_argument("--quantize", choices=QUANTIZATIONS)
    parser.add_argument("--skip-modules", nargs="+", default=[], help="module paths left unquantized; globs")
    parser.add_argument("--train", metavar="OPTIMIZER", help="a class of torch.optim, as AdamW; or MODULE:CLASS")
    parser.add_argument("--train-args", help="its arguments, a JSON object")
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument(
        "--device-memory", type=_bytes, help="of each device, as 24GiB; by default that of this machine"
    )
    parser.add_argument("--json", action="store_true", help="the numbers, as JSON")


def run(options: argparse.Namespace) -> int:
    """Print the plan, and whether it fits; the exit status is 0 in both cases."""
    _check(options)
    with redirect_stdout(sys.stderr):  # for what models and optimizers print
        asked = _question(options)
        model = _model(options, asked)
        # what a checkpoint holds beside tensors is in no model that is made of them
        plan = None if options.path is None else plan_load(model, options.path, strict=options.model is not None)
        found = answer(unwrap(model), plan, asked)
        room = _room(options, asked)
        changes = [] if room is None or found.fits(room) else remedies(unwrap(model), plan, asked, room)
    if options.json:
        print_json(_as_json(found, room, changes))
    else:
        _print(found, plan, room, changes)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise if an option is missing that others are about."""
    if options.path is None and options.model is None:
        raise UsageError("expected a checkpoint, a --model, or both; found neither.")
    if options.model_args is not None and ":" not in (options.model or ""):
        raise UsageError(
            f"--model-args {options.model_args!r}: expected a --model MODULE:CALLABLE that is called with them, found "
            f"{options.model or 'none'}. Pass one, or leave --model-args out."
        )
    if options.train_args is not None and options.train is None:
        raise UsageError(
            f"--train-args {options.train_args!r}: expected a --train OPTIMIZER that they are for, found none. Pass "
            "one, or leave --train-args out."
        )


def _question(options: argparse.Namespace) -> Question:
    accelerator = options.accelerator
    if accelerator == "auto":  # sizes that are given are those of a GPU
        accelerator = "cuda" if torch.cuda.is_available() or options.device_memory else "cpu"
    return Question(
        strategy=options.strategy,
        num_devices=options.devices,
        precision=options.precision,
        quantize=options.quantize,
        skip_modules=options.skip_modules,
        optimizer=_optimizer(options),
        device_type=accelerator,
    )


def _optimizer(options: argparse.Namespace) -> MakeOptimizer | None:
    if options.train is None:
        return None
    arguments = _parsed(options.train_args or "{}", "--train-args", {dict: "object"})
    make: Any = getattr(torch.optim, options.train, None)
    if ":" in options.train:
        make = callable_at(options.train, "--train")
    elif not (isinstance(make, type) and issubclass(make, torch.optim.Optimizer)):
        raise UsageError(f"--train {options.train!r}: expected a class of torch.optim, as AdamW, or MODULE:CLASS.")
    return lambda parameters: make(parameters, **arguments)


def _parsed(text: str, option: str, kinds: Mapping[type, str]) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: expected JSON; {error}.") from error
    if type(value) not in kinds:
        raise UsageError(f"{option} {text!r}: expected a JSON {' or '.join(kinds.values())}, found another value.")
    return value


def _bytes(text: str) -> int:
    """Reads "24GiB", "80GB", "512MiB"."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d*)?)\s*(?:([kmgt])(i)?|)b?", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 24GiB, found {text!r}")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS.index(found[2] or ""))


def _model(options: argparse.Namespace, asked: Question) -> Module:
    if options.model is None:
        return _stored_model(options.path)
    arguments = _parsed(options.model_args or "[]", "--model-args", {list: "list", dict: "object"})
    default = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPES.get(asked.precision or "", default))
    try:
        with deferred_init():
            return constructor_of(options.model, arguments)()
    finally:
        torch.set_default_dtype(default)


def _stored_model(path: str) -> Module:
    """A model with the checkpoint's tensors and nothing else, on the meta device."""
    model, tied = Module(), dict[Entry, Parameter]()
    for name, entry in index_checkpoint(path).weights.items():
        if isinstance(entry, Entry):
            *path_to, last = name.split(".")
            parameter = tied.setdefault(entry, _parameter(entry))
            _below(model, path_to, last, entry)._parameters[last] = parameter
    return model


def _parameter(entry: Entry) -> Parameter:
    tensor = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
    return Parameter(tensor, requires_grad=entry.dtype.is_floating_point or entry.dtype.is_complex)


def _below(model: Module, path: list[str], last: str, entry: Entry) -> Module:
    """The module that owns a tensor: a linear layer, if it is a matrix that is called as theirs is."""
    for segment, following in pairwise(path):
        container = ModuleList() if following.isdecimal() else Module()
        model = model._modules.setdefault(segment, container)  # type: ignore[assignment]
    if not path:
        return model
    is_matrix = last == "weight" and len(entry.shape) == 2 and entry.dtype.is_floating_point
    is_embedding = re.search(r"emb|wte|wpe", path[-1]) is not None
    made: Module = ModuleList() if last.isdecimal() else Module()
    if is_matrix:
        with torch.device("meta"):
            made = Embedding(1, 1) if is_embedding else Linear(1, 1, bias=False)
    present = model._modules.get(path[-1])
    if present is None or (is_matrix and isinstance(present, Module) and not present._modules):
        if present is not None:
            made._parameters.update(present._parameters)
        model._modules[path[-1]] = made
    return model._modules[path[-1]]  # type: ignore[return-value]


def _room(options: argparse.Namespace, asked: Question) -> int | None:
    """Free bytes of each device; None if nobody knows."""
    if options.device_memory is not None:
        return max(0, int(options.device_memory) - (_CUDA_CONTEXT_BYTES if asked.device_type == "cuda" else 0))
    if asked.device_type == "cpu":
        return available_bytes()
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.mem_get_info(i)[0] for i in range(min(asked.num_devices, torch.cuda.device_count())))


def _print(found: MemoryPlan, plan: LoadPlan | None, room: int | None, changes: list[MemoryPlan]) -> None:
    out = console()
    rows = table("on each rank", "", numbers=("",), title=_title(found))
    for name, num_bytes in _lines(found, plan).items():
        rows.add_row(name, size(num_bytes))
    out.print(rows)
    out.print("\nActivations are not in it.")
    if room is None:
        out.print("No device is at hand: pass --device-memory 24GiB to see whether it fits.")
    elif found.fits(room):
        out.print(f"It fits: {size(room)} are free.")
    else:
        out.print(
            f"It does not fit: {size(room)} are free." + ("" if changes else " Nothing that is known here would.")
        )
    for change in changes:
        out.print(plain(f"  {_title(change)} would: {size(_peak(change))}"))


def _title(found: MemoryPlan) -> str:
    parts = [found.strategy, f"{found.num_devices} x {found.device_type}", found.precision or "the model's own dtypes"]
    return ", ".join([*parts, *([found.quantize] if found.quantize else [])])


def _peak(found: MemoryPlan) -> int:
    return found.host_peak_bytes if found.device_type == "cpu" else found.device_peak_bytes


def _lines(found: MemoryPlan, plan: LoadPlan | None) -> Mapping[str, int]:
    lines = {} if plan is None else {"read from files": found.bytes_read}
    lines |= {name: num_bytes for name, num_bytes in found.device.items() if num_bytes}
    lines["the loaded model"] = found.final_bytes
    lines["device, peak while loading"] = found.load_peak_bytes
    if found.device["gradients"] or found.host_stays:
        lines["device, peak"] = found.device_peak_bytes
    return lines | {"host, peak of anonymous memory": found.host_peak_bytes}


def _as_json(found: MemoryPlan, room: int | None, changes: list[MemoryPlan]) -> dict[str, Any]:
    return {
        **_numbers(found),
        "free_bytes": room,
        "fits": None if room is None else found.fits(room),
        "would_fit": [_numbers(change) for change in changes],
    }


def _numbers(found: MemoryPlan) -> dict[str, Any]:
    derived = ("final_bytes", "load_peak_bytes", "device_peak_bytes", "host_peak_bytes")
    return {**asdict(found), **{name: getattr(found, name) for name in derived}}
