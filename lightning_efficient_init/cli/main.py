"""Which command, and how errors end."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_efficient_init.cli import bench, inspect, plan
from lightning_efficient_init.errors import EfficientInitError, UnsafeCheckpointError, UsageError

_COMMANDS = {"inspect": inspect, "plan": plan, "bench": bench}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: What follows the program's name; by default that of this process.

    Returns:
        The exit status: 0 if it did what was asked, 1 if it could not (the reason is on standard error), 130 if it was
        interrupted.

    Raises:
        SystemExit: With status 2 where ``arguments`` are none of the command line, with 0 after ``--help``.
    """
    options = parser().parse_args(arguments)
    options.is_program = arguments is None  # then this process has done nothing but import
    try:
        with _output():
            status: int = _COMMANDS[options.command].run(options)
        return status
    except BrokenPipeError:  # whoever reads the output has seen enough
        _drop_output()
        return 0
    except KeyboardInterrupt:
        _drop_output()
        return 130
    except UnsafeCheckpointError as error:
        return _refused(
            options.command,
            f"{error} Commands never run code from a file; load_checkpoint in Python can be allowed to.",
        )
    except EfficientInitError as error:
        return _refused(options.command, error)
    except OSError as error:  # a full disk, say
        _drop_output()
        return _refused(options.command, error)


def _refused(command: str, error: object) -> int:
    print(f"efficient-init {command}: {error}", file=sys.stderr)  # noqa: T201
    return 1


@contextmanager
def _output() -> Iterator[None]:
    """Standard output takes characters that its encoding lacks, and has written everything at the end."""
    out = sys.stdout
    if out is None:
        raise UsageError("expected an open standard output, found a closed one. Send it to a file, or to /dev/null.")
    if not isinstance(out, io.TextIOWrapper):
        yield
        return
    errors = out.errors
    out.reconfigure(errors="backslashreplace")
    try:
        yield
        out.flush()
    finally:
        out.reconfigure(errors=errors)


def _drop_output() -> None:
    """What could not be written is not tried again when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parser() -> argparse.ArgumentParser:
    """What the command line understands."""
    whole = argparse.ArgumentParser(prog="efficient-init", description="Checkpoints and models: look, plan, measure.")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in _COMMANDS.items():
        text = (command.__doc__ or "").splitlines()[0]
        command.add_arguments(commands.add_parser(name, help=text, description=text))
    return whole
