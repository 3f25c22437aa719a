"""Replay: run recorded operations, in order, for the memory that is wanted and no more.

`operations_for` has cut the recording down to the operations that matter. Memory comes into being with an operation's
first write, and goes with the last operation that needs it, unless it was asked for. Random operations find their
place in their generator's stream through a `Cursor`, so it does not matter which others run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lightning_efficient_init.deferred.arguments import alike
from lightning_efficient_init.deferred.operators import traits_of
from lightning_efficient_init.deferred.recipe import Op, Recipe, Ref, operations_for
from lightning_efficient_init.deferred.streams import Cursor, Draw, borrowed, default_generator, lock
from lightning_efficient_init.deferred.wording import refusal

aten = torch.ops.aten


def evaluate(
    recipes: Iterable[Recipe],
    *,
    device: torch.device | None = None,
    deliver: Callable[[Recipe, torch.UntypedStorage], None] | None = None,
) -> dict[Recipe, torch.UntypedStorage]:
    """The memory of ``recipes`` with its values. Generators are left as they were.

    Args:
        recipes: Whose memory.
        device: Where to run what was recorded for a default device; the recorded device unless given.
        deliver: Called with each recipe's memory as soon as no other recipe needs it.

    Returns:
        Real storages of ``recipe.num_bytes`` each, on ``device``; empty where ``deliver`` takes them.
    """
    memory: dict[Recipe, torch.UntypedStorage] = {}
    wanted = list(recipes)
    with Replay(device) as replay:
        replay.run(operations_for(wanted), wanted, deliver or memory.__setitem__)
    return memory


class Replay:
    """Memory and generators in the course of one replay.

    Args:
        device: Run everything here, with the generator of this device; None: where it was recorded for.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._memory: dict[Recipe, torch.UntypedStorage] = {}
        self._cursors: dict[torch.Generator, Cursor] = {}
        self._unread: Set[Recipe] = frozenset()  # those of several results of an operation that nothing needs
        self._stack = ExitStack()

    def __enter__(self) -> Replay:
        self._stack.enter_context(lock)
        self._stack.enter_context(torch._C.DisableTorchFunction())
        self._stack.enter_context(_disable_current_modes())
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(torch._C._DisableAutocast())  # which has cast already, when this was recorded
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(
        self, ops: list[Op], wanted: Iterable[Recipe], deliver: Callable[[Recipe, torch.UntypedStorage], None]
    ) -> None:
        """Run ``ops``, free memory with its last use, and deliver that of ``wanted`` instead."""
        waiting = dict.fromkeys(wanted)
        expiring = _last_uses(ops)
        for op in ops:
            last = expiring.get(op.order, ())
            self._unread = {recipe for recipe in last if recipe not in waiting} if len(op.outs) > 1 else frozenset()
            self._run(op)
            for recipe in last:
                storage = self._memory.pop(recipe, None)
                if recipe in waiting and storage is not None:
                    del waiting[recipe]
                    deliver(recipe, storage)
        for recipe in waiting:  # nothing ever wrote them
            deliver(recipe, self.memory(recipe))
            del self._memory[recipe]

    def memory(self, recipe: Recipe) -> torch.UntypedStorage:
        """The memory of ``recipe``, allocated at its first use."""
        storage = self._memory.get(recipe)
        if storage is None:
            storage = torch.UntypedStorage(recipe.num_bytes, device=self._place(recipe.device))
            self._memory[recipe] = storage
        elif storage.nbytes() < recipe.num_bytes:
            storage.resize_(recipe.num_bytes)
        return storage

    @staticmethod
    def run_alone(op: Op, generator: torch.Generator) -> None:
        """Run ``op`` on scratch, drawing from ``generator`` as it stands."""
        replay = Replay(generator.device)
        target = op.args[0].recipe if traits_of(op.func).is_fill and isinstance(op.args[0], Ref) else None
        reads = [recipe for recipe in op.reads if recipe is not target]
        inputs: dict[Recipe, torch.UntypedStorage] = {}
        with replay:  # leaves the generator as it found it
            replay.run(operations_for(reads, op.order), reads, inputs.__setitem__)
        replay._memory = inputs
        with replay:
            replay._call(op, generator)

    def _run(self, op: Op) -> None:
        if op.draw is None:
            self._call(op, None)
            return
        generator, draw = self._source(op)
        cursor = self._cursor(generator)
        cursor.seek(draw)
        self._call(op, generator)
        cursor.passed(draw)

    def _source(self, op: Op) -> tuple[torch.Generator, Draw]:
        """The generator and the place in its stream, here or on the device that was asked for."""
        draw: Draw = op.draw
        recorded = draw.stream.generator
        device = self._place(op.device)
        if device == op.device or recorded is not default_generator(op.device):
            return recorded, draw
        return default_generator(device), Draw(draw.stream.on(device), draw.index)

    def _cursor(self, generator: torch.Generator) -> Cursor:
        if generator not in self._cursors:
            self._stack.enter_context(borrowed(generator))
            self._cursors[generator] = Cursor(generator)
        return self._cursors[generator]

    def _call(self, op: Op, generator: torch.Generator | None) -> None:
        if op.func is aten.empty_strided.default:
            self.memory(op.writes[0])
            return
        args = tuple(self._real(arg) for arg in op.args)
        kwargs = {name: self._real(arg) for name, arg in op.kwargs.items()}
        if "device" in kwargs:
            kwargs["device"] = self._place(op.device)
        if kwargs.get("generator") is not None and generator is not None:
            kwargs["generator"] = generator
        if op.default_dtype == torch.get_default_dtype() or traits_of(op.func).is_fill:
            self._store(op, op.func(*args, **kwargs))
        else:
            with _default_dtype(op.default_dtype):
                self._store(op, op.func(*args, **kwargs))

    def _store(self, op: Op, result: Any) -> None:
        results = result if isinstance(result, tuple | list) else (result,)
        for ref, out in zip(op.outs, results, strict=False):
            if ref is None or ref.recipe in self._unread:  # statistics of norms have another dtype without values
                continue
            if (out.dtype, tuple(out.shape)) != (ref.dtype, ref.size):
                reason = "with values its result has another shape or dtype than without"
                raise refusal(str(op.func), reason)
            if out.stride() != ref.stride or out.storage_offset() != ref.offset:
                laid_out = ref.on(torch.UntypedStorage(ref.recipe.num_bytes, device=out.device))
                out = laid_out.copy_(out)  # noqa: PLW2901 (the kernel's layout is not the one recorded)
            self._memory[ref.recipe] = out.untyped_storage()

    def _real(self, arg: Any) -> Any:
        if isinstance(arg, Ref):
            return arg.on(self.memory(arg.recipe))
        if isinstance(arg, torch.Tensor):
            return arg if arg.dim() == 0 else arg.to(self._device) if self._device is not None else arg
        if isinstance(arg, list | tuple):
            return alike(arg, [self._real(item) for item in arg])
        return arg

    def _place(self, device: torch.device) -> torch.device:
        return device if self._device is None else self._device


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The default dtype as it was in a recording; for no longer than needed, as it is that of all threads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _last_uses(ops: list[Op]) -> dict[int, list[Recipe]]:
    """Order of an operation to the recipes that nothing needs after it."""
    expiring: dict[int, list[Recipe]] = {}
    seen: set[Recipe] = set()
    for op in reversed(ops):
        for recipe in (*op.reads, *op.writes):
            if recipe not in seen:
                seen.add(recipe)
                expiring.setdefault(op.order, []).append(recipe)
    return expiring
