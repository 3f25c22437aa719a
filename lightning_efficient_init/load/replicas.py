"""Equal models on several ranks: each byte of a checkpoint is read once on a node, and shared.

Every rank of a node plans the same segments. Each reads its share, an even run of bytes in the order of the files,
straight into its own parameters; the memory itself is then broadcast to the others. That goes in rounds: threads read
for the next ones while one is shared. Before a round is shared, all ranks exchange whether they have read theirs: one
that cannot stops the others before any of them waits in a broadcast. The thread that has called does the sharing, so
that all ranks call the same collectives in the same order, whatever their other threads are at. (1 GB that was not
cached, two processes on two cores: 0.5 to 0.6 s of 0.8 s of sharing went by while threads were reading.)

`Replicas.agree` is the only rendezvous there is. Whatever a rank is up to inside, its next exchange of outcomes meets
the next one of the others, so a failure anywhere reaches all of them at once, with its own type and message.
"""

from __future__ import annotations

import hashlib
import platform
import threading
import weakref
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed
from torch.nn import Module
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_efficient_init.load.bind import walk
from lightning_efficient_init.load.extents import PAGE_BYTES
from lightning_efficient_init.rendezvous import agree, exchange
from lightning_efficient_init.sharding import has_parts
from lightning_efficient_init.sinks import Segment

_SMALL_BYTES = 1 << 20  # what is smaller travels together
_BATCH_BYTES = 8 << 20
_ROUND_BYTES = 128 << 20  # of all ranks together

_replicated: weakref.WeakKeyDictionary[Module, distributed.ProcessGroup] = weakref.WeakKeyDictionary()
_node_groups: weakref.WeakKeyDictionary[distributed.ProcessGroup, distributed.ProcessGroup | None] = (
    weakref.WeakKeyDictionary()  # None where all ranks are on one node: a group must not keep itself alive here
)


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """Segments that are read at the same time, and shared when all ranks have read theirs.

    Attributes:
        reads: What this rank reads.
        shares: What each rank of the node reads for all of them, by rank.
    """

    reads: Sequence[Segment]
    shares: Sequence[Sequence[Segment]] = ()

    def names(self) -> list[str]:
        """The tensors that get something on any rank, in an order that is the same on all."""
        return list(dict.fromkeys(segment.name for part in (*self.shares, self.reads) for segment in part))


class Replicas:
    """Ranks that hold equal tensors: what one of them reads, all of its node get.

    Args:
        group: All ranks that hold them.
        whole: The ranks that load together, of which these are some: what these save is counted there.
    """

    def __init__(self, group: distributed.ProcessGroup, whole: Replicas | None = None) -> None:
        self._group = group
        self._saved_bytes: list[int] = [] if whole is None else whole._saved_bytes

    def agree(self) -> AbstractContextManager[None]:
        """What is raised inside on one rank is raised on all; a context for all ranks of the group to enter."""
        return agree(self._group)

    def confirm(self, work: object) -> Replicas | None:
        """These replicas, if every rank is about to do the same ``work`` (compared by ``repr``); else None."""
        digest = hashlib.sha256(repr(work).encode()).digest()
        return self if len(set(exchange(digest, self._group))) == 1 else None

    def rounds(self, segments: Sequence[Segment], *, is_divisible: bool) -> list[Round]:
        """Divide the reading of segments, which are the same on every rank: each byte is read by one rank of the node.

        Args:
            segments: What every rank needs, on one device.
            is_divisible: Whether some of it may be read and shared before the rest is.

        Returns:
            What is read and shared one after the other; as many on each rank, also where nodes are not of one size.
        """
        node = _node_group(self._group)
        reach = _device_types(node)
        common = [s for s in segments if s.memory.device.type in reach and not s.row_bytes]
        rest = [s for s in segments if s.memory.device.type not in reach or s.row_bytes]
        shares = divide(common, node.size())
        num_bytes = num_segment_bytes(common)
        self._saved_bytes.append(num_bytes - num_segment_bytes(shares[node.rank()]))
        count = max(1, -(-num_bytes // _ROUND_BYTES)) if is_divisible else 1
        rounds = list(zip(*(divide(share, count) for share in shares), strict=True))
        reads = [list(parts[node.rank()]) for parts in rounds]
        reads[-1] += rest  # which nobody waits for
        return [Round(*both) for both in zip(reads, rounds, strict=True)]

    def share(self, done: Round) -> None:
        """Give what each rank of the node has read in a round to the others; all of them are done with reading it."""
        node = _node_group(self._group)
        if node.size() > 1:
            _broadcast(done.shares, node)

    def num_bytes_read(self, num_bytes: int) -> int:
        """What this rank read where ``num_bytes`` were needed, since this was last asked."""
        saved = sum(self._saved_bytes)
        self._saved_bytes.clear()
        return num_bytes - saved

    def gather(self, num_bytes: int) -> tuple[int, ...]:
        """Every rank's number."""
        return tuple(exchange(num_bytes, self._group))


def agreed(replicas: Replicas | None) -> AbstractContextManager[None]:
    """`Replicas.agree`, where there are any."""
    return nullcontext() if replicas is None else replicas.agree()


def replicas_over(group: distributed.ProcessGroup | None) -> Replicas | None:
    """The ranks of ``group``, if it is more than one."""
    return None if group is None or group.size() == 1 else Replicas(group)


def replicate(module: Module, group: distributed.ProcessGroup) -> None:
    """Note that every rank of ``group`` has an equal ``module``: loading is for all of them to do together."""
    _replicated[module] = group


@contextmanager
def replicating(group: distributed.ProcessGroup) -> Iterator[None]:
    """Note the same of every module that gets a parameter inside, in the same thread."""
    thread = threading.get_ident()

    def note(module: Module, *_: object) -> None:
        if threading.get_ident() == thread:
            replicate(module, group)

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


def replicas_of(model: Module) -> Replicas | None:
    """The other ranks' copies or parts of ``model``: DDP's, FSDP's, and what `replicate` was told of."""
    if not distributed.is_initialized():
        return None
    for _, module in walk(model):
        if isinstance(module, DistributedDataParallel):
            return replicas_over(module.process_group)
        if module in _replicated:
            group = _replicated[module]
            return replicas_over(group) if _is_alive(group) else None
    return replicas_over(distributed.group.WORLD) if has_parts(model) else None


def divide(segments: Sequence[Segment], count: int) -> list[list[Segment]]:
    """Cut segments into ``count`` shares of about the same number of bytes, each a run in the order of the files.

    Bytes that several segments need are in one share. Cuts fall on pages of the file, and between elements.
    """
    ordered = sorted((s for s in segments if s.num_bytes), key=lambda s: (s.file, s.offset))
    cuts = _cuts(ordered, count)
    shares: list[list[Segment]] = [[] for _ in range(count)]
    for segment in ordered:
        share, start = bisect_right(cuts, (segment.file, segment.offset)), 0
        for file, position in cuts[share:]:
            end = (position - segment.offset) // segment.dtype.itemsize
            if file != segment.file or end >= segment.numel:
                break
            _append(shares[share], segment, start, end)
            share, start = share + 1, end
        _append(shares[share], segment, start, segment.numel)
    return shares


def num_segment_bytes(segments: Sequence[Segment]) -> int:
    """Bytes of the files that segments cover, each counted once."""
    return sum(end - start for _, start, end in _runs(sorted(segments, key=lambda s: (s.file, s.offset))))


def _append(share: list[Segment], segment: Segment, start: int, end: int) -> None:
    if (start, end) == (0, segment.numel):
        share.append(segment)
    elif end > start:
        itemsize = segment.dtype.itemsize
        share.append(segment.cut(segment.offset + start * itemsize, start * itemsize, (end - start) * itemsize))


def _runs(ordered: Sequence[Segment]) -> Iterator[tuple[str, int, int]]:
    """File, start and end of runs that do not overlap and together cover the segments."""
    file, reached = "", 0
    for segment in ordered:
        if segment.file != file:
            file, reached = segment.file, 0
        end = segment.offset + segment.num_bytes
        if end > reached:
            yield file, max(segment.offset, reached), end
            reached = end


def _cuts(ordered: Sequence[Segment], count: int) -> list[tuple[str, int]]:
    """Where, as file and position, each share but the first one starts."""
    total = num_segment_bytes(ordered)
    goals = [total * number // count for number in range(1, count)]
    cuts: list[tuple[str, int]] = []
    done = 0
    for file, start, end in _runs(ordered):
        while len(cuts) < len(goals) and done + end - start > goals[len(cuts)]:
            position = start + goals[len(cuts)] - done
            cuts.append((file, max(start, position - position % PAGE_BYTES)))
        done += end - start
    return [*cuts, *[("\U0010ffff", 0)] * (len(goals) - len(cuts))]  # empty models: nothing for the later ones


@torch.inference_mode()  # which may write to inference tensors as well as to others
def _broadcast(shares: Sequence[Sequence[Segment]], group: distributed.ProcessGroup) -> None:
    """Give each share, which the rank of that number has in its memory, to the others."""
    work: list[Any] = []
    for rank, share in enumerate(shares):
        source = distributed.get_global_rank(group, rank)
        small: list[torch.Tensor] = []
        for segment in share:
            raw = segment.dest_bytes
            if raw.numel() < _SMALL_BYTES:
                small.append(raw)
            else:
                work.append(distributed.broadcast(raw, source, group=group, async_op=True))
        for batch in _batches(small):
            _broadcast_together(batch, source, group)
    for broadcast in work:
        broadcast.wait()


def _batches(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """On one device each, a few MiB at a time."""
    waiting: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    num_bytes: dict[torch.device, int] = defaultdict(int)
    for tensor in tensors:
        device = tensor.device
        waiting[device].append(tensor)
        num_bytes[device] += tensor.numel()
        if num_bytes[device] >= _BATCH_BYTES:
            yield waiting.pop(device)
            num_bytes[device] = 0
    yield from waiting.values()


def _broadcast_together(tensors: list[torch.Tensor], source: int, group: distributed.ProcessGroup) -> None:
    flat = torch.cat(tensors)
    distributed.broadcast(flat, source, group=group)
    if distributed.get_rank() != source:
        torch._foreach_copy_(tensors, list(flat.split([t.numel() for t in tensors])))


def _node_group(group: distributed.ProcessGroup) -> distributed.ProcessGroup:
    """The ranks of ``group`` on this node, as a group; all ranks ask at the same time."""
    if group not in _node_groups:
        nodes = exchange(platform.node(), group)
        members = [rank for rank, node in enumerate(nodes) if node == platform.node()]
        everybody = len(members) == group.size()
        ranks = [distributed.get_global_rank(group, rank) for rank in members]
        _node_groups[group] = None if everybody else distributed.new_group(ranks, use_local_synchronization=True)
    return _node_groups[group] or group


def _device_types(group: distributed.ProcessGroup) -> set[str]:
    """The kinds of devices whose tensors a group can send, from a configuration such as ``cpu:gloo,cuda:nccl``."""
    config = distributed.get_backend_config(group)
    return {part.split(":")[0] for part in config.split(",")}


def _is_alive(group: distributed.ProcessGroup) -> bool:
    return group in distributed.distributed_c10d._world.pg_map
