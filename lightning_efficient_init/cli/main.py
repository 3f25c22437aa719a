"""Which command, and how errors end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from lightning_efficient_init.cli import bench, inspect, plan
from lightning_efficient_init.errors import EfficientInitError

_COMMANDS = {"inspect": inspect, "plan": plan, "bench": bench}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows the program's name; by default that of this process.

    Returns:
        The exit status: 0 if it did what was asked, 1 if it could not (the reason is on standard error).
    """
    options = parser().parse_args(arguments)
    options.is_program = arguments is None  # then this process has done nothing but import
    try:
        status: int = _COMMANDS[options.command].run(options)
        return status
    except EfficientInitError as error:
        print(f"efficient-init {options.command}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser() -> argparse.ArgumentParser:
    """What the command line understands."""
    whole = argparse.ArgumentParser(prog="efficient-init", description="Checkpoints and models: look, plan, measure.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in _COMMANDS.items():
        text = (command.__doc__ or "").splitlines()[0]
        command.add_arguments(commands.add_parser(name, help=text, description=text))
    return whole
