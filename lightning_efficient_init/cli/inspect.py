"""Show what a checkpoint holds, from its headers alone: tensors, ties, hyperparameters, optimizer state."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich.console import Console

from lightning_efficient_init.checkpoint import Entry
from lightning_efficient_init.checkpoint.wording import show
from lightning_efficient_init.cli.console import console, dtype_name, jsonable, plain, print_json, size, table
from lightning_efficient_init.contents import Contents, Part, inspect_checkpoint

_MAX_LEVELS = 32  # of names; what lies deeper is one name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("path", help="a checkpoint: file or folder, in any format that load_checkpoint reads")
    parser.add_argument("--depth", type=_levels, help="levels of names to show; by default all, repeated blocks once")
    parser.add_argument("--json", action="store_true", help="everything, every tensor included, as JSON")


def _levels(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of levels, 1 or more, found {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Print a summary, or JSON."""
    contents = inspect_checkpoint(options.path)
    if options.json:
        print_json(_as_json(contents))
        return 0
    out = console()
    _print_overview(contents, out)
    for part in contents.weights:
        _print_tensors(part, contents, options.depth, out)
    _print_shared(contents, out)
    _print_values("Hyperparameters", contents.hyperparameters, out)
    _print_rest(contents, out)
    return 0


def _print_overview(contents: Contents, out: Console) -> None:
    overview = table("", "")
    overview.show_header = False
    num_bytes = sum(contents.files.values())
    overview.add_row("path", plain(contents.path))
    overview.add_row("format", plain(contents.format))
    overview.add_row("files", f"{len(contents.files)}, {size(num_bytes)}")
    for part in contents.weights:
        where = "" if part.key is None else f" under '{part.key}'"
        overview.add_row(
            "weights", plain(f"{len(part.tensors)} tensors, {size(part.num_bytes)}{where}: {_dtypes(part)}")
        )
    if not contents.weights:
        overview.add_row("weights", "none found")
    states = [part for part in contents.parts if part.kind == "optimizer state"]
    amount = "; ".join(f"{size(p.num_bytes)} in {len(p.tensors)} tensors under '{p.key}'" for p in states)
    overview.add_row("optimizer", plain(amount or "no state"))
    out.print(overview)


def _dtypes(part: Part) -> str:
    amounts: Counter[str] = Counter()
    for entry in set(part.tensors.values()):  # tied tensors are equal entries
        amounts[dtype_name(entry.dtype)] += entry.numel
    return ", ".join(f"{numel:,} x {dtype}" for dtype, numel in amounts.most_common())


@dataclass(slots=True)
class _Node:
    """One level of names: a module, or a tensor."""

    entry: Entry | None = None
    children: dict[str, _Node] = field(default_factory=dict)
    num_tensors: int = 0
    num_bytes: int = 0
    kind: int = 0  # equal for nodes with the same names, dtypes and shapes below them
    is_folded: bool = False


def _print_tensors(part: Part, contents: Contents, depth: int | None, out: Console) -> None:
    tied = {name: group[0] for group in contents.ties for name in group[1:] if name in part.tensors}
    root = _tree(part, tied)
    rows = table("tensor", "dtype", "shape", "size", numbers=("size",))
    for line in _lines(root, depth):
        node, label = line.node, plain("  " * line.level + line.label)
        if node.entry is None:
            rows.add_row(label, "", f"{node.num_tensors} tensors", size(node.num_bytes))
        else:
            num_bytes = f"= {tied[line.name]}" if line.name in tied else size(node.num_bytes)
            rows.add_row(label, dtype_name(node.entry.dtype), str(list(node.entry.shape)), plain(num_bytes))
    out.print()
    out.print(rows)


def _tree(part: Part, tied: Mapping[str, str]) -> _Node:
    """All names as a tree; the bytes of tied tensors count under the first of their names."""
    root = _Node()
    for name, entry in part.tensors.items():
        num_bytes = 0 if name in tied else entry.num_bytes
        path = [root]
        for segment in name.split(".", _MAX_LEVELS - 1):
            path.append(path[-1].children.setdefault(segment, _Node()))
        path[-1].entry = entry
        for node in path:
            node.num_tensors += 1
            node.num_bytes += num_bytes
    _number_kinds(root, {})
    return root


def _number_kinds(node: _Node, kinds: dict[object, int]) -> int:
    below = tuple((name, _number_kinds(child, kinds)) for name, child in node.children.items())
    itself = None if node.entry is None else (node.entry.dtype, node.entry.shape)
    node.kind = kinds.setdefault((itself, below), len(kinds))
    return node.kind


class _Line(NamedTuple):
    """One line of the tree: how it is labelled, at which level, and the full name of its node, or of the first."""

    label: str
    level: int
    name: str
    node: _Node


def _lines(node: _Node, depth: int | None, level: int = 0, prefix: str = "") -> Iterator[_Line]:
    for first, label, child in _folded(node.children):
        below, inner = _only_way(child)
        yield _Line(label + below, level, prefix + first + below, inner)
        if depth is None or level + 1 < depth:
            yield from _lines(inner, depth, level + 1, f"{prefix}{first}{below}.")


def _only_way(node: _Node) -> tuple[str, _Node]:
    """Down to where there is a tensor, or a choice."""
    way = ""
    while len(node.children) == 1 and node.entry is None and not node.is_folded:
        ((segment, node),) = node.children.items()
        way += f".{segment}"
    return way, node


def _folded(children: Mapping[str, _Node]) -> Iterator[tuple[str, str, _Node]]:
    """Name, label and node of each child; numbered neighbors that are alike become one."""
    for run in _runs(children):
        first = children[run[0]]
        if len(run) == 1:
            yield run[0], run[0], first
        else:
            num_bytes = sum(children[name].num_bytes for name in run)
            total = _Node(first.entry, first.children, first.num_tensors * len(run), num_bytes, is_folded=True)
            yield run[0], f"{run[0]} to {run[-1]} ({len(run)} alike)", total


def _runs(children: Mapping[str, _Node]) -> list[list[str]]:
    runs: list[list[str]] = []
    for name, node in children.items():
        last = runs[-1][-1] if runs else ""
        if last and _continues(last, name) and node.kind == children[last].kind:
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs


def _continues(name: str, following: str) -> bool:
    return name.isdecimal() and following.isdecimal() and int(following) == int(name) + 1


def _print_shared(contents: Contents, out: Console) -> None:
    for title, groups in (("Tied", contents.ties), ("Overlapping views of one storage", contents.views)):
        if groups:
            out.print(f"\n{title}")
        for group in groups:
            out.print(plain("  " + " = ".join(group) if groups is contents.ties else "  " + ", ".join(group)))


def _print_values(title: str, values: Mapping[str, Any], out: Console) -> None:
    if values:
        out.print(f"\n{title}")
    for name, value in values.items():
        out.print(plain(f"  {name}: {show(value)}"))


def _print_rest(contents: Contents, out: Console) -> None:
    rest = [part for part in contents.parts if part.kind != "weights"]
    if rest:
        out.print("\nAlso in it")
    for part in rest:
        amount = f"{part.kind}, {len(part.tensors)} tensors, {size(part.num_bytes)}"
        out.print(plain(f"  {part.key}: {amount if part.tensors else show(part.value)}"))


def _as_json(contents: Contents) -> dict[str, Any]:
    return {
        "path": contents.path,
        "format": contents.format,
        "files": dict(contents.files),
        "parts": [_part_as_json(part) for part in contents.parts],
        "ties": [list(group) for group in contents.ties],
        "views": [list(group) for group in contents.views],
        "hyperparameters": jsonable(contents.hyperparameters),
        "has_optimizer_state": contents.has_optimizer_state,
    }


def _part_as_json(part: Part) -> dict[str, Any]:
    result: dict[str, Any] = {"key": part.key, "kind": part.kind, "num_bytes": part.num_bytes}
    if part.tensors:
        result["tensors"] = {name: _entry_as_json(entry) for name, entry in part.tensors.items()}
    if part.kind == "values":
        result["value"] = jsonable(part.value)
    return result


def _entry_as_json(entry: Entry) -> dict[str, Any]:
    return {
        "dtype": dtype_name(entry.dtype),
        "shape": list(entry.shape),
        "stride": list(entry.stride),
        "num_bytes": entry.num_bytes,
        "file": entry.file,
        "offset": entry.offset,
        "num_chunks": len(entry.chunks) or 1,
    }
