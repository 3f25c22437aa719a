"""Random numbers: which of a generator's draws belongs to which recorded operation.

Nothing is drawn while recording, yet every operation has to get the numbers that it would have got, and the generator
has to end where it would have ended. A `Stream` is the sequence of random operations since a known state. Where it
stands when operation ``i`` starts follows from the operations before: for ``uniform_`` and ``normal_`` on the CPU the
number of 32-bit draws is known, and MT19937 advances by arithmetic (mersenne.py); on counter-based (CUDA) generators
the increment follows from the number of elements. Where this build of PyTorch does not agree, an operation is measured;
whatever else there is runs on scratch memory.

While recording, the real CPU generator holds a *token*: a state that no seed leads to and that names the place in the
stream. So code inside that saves and restores the state (``fork_rng``), seeds it, or draws behind our back is noticed
and understood, also when it ends in another thread's recording.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import _disable_current_modes

from lightning_efficient_init.deferred import mersenne
from lightning_efficient_init.deferred.arguments import CPU
from lightning_efficient_init.deferred.operators import traits_of
from lightning_efficient_init.deferred.recipe import Op, Ref

aten = torch.ops.aten
lock = threading.RLock()  # generators are shared between threads

_TOKEN = struct.Struct("4Q")  # in the place of the first words of the state of MT19937
_TOKEN_START = 24
_TOKEN_MARK = 0x1E1E1E1E
_SINGLE_DRAW = (torch.float32, torch.float16, torch.bfloat16)
_NEVER_GENERATORS = frozenset({Ref, int, float, type(None)})  # torch takes 0.5 us to say that these are none

State: TypeAlias = torch.Tensor | tuple[int, int]  # as `Generator.get_state` gives it; or seed and offset, on CUDA


@dataclass(slots=True, eq=False)
class Stream:
    """Random operations of one generator, in order, from a known state on.

    Attributes:
        generator: Whose.
        states: State before the operation of that index, where it is known.
        parent: The place in another stream from which this one goes on; instead of ``states[0]``.
        ops: The operations.
        before: The end of an earlier recording that left the generator in ``states[0]``.
        elsewhere: States of other devices' generators when the stream began, for a replay there.
    """

    generator: torch.Generator
    states: dict[int, State] = field(default_factory=dict)
    parent: Draw | None = None
    ops: list[Op] = field(default_factory=list)
    before: Draw | None = None
    elsewhere: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    _draws: list[int | None] = field(default_factory=list)
    _twins: dict[torch.device, Stream] = field(default_factory=dict)

    def num_draws(self, index: int) -> int | None:
        """How many 32-bit draws an operation takes from MT19937, None if only running it can tell."""
        while len(self._draws) <= index:
            self._draws.append(num_draws(self.ops[len(self._draws)]))
        return self._draws[index]

    def on(self, device: torch.device) -> Stream:
        """The same operations, drawing from the generator of another device."""
        if device not in self._twins:
            generator = default_generator(device)
            origin = self.parent or self.before
            if origin is not None:
                twin = Stream(generator, parent=Draw(origin.stream.on(device), origin.index))
            else:
                twin = Stream(generator, states={0: self._start_on(device, generator)})
            twin.ops, twin._draws = self.ops, self._draws
            self._twins[device] = twin
        return self._twins[device]

    def _start_on(self, device: torch.device, generator: torch.Generator) -> torch.Tensor:
        """The state when this stream began; where nobody looked (CUDA was not in use) it is the fresh seed's."""
        if device in self.elsewhere:
            return self.elsewhere[device]
        with borrowed(self.generator):
            set_state(self.generator, self.states[0])
            seed = self.generator.initial_seed()
        with borrowed(generator):
            return generator.manual_seed(seed).get_state()


@dataclass(slots=True)
class Draw:
    """A place in a stream: before its operation ``index``."""

    stream: Stream
    index: int


class Places:
    """Where every generator stands in the course of recordings. One instance for the process."""

    def __init__(self) -> None:
        self._tokens: dict[int, Draw] = {}
        self._latest: tuple[bytes, Draw] | None = None  # of the tokens: nearly always the one to be found
        self._current: dict[torch.Generator, tuple[bytes | tuple[int, int], Draw]] = {}
        self._last: tuple[torch.Tensor, Draw] | None = None
        self._count = 0
        self._users = 0

    def place(self, generator: torch.Generator, state: State | None = None) -> Draw:
        """Where ``generator`` stands, which is at ``state``."""
        state = state_of(generator) if state is None else state
        if isinstance(state, torch.Tensor) and _is_on_cpu(generator):
            found = ctypes.string_at(state.data_ptr() + _TOKEN_START, _TOKEN.size)
            if self._latest is not None and found == self._latest[0]:
                return self._latest[1]
            token = _read_token(found)
            if token is not None and token in self._tokens:
                return self._tokens[token]
        known = self._current.get(generator)
        if known is not None and known[0] == _mark(state):
            return known[1]
        return Draw(self._begin(generator), 0)

    def _begin(self, generator: torch.Generator) -> Stream:
        """A stream from a state that is none of ours."""
        state = generator.get_state()
        stream = Stream(generator, states={0: state})
        if generator is torch.default_generator and torch.version.cuda is not None:
            if self._last is not None and torch.equal(self._last[0], state):
                stream.before = self._last[1]
            if torch.cuda.is_initialized():
                stream.elsewhere = {g.device: g.get_state() for g in torch.cuda.default_generators}
        return stream

    def record(self, op: Op, generator: torch.Generator) -> None:
        """Let ``op`` draw from ``generator`` without running it; the generator moves on (on the CPU: in name only)."""
        state = state_of(generator)
        here = self.place(generator, state)
        stream = here.stream
        if here.index != len(stream.ops):  # somebody went back in time: a branch
            stream = Stream(generator, parent=here)
        index = len(stream.ops)
        op.draw = Draw(stream, index)
        stream.ops.append(op)
        if isinstance(state, torch.Tensor) and _is_on_cpu(generator):
            self._hold(Draw(stream, index + 1), generator, state)
        else:
            self._move(op, Draw(stream, index + 1), generator, state)

    def run(self, op: Op, generator: torch.Generator, call: Callable[[], Any]) -> Any:
        """Run ``op`` for real, by ``call``, with the numbers that are its due."""
        here = self.place(generator)
        self.settle(generator)
        stream = here.stream
        if here.index != len(stream.ops):
            stream = Stream(generator, parent=here)
        op.draw = Draw(stream, len(stream.ops))
        stream.states[op.draw.index] = generator.get_state()
        out = call()
        stream.ops.append(op)
        self.adopt(generator, Draw(stream, len(stream.ops)))
        return out

    def settle(self, generator: torch.Generator) -> None:
        """Set ``generator`` to its true state."""
        draw = self.place(generator)
        set_state(generator, state_at(draw))
        self._current[generator] = (_mark(state_of(generator)), draw)

    def adopt(self, generator: torch.Generator, draw: Draw) -> None:
        """Say that the present, true state of ``generator`` is the one at ``draw``."""
        draw.stream.states[draw.index] = state = state_of(generator)
        self._current[generator] = (_mark(state), draw)

    def enter(self) -> None:
        """A recording starts."""
        with lock:
            self._users += 1

    def leave(self, generators: set[torch.Generator]) -> None:
        """A recording that drew from ``generators`` ends: they stand where eager construction leaves them.

        If that cannot be told, for want of memory say, they stand at the last place that is known.
        """
        with lock:
            try:
                for generator in generators:
                    self.settle(generator)
                    if generator is torch.default_generator and torch.version.cuda is not None:
                        self._last = (generator.get_state(), self._current[generator][1])
            except BaseException:
                for generator in generators:
                    set_state(generator, _known_before(self.place(generator)))
                raise
            finally:
                self._users -= 1
                if not self._users:
                    self._tokens.clear()
                    self._latest = None
                    self._current.clear()

    def _hold(self, draw: Draw, generator: torch.Generator, state: torch.Tensor) -> None:
        """Let ``generator``, which is at ``state``, hold a token for ``draw``."""
        self._count += 1
        token = _TOKEN.pack(*_token(self._count))
        ctypes.memmove(state.data_ptr() + _TOKEN_START, token, _TOKEN.size)  # a fifth of a tensor operation's time
        generator.set_state(state)
        self._tokens[self._count] = draw
        self._latest = token, draw

    def _move(self, op: Op, after: Draw, generator: torch.Generator, state: State) -> None:
        """Advance a counter-based generator, which is at ``state``, for real: its state costs nothing."""
        stream = after.stream
        stream.states.setdefault(after.index - 1, state)
        increment = None if isinstance(state, torch.Tensor) else _increment(op, generator)
        if isinstance(state, torch.Tensor) or increment is None:
            set_state(generator, state_at(after))
            self.adopt(generator, after)
        else:
            state = state[0], state[1] + increment
            generator.set_offset(state[1])
            stream.states[after.index] = state
            self._current[generator] = (state, after)


places = Places()


def _read_token(found: bytes) -> int | None:
    words = _TOKEN.unpack(found)
    return words[1] if words == _token(words[1]) else None


def _token(count: int) -> tuple[int, int, int, int]:
    return _TOKEN_MARK, count, 0xFFFFFFFF - count, _TOKEN_MARK  # words of the state have 32 bits


def state_of(generator: torch.Generator) -> State:
    """Where ``generator`` stands; on CUDA in a tenth of the time that a tensor takes."""
    if not _is_on_cpu(generator) and generator.device.type == "cuda":  # a type takes five times as long
        return generator.initial_seed(), generator.get_offset()
    return generator.get_state()


def _is_on_cpu(generator: torch.Generator) -> bool:
    return generator is torch.default_generator or generator.device == CPU


def set_state(generator: torch.Generator, state: State) -> None:
    """Let ``generator`` stand at ``state``, one of its own kind."""
    if isinstance(state, torch.Tensor):
        generator.set_state(state)
    else:
        generator.manual_seed(state[0]).set_offset(state[1])


def _mark(state: State) -> bytes | tuple[int, int]:
    """A state as something to be compared."""
    return ctypes.string_at(state.data_ptr(), state.numel()) if isinstance(state, torch.Tensor) else state


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that random operations on ``device`` use."""
    if device == CPU:
        return torch.default_generator
    module = getattr(torch, device.type)
    index = device.index if device.index is not None else module.current_device()
    if device.type == "cuda":
        torch.cuda.init()
    return module.default_generators[index]  # type: ignore[no-any-return]


def generator_of(op: Op) -> torch.Generator:
    """The generator from which ``op`` draws."""
    for arg in (op.kwargs.get("generator"), *op.args):
        if type(arg) not in _NEVER_GENERATORS and isinstance(arg, torch.Generator):
            return arg
    return default_generator(op.device)


@contextmanager
def borrowed(generator: torch.Generator) -> Iterator[None]:
    """Leave ``generator`` as it is found."""
    with lock:
        state = generator.get_state()
        try:
            yield
        finally:
            generator.set_state(state)


class Cursor:
    """A borrowed generator that walks along streams."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._at: Draw | None = None

    def seek(self, draw: Draw) -> None:
        """Bring the generator to its state at ``draw``."""
        if self._at is not None and self._at == draw:
            return
        start = self._start_for(draw)
        self._walk(draw.stream, start, draw.index)
        self._at = draw

    def passed(self, draw: Draw) -> None:
        """The operation at ``draw`` has run."""
        self._at = Draw(draw.stream, draw.index + 1)

    def _start_for(self, draw: Draw) -> int:
        """The nearest place to walk from: where we are, or a known state."""
        stream = draw.stream
        known: int | None = draw.index
        if known not in stream.states:
            known = max((index for index in stream.states if index <= draw.index), default=None)
        if self._at is not None and self._at.stream is stream and (known or 0) <= self._at.index <= draw.index:
            return self._at.index
        if known is None:
            assert stream.parent is not None
            self.seek(stream.parent)
            return 0
        set_state(self.generator, stream.states[known])
        return known

    def _walk(self, stream: Stream, start: int, end: int) -> None:
        pending = 0
        for index in range(start, end):
            if self.generator.device == CPU and (count := stream.num_draws(index)) is not None:
                pending += count
                continue
            pending = self._advance(pending)
            if (count := _increment(stream.ops[index], self.generator)) is not None:
                self.generator.set_offset(self.generator.get_offset() + count)
            else:
                run_for_draws(stream.ops[index], self.generator)
        self._advance(pending)

    def _advance(self, pending: int) -> int:
        if pending:
            mersenne.advance(self.generator, pending)
        return 0


def state_at(draw: Draw) -> State:
    """The state of the generator at ``draw``; known from then on."""
    generator = draw.stream.generator
    with borrowed(generator):
        cursor = Cursor(generator)
        cursor.seek(draw)
        state = state_of(generator)
    draw.stream.states[draw.index] = state
    return state


def _known_before(draw: Draw) -> State:
    """The latest true state that is known at ``draw`` or before."""
    known = max((index for index in draw.stream.states if index <= draw.index), default=None)
    if known is not None:
        return draw.stream.states[known]
    assert draw.stream.parent is not None
    return _known_before(draw.stream.parent)


def run_for_draws(op: Op, generator: torch.Generator) -> None:
    """Run ``op`` on scratch, for what it does to ``generator``, which stands where it has to."""
    from lightning_efficient_init.deferred.replay import Replay  # noqa: PLC0415 (replay stands on streams)

    Replay.run_alone(op, generator)


def num_draws(op: Op) -> int | None:
    """How many 32-bit draws ``op`` takes from MT19937, None if only running it can tell."""
    traits = traits_of(op.func)
    if not (traits.is_uniform or traits.is_normal):
        return None
    window = _window(op)
    if window is None:
        return None
    if traits.is_normal and (window.numel < _NORMAL_BLOCK or not window.is_contiguous):
        return None  # the scalar path keeps every second sample for later
    rule = _rule(traits.is_normal, window.dtype)
    return None if rule is None else rule(window.numel)


def _window(op: Op) -> Ref | None:
    """The tensor that a random operation fills."""
    if op.outs:
        return op.outs[0]
    return op.args[0] if op.args and isinstance(op.args[0], Ref) else None


# Normal samples are made from blocks of 16 uniform ones (aten/src/ATen/native/cpu/DistributionTemplates.h,
# `normal_fill`). For a rest the last 16 are drawn anew; in half precision newer versions fill the block.
_NORMAL_BLOCK = 16


def _one_each(numel: int) -> int:
    return numel


def _last_block_again(numel: int) -> int:
    return numel + (_NORMAL_BLOCK if numel % _NORMAL_BLOCK else 0)


def _whole_blocks(numel: int) -> int:
    return -(-numel // _NORMAL_BLOCK) * _NORMAL_BLOCK


def _twice(rule: Callable[[int], int]) -> Callable[[int], int]:
    return lambda numel: 2 * rule(numel)


@cache
def _rule(normal: bool, dtype: torch.dtype) -> Callable[[int], int] | None:
    """Number of elements to number of draws, as this build of PyTorch is seen to do it; None if by no known rule."""
    if dtype not in (*_SINGLE_DRAW, torch.float64):
        return None
    candidates = (_last_block_again, _whole_blocks) if normal else (_one_each,)
    rules = [rule if dtype in _SINGLE_DRAW else _twice(rule) for rule in candidates]
    return next((rule for rule in rules if _agrees_on_cpu(rule, normal, dtype)), None)


def _agrees_on_cpu(rule: Callable[[int], int], normal: bool, dtype: torch.dtype) -> bool:
    generator, expected = torch.Generator("cpu").manual_seed(1), torch.Generator("cpu").manual_seed(1)
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        for numel in (35, 48):
            scratch = torch.empty(numel, dtype=dtype, device="cpu")
            scratch.normal_(generator=generator) if normal else scratch.uniform_(generator=generator)
            mersenne.advance(expected, rule(numel))
        return torch.equal(generator.get_state(), expected.get_state())


# Of CUDA's kernels: aten/src/ATen/native/cuda/DistributionTemplates.h, `calc_execution_policy`.
_BLOCK_SIZE = 256
_CALLS_PER_STEP = 4
_measured: dict[Any, int] = {}


def _increment(op: Op, generator: torch.Generator) -> int | None:
    """By how much ``op`` moves a counter-based generator, where that depends on its shape and numbers alone."""
    window = _window(op)
    if generator.device.type != "cuda" or window is None or not traits_of(op.func).is_elementwise:
        return None
    if window.recipe.num_bytes < 1 << 31 and _is_by_numel(op.func, op.args[1:], window.dtype, generator):
        return _increment_for(window.numel, window.dtype, generator.device)
    numbers = tuple(arg for arg in op.args[1:] if isinstance(arg, int | float))
    key = (op.func, window.size, window.stride, window.dtype, numbers, generator.device)
    if key not in _measured:
        _measured[key] = _measure(generator, lambda: run_for_draws(op, generator))
    return _measured[key]


def _increment_for(numel: int, dtype: torch.dtype, device: torch.device) -> int:
    """What a kernel that gives each thread one draw at a time, or several, adds to the offset."""
    unroll = 2 if dtype == torch.float64 else 4
    num_blocks = min(-(-numel // _BLOCK_SIZE), _most_blocks(device))
    return ((numel - 1) // (_BLOCK_SIZE * num_blocks * unroll) + 1) * _CALLS_PER_STEP


@cache
def _most_blocks(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count * (properties.max_threads_per_multi_processor // _BLOCK_SIZE))


_by_numel: dict[Any, bool] = {}


def _is_by_numel(func: Any, numbers: tuple[Any, ...], dtype: torch.dtype, generator: torch.Generator) -> bool:
    """Trust `_increment_for` only where this build of PyTorch agrees with it, seen on a few small tensors.

    ``normal_`` and ``rand`` go by the same policy as ``uniform_``, which stands for them: to load a kernel takes 3 ms.
    """
    if traits_of(func).is_uniform or traits_of(func).is_normal:
        func, numbers = aten.uniform_.default, ()
    key = (id(func), dtype, generator.device)
    if key not in _by_numel:
        _by_numel[key] = dtype in (*_SINGLE_DRAW, torch.float64) and all(
            _agrees(func, numbers, torch.empty(numel, dtype=dtype, device=generator.device), generator)
            for numel in (1000, _most_blocks(generator.device) * _BLOCK_SIZE * 4 + 1)
        )
    return _by_numel[key]


def _agrees(func: Any, numbers: tuple[Any, ...], scratch: torch.Tensor, generator: torch.Generator) -> bool:
    expected = _increment_for(scratch.numel(), scratch.dtype, generator.device)
    return _measure(generator, lambda: func(scratch, *numbers, generator=generator)) == expected


def _measure(generator: torch.Generator, call: Callable[[], Any]) -> int:
    with borrowed(generator):
        before = generator.get_offset()
        call()
        return generator.get_offset() - before
