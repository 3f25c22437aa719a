"""Unpickling a checkpoint without running code from it.

A pickle is a program for a small stack machine. Two of its instructions are dangerous: GLOBAL fetches any
importable object by name, and REDUCE calls what is on the stack. torch answers with an unpickler of its own, in
Python (``torch/_weights_only_unpickler.py``), which fetches and calls only what a table allows. This one follows
the same rules and goes one step further: **it never makes a tensor**. Where the table says
``_rebuild_tensor_v2``, a stand-in of three lines notes storage, offset, shape and stride in a `StoredTensor`;
`tensors.py` checks these numbers when the whole tree is known, and can then say which tensor is wrong. Where the
reader of the file can already check them, it gives the `Entry` at once (``entry_of``), and nothing is left to note.

What follows from it:

- No tensor is made from unchecked numbers, and nothing the size of the checkpoint, or of what a hostile file claims
  it to be, is allocated: ``bytearray(1 << 40)`` or ``torch.Tensor(1 << 40)``, which torch's table allows, are
  refused here.
- Sparse, quantized and nested tensors become notes too, and are refused by name instead of failing in a kernel.
- It takes a third of the time of a meta load (100,000 tensors: 4 s against 11 to 16 s on a slow machine), a seventh
  of that of torch's unpickler alone, and is the same on every torch from 2.6 on.

``torch.serialization.add_safe_globals`` is honoured exactly as torch does: those classes and functions are called.
Two more guards against files made to hang or to fill memory: dictionary keys are plain values (hashing a tuple of
shared tuples takes exponential time), and a program may have only so many instructions.

Decided against: the C unpickler with a strict ``find_class`` (several times faster still, but BUILD sets attributes
of any object without asking, and one LONG_BINPUT makes it allocate 32 GB); torch's unpickler with
``map_location="meta"`` (makes the tensors first and asks later; forgets aliases; fails on quantized tensors without
naming them; knows no legacy offsets).

Opting in to arbitrary code (``weights_only=False``) takes the standard unpickler, see `trusted.py`.
"""

from __future__ import annotations

import pickle
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final

import torch

from lightning_efficient_init.checkpoint.entry import Entry
from lightning_efficient_init.checkpoint.tensors import StoredLayout, StoredStorage, StoredTensor
from lightning_efficient_init.checkpoint.wording import DOWNLOAD_AGAIN, explain, listing, shorten, show
from lightning_efficient_init.errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnsafeCheckpointError,
    UnsupportedCheckpointError,
)

MAX_PICKLE_BYTES: Final = 1 << 29
_MAX_INSTRUCTIONS: Final = 1 << 25  # a tensor takes about 30
_MAX_NOT_COUNTED: Final = 1 << 23  # of which a tensor puts two or three into the memo
_MAX_KEY_PARTS: Final = 64
# What is called to spell bytes, or to fill a container, copies a part of what a pickle holds, mostly once.
_MAX_COPIES: Final = 8  # of all of it
_COPIED_ANYHOW: Final = 1 << 20
_TENSORS: Final = (StoredTensor, Entry)
_BLOCKED_MODULES: Final = frozenset({"sys", "os", "posix", "nt"})


class _ReplacedError(KeyError):
    """Something in the memo was replaced in a step that leaves other instructions out."""


class TruncatedPickleError(Exception):
    """The data ended in the middle of the program; a reader that holds only part of a file may come with more."""


class StorageType:
    """Stands for a storage class such as ``torch.FloatStorage``: in a pickle it only names an element type."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


STORAGE_TYPES: Final = {
    f"torch.{name}Storage": StorageType(dtype)
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
        "QInt8": torch.qint8,
        "QUInt8": torch.quint8,
        "QInt32": torch.qint32,
        "QUInt4x2": torch.quint4x2,
        "QUInt2x4": torch.quint2x4,
    }.items()
} | {"torch.storage.UntypedStorage": StorageType(torch.uint8), "torch.UntypedStorage": StorageType(torch.uint8)}


def stored_storage(data: Any) -> StoredStorage:
    """Reads the persistent id ``("storage", type, key, location, size)`` by which pickles name a storage."""
    kind, storage_type, key, _location, numel = data[:5]
    if not _is_storage(kind, storage_type):
        raise ValueError(f"a persistent id that is no storage: {show(kind)}")
    if type(numel) is not int or numel < 0 or type(key) not in (str, int, bytes):
        raise ValueError(f"a storage {show(key)} of {show(numel)} elements")
    return StoredStorage(key, storage_type.dtype, numel * storage_type.dtype.itemsize)


def _is_storage(kind: Any, storage_type: Any) -> bool:
    return kind in ("storage", b"storage") and isinstance(storage_type, StorageType)


# --- Stand-ins for the functions that rebuild tensors


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    return StoredTensor(storage, StoredLayout(offset, shape, stride))


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> StoredTensor:
    return StoredTensor(storage, StoredLayout(offset, shape, stride), _refusal_of(metadata), requires_grad is True)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor:
    layout = StoredLayout(offset, shape, stride, dtype)
    return StoredTensor(storage, layout, _refusal_of(metadata), requires_grad is True)


def _parameter(data: Any, requires_grad: Any, *_: Any) -> StoredTensor | Entry:
    if not isinstance(data, StoredTensor | Entry):
        raise TypeError("a parameter without a tensor")
    return replace(data, requires_grad=requires_grad is True, is_parameter=True)


def _from_type(rebuild: Any, kind: Any, args: Any, _state: Any) -> StoredTensor:
    """Rebuilds a tensor that has a class or attributes of its own; the attributes are not weights and stay behind."""
    tensor = rebuild(*args) if id(rebuild) in _REBUILD_IDS else None
    if not isinstance(tensor, StoredTensor):
        raise TypeError("a tensor subclass that is not rebuilt from a tensor")
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        return StoredTensor(refusal=f"a tensor subclass ({show(getattr(kind, '__qualname__', kind))})")
    return tensor


def _refuse(what: str) -> Callable[..., StoredTensor]:
    def rebuild(*_: Any) -> StoredTensor:
        return StoredTensor(refusal=what)

    return rebuild


def _refusal_of(metadata: Any) -> str | None:
    return f"a lazy view with {listing(metadata)} set (call resolve_conj() or resolve_neg())" if metadata else None


REFUSED: Final = {
    "_rebuild_qtensor": _refuse("a quantized tensor"),
    "_rebuild_sparse_tensor": _refuse("a sparse tensor"),
    "_rebuild_nested_tensor": _refuse("a nested tensor"),
    "_rebuild_meta_tensor_no_storage": _refuse("a tensor on the meta device, which has no values"),
}
_REBUILD: Final = {function: name for name, function in REFUSED.items()} | {
    _tensor: "_rebuild_tensor",
    _tensor_v2: "_rebuild_tensor_v2",
    _tensor_v3: "_rebuild_tensor_v3",
    _parameter: "_rebuild_parameter",
    _refuse("a tensor subclass without memory of its own"): "_rebuild_wrapper_subclass",
    _refuse("a tensor of another device's own format"): "_rebuild_device_tensor_from_cpu_tensor",
}
_REBUILD_IDS: Final = {id(function) for function in _REBUILD}


# --- Stand-ins for the few other things that may be called


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """How protocol 2 spells bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8"):
        raise TypeError("a call of encode that does not spell bytes")
    return text.encode(encoding)


def _bytes(*args: Any) -> bytes:
    if args:
        raise TypeError("a call of bytes that does not spell empty bytes")
    return b""


def _bytearray(data: Any = b"", encoding: Any = "latin1") -> bytearray:
    return bytearray(data if type(data) is bytes else _encode(data, encoding))


def _set(items: Any = ()) -> set[Any]:
    return {_checked_key(item) for item in items}


def _size(items: Any = ()) -> torch.Size:
    if type(items) not in (tuple, list) or not all(type(item) is int for item in items):
        raise TypeError("a torch.Size that is not made of integers")
    return torch.Size(items)


def _counter(items: Any = ()) -> Counter[Any]:
    if type(items) is not dict and len(items) > 0:
        raise TypeError("a Counter that is not made from a dict")
    return Counter(items)


def _ordered_dict(items: Any = ()) -> OrderedDict[Any, Any]:
    if len(items) > 0:
        return OrderedDict((_checked_key(key), value) for key, value in items)
    return OrderedDict()


def _layout(name: Any) -> Any:
    layout = getattr(torch, name.removeprefix("torch."), None) if type(name) is str else None
    if not isinstance(layout, torch.layout):
        raise TypeError(f"a layout {show(name)}")
    return layout


def _safe_globals() -> dict[str, Any]:
    """What every pickle may name: the same as torch allows, with stand-ins for what would make tensors."""
    table: dict[str, Any] = {
        "collections.OrderedDict": _ordered_dict,
        "collections.Counter": _counter,
        "torch.Tensor": torch.Tensor,
        "torch.nn.parameter.Parameter": torch.nn.Parameter,
        "torch.Size": _size,
        "torch.device": torch.device,
        "torch.serialization._get_layout": _layout,
        "_codecs.encode": _encode,
        "builtins.bytes": _bytes,
        "builtins.bytearray": _bytearray,
        "builtins.set": _set,
        "builtins.complex": complex,
        "torch._tensor._rebuild_from_type_v2": _from_type,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._utils._rebuild_device_tensor_from_numpy": _refuse("a tensor of another device's own format"),
    }
    table.update((f"torch._utils.{name}", function) for function, name in _REBUILD.items())
    table.update(
        (str(value), value) for value in vars(torch).values() if isinstance(value, torch.dtype | torch.qscheme)
    )
    return table | STORAGE_TYPES


_SAFE: Final = _safe_globals()
_CALLABLE: Final = {id(value) for value in _SAFE.values() if callable(value)} - {
    id(torch.Tensor),
    id(torch.nn.Parameter),
}


_COPYING: Final = frozenset(map(id, (_encode, _bytearray, _set, _size, _counter, _ordered_dict)))


def _allowed_by_user() -> dict[str, Any]:
    """What ``torch.serialization.add_safe_globals`` has allowed, by the name a pickle uses."""
    table = {}
    for item in torch.serialization.get_safe_globals():
        if isinstance(item, tuple):
            table[str(item[1])] = item[0]
        else:
            table[f"{item.__module__}.{item.__qualname__}"] = item
    return table


class SafeUnpickler:
    """Runs one pickle program; see the top of this file for its rules.

    Attributes:
        pos: Position in the data: after `load`, that of the first byte after the program.
    """

    def __init__(
        self,
        data: bytes,
        pos: int,
        persistent_load: Callable[[Any], Any],
        file: str,
        stand_ins: Mapping[str, Any] = MappingProxyType({}),
        entry_of: Callable[[bytes, torch.dtype, int, StoredLayout], Entry | None] | None = None,
    ) -> None:
        self._data = data
        self._file = file
        self._persistent_load = persistent_load
        self._entry_of = entry_of  # from a storage's key and stated bytes, where that can be told by now
        self._allowed = {**_allowed_by_user(), **stand_ins}
        self._allowed_ids = {id(value) for value in self._allowed.values()}
        self._start(pos, skips=True)

    def _start(self, pos: int, *, skips: bool) -> None:
        self.pos = pos
        self._skips = skips  # what `_rebuild` may leave out
        self._memo: dict[int, Any] = {}
        self._num_copied = 0  # characters and items
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []

    def load(self) -> Any:
        """Runs the program and gives its result.

        Raises:
            UnsafeCheckpointError: It names something that is not allowed.
            CorruptCheckpointError: It is no sound program.
            TruncatedPickleError: The data ends before the program does.
        """
        try:
            return self._run_all(self.pos)
        except (CheckpointError, TruncatedPickleError):
            raise
        except Exception as error:  # a damaged program can go wrong in any way, and so can a class the user allowed
            raise CorruptCheckpointError(
                explain(
                    self._file,
                    expected="a sound pickle",
                    found=f"{type(error).__name__}: {shorten(error)}, near byte {self.pos}",
                    todo=DOWNLOAD_AGAIN,
                )
            ) from error

    def load_whole(self) -> Any:
        """As `load`, where there is no more data: an end before that of the program is an error, too."""
        try:
            return self.load()
        except TruncatedPickleError:
            raise CorruptCheckpointError(
                explain(self._file, expected="a whole pickle", found="its first part only", todo=DOWNLOAD_AGAIN)
            ) from None

    def _run_all(self, start: int) -> Any:
        try:
            return self._run()
        except KeyError:  # perhaps of something that `_rebuild` left out
            self._start(start, skips=False)
            return self._run()

    def _run(self) -> Any:  # noqa: PLR0912 (a branch is what it is about)
        """Runs instructions until the last one.

        Eleven of the 28 instructions that describe a tensor are written out here, ordered by how often they come, and
        work on local variables; this halves the time. All others are methods, found in `_HANDLERS`. Nearly all items
        of state dicts, as torch writes them, are taken in one step by `_run_items`, and other tensors by `_run_call`.
        """
        data, memo, end = self._data + _PADDING, self._memo, len(self._data)
        pos, stack = self.pos, self._stack
        u32 = _U32.unpack_from
        for _ in range(_MAX_INSTRUCTIONS):
            code = data[pos]
            if code == _LONG_BINPUT:
                memo[u32(data, pos + 1)[0]] = stack[-1]
                pos += 5
            elif code == _BINPUT:
                memo[data[pos + 1]] = stack[-1]
                pos += 2
            elif code == _BININT1:
                stack.append(data[pos + 1])
                pos += 2
            elif code == _BINGET and pos + 2 <= end:
                stack.append(memo[data[pos + 1]])
                pos += 2
            elif code == _MARK and data[pos + 1] == _MARK and stack and stack[-1] is _tensor_v2 and self._run_call(pos):
                pos = self.pos
            elif code == _MARK:
                self._outer.append(stack)
                stack = self._stack = []
                pos += 1
            elif code == _TUPLE:
                items = tuple(stack)
                stack = self._stack = self._outer.pop()
                stack.append(items)
                pos += 1
            elif code == _TUPLE2:
                stack[-2:] = [(stack[-2], stack[-1])]
                pos += 1
            elif code == _STOP and pos < end:
                self.pos = pos + 1
                return stack.pop()
            else:
                if pos >= end or code == _BINGET:
                    raise TruncatedPickleError
                handler = _HANDLERS.get(code)
                if handler is None:
                    raise ValueError(f"instruction {code:#x}, which checkpoints do not use")
                self.pos = pos + 1
                handler(self)
                pos, stack = self.pos, self._stack
        raise UnsupportedCheckpointError(
            explain(
                self._file,
                expected=f"a pickle of at most {_MAX_INSTRUCTIONS} instructions",
                found="more",
                todo="Keep large lists and tables out of the checkpoint, or save them as tensors.",
            )
        )

    def _run_items(self, start: int) -> bool:
        """Does, each in one step, what puts items of a dict on the stack; False if something else is there."""
        self.pos = start
        self._run_each(_TENSOR_ITEM, self._tensor_of, 3)
        self._run_each(_VERSION_ITEM, self._version_of, 1)
        return self.pos > start

    def _run_each(self, kind: re.Pattern[bytes], value_of: Callable[[Any, _Fetched], Any], num_puts: int) -> None:
        """Does all items of one kind that follow; each puts so many things into the memo, its name among them."""
        data, memo, push, fetched = self._data, self._memo, self._stack.append, _Fetched(self._memo)
        size = len(memo)
        while self._may_skip() and (item := kind.match(data, self.pos)):
            length, name, put, *rest = item.groups()
            if length[0] != len(name) or (value := value_of(rest, fetched)) is None:
                return
            memo[_U32.unpack(put)[0]] = key = str(name, "utf-8", "surrogatepass")
            push(key)
            push(value)
            self.pos = item.end()
            size += num_puts
            if len(memo) != size:
                raise _ReplacedError

    def _tensor_of(self, item: Sequence[Any], fetched: _Fetched) -> StoredTensor | Entry | None:
        function, *call = item
        return self._rebuild(call, fetched) if fetched[function] is _tensor_v2 else None

    def _version_of(self, item: Sequence[Any], fetched: _Fetched) -> dict[str, int] | None:
        word, number = item
        return {fetched[word]: _number(number)} if type(fetched[word]) is str else None

    def _run_call(self, pos: int) -> bool:
        """Does in one step what the instructions of `_CALL` do, which rebuild a tensor; False if there are others."""
        call, size = _CALL.match(self._data, pos) if self._may_skip() else None, len(self._memo)
        if call is None or (tensor := self._rebuild(call.groups(), _Fetched(self._memo))) is None:
            return False
        if len(self._memo) != size + 2:
            raise _ReplacedError
        self._stack[-1] = tensor
        self.pos = call.end()
        return True

    def _may_skip(self) -> bool:
        """Whether to do many instructions in one step, which is not counted: each puts something into the memo."""
        return self._skips and len(self._memo) < _MAX_NOT_COUNTED

    def _rebuild(self, call: Sequence[Any], fetched: _Fetched) -> StoredTensor | Entry | None:
        """Rebuilds a tensor from what varies in `_CALL`; None if its instructions are not what they look like.

        In one step it takes a third of the time. Of the seven values that go to the memo two can be asked for again in
        a pickle that torch wrote: the storage's key and the tensor. The others, which are new objects each time, are
        left out; if one is asked for nevertheless, or one replaces another, `load` starts again without this.

        Args:
            call: What varies.
            fetched: What has been got from the memo, in which nothing was replaced since.
        """
        storage, num_key, key, key_put, numel, offset, shape, stride, hooks, tensor_put = call
        kind, layout = fetched[storage], _layout_of(offset, shape, stride)
        if kind is None or num_key[0] != len(key) or layout is None or fetched[hooks] is not _ordered_dict:
            return None
        dtype, size, name = kind.dtype, _number(numel), key.decode()
        tensor: StoredTensor | Entry | None = None
        if self._entry_of is not None:
            tensor = self._entry_of(key, dtype, size * dtype.itemsize, layout)
        if tensor is None:
            tensor = StoredTensor(self._persistent_load(("storage", kind, name, None, size)), layout)
        self._memo[_U32.unpack(key_put)[0]] = name
        self._memo[_U32.unpack(tensor_put)[0]] = tensor
        return tensor

    def _take(self, num_bytes: int) -> bytes:
        start = self.pos
        self.pos = start + num_bytes
        if self.pos > len(self._data):
            raise TruncatedPickleError
        return self._data[start : self.pos]

    def _line(self) -> str:
        end = self._data.find(b"\n", self.pos)
        if end < 0:
            raise TruncatedPickleError
        line = self._data[self.pos : end].decode()
        self.pos = end + 1
        return line

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._outer.pop()
        return items

    # --- Values

    def _push_text(self) -> None:
        start = self.pos
        if not self._run_items(start - 1):
            self.pos = start
            self._push_sized_text(_U32.unpack(self._take(4))[0])

    def _push_short_text(self) -> None:
        self._push_sized_text(self._take(1)[0])

    def _push_sized_text(self, num_bytes: int) -> None:
        self._stack.append(str(self._take(num_bytes), "utf-8", "surrogatepass"))

    def _push_bytes(self) -> None:
        self._stack.append(self._take(_U32.unpack(self._take(4))[0]))

    def _push_short_bytes(self) -> None:
        self._stack.append(self._take(self._take(1)[0]))

    def _push_int(self) -> None:
        self._stack.append(_I32.unpack(self._take(4))[0])

    def _push_int2(self) -> None:
        self._stack.append(_U16.unpack(self._take(2))[0])

    def _push_long(self) -> None:
        self._stack.append(pickle.decode_long(self._take(self._take(1)[0])))

    def _push_float(self) -> None:
        self._stack.append(_F64.unpack(self._take(8))[0])

    def _push_true(self) -> None:
        self._stack.append(True)

    def _push_false(self) -> None:
        self._stack.append(False)

    def _push_none(self) -> None:
        self._stack.append(None)

    # --- Containers

    def _pop(self) -> None:
        self._stack.pop()

    def _new_list(self) -> None:
        self._stack.append([])

    def _new_dict(self) -> None:
        self._stack.append({})

    def _new_set(self) -> None:
        self._stack.append(set())

    def _tuple0(self) -> None:
        self._stack.append(())

    def _tuple1(self) -> None:
        self._stack[-1] = (self._stack[-1],)

    def _tuple3(self) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _append_all(self) -> None:
        self._extend(self._pop_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list and not (isinstance(target, list) and self._is_allowed(type(target))):
            raise TypeError(f"items for {_type_name(target)}")
        target.extend(items)

    def _add_items(self) -> None:
        items = self._pop_mark()
        target = self._stack[-1]
        if type(target) is not set:
            raise TypeError(f"set members for {_type_name(target)}")
        target.update(_set(items))

    def _set_item(self) -> None:
        value = self._stack.pop()
        self._update([self._stack.pop(), value])

    def _set_items(self) -> None:
        self._update(self._pop_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._stack[-1]
        kind = type(target)
        if kind not in (dict, OrderedDict, Counter) and not (isinstance(target, dict) and self._is_allowed(kind)):
            raise TypeError(f"keys for {_type_name(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str else _checked_key(key)] = value

    # --- Memory

    def _long_get(self) -> None:
        self._stack.append(self._memo[_U32.unpack(self._take(4))[0]])

    def _memoize(self) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    # --- Globals, calls, objects

    def _global(self) -> None:
        module, name = self._line(), self._line()
        self._stack.append(self._find(module, name))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError("a global whose name is no text")
        self._stack.append(self._find(module, name))

    def _find(self, module: str, name: str) -> Any:
        module, name = _PYTHON2_NAMES.get((module, name), (_PYTHON2_MODULES.get(module, module), name))
        full_name = f"{module}.{name}"
        if module not in _BLOCKED_MODULES:
            if full_name in _SAFE:
                return _SAFE[full_name]
            if full_name in self._allowed:
                return self._allowed[full_name]
        raise self._unsafe(full_name)

    def _unsafe(self, full_name: str) -> UnsafeCheckpointError:
        shown = shorten(full_name)
        return UnsafeCheckpointError(
            explain(
                self._file,
                expected="tensors, containers and plain values only",
                found=f"a pickle that uses {shown}",
                todo=f"If you trust {shown}, allow it with torch.serialization.add_safe_globals([{shown}]); "
                "if you trust the whole file, pass weights_only=False, which lets the file run any code.",
            )
        )

    def _is_allowed(self, value: Any) -> bool:
        return id(value) in self._allowed_ids

    def _reduce(self) -> None:
        args = self._stack.pop()
        function = self._stack[-1]
        if id(function) not in _CALLABLE and not self._is_allowed(function):
            raise TypeError(f"a call of {show(function)}, which may not be called")
        if id(function) in _COPYING and args:
            self._num_copied += len(args[0])
            if self._num_copied > _MAX_COPIES * len(self._data) + _COPIED_ANYHOW:
                raise ValueError("a pickle that makes copy after copy of what it holds")
        self._stack[-1] = function(*args)

    def _new_object(self) -> None:
        args = self._stack.pop()
        kind = self._stack.pop()
        if kind is _ordered_dict or kind is _counter or kind is _set:
            self._stack.append(kind())
        elif self._is_allowed(kind):
            self._stack.append(kind.__new__(kind, *args))
        else:
            raise TypeError(f"an object of {show(kind)}, which may not be made")

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is OrderedDict:
            _set_attributes(target, state)
        elif self._is_allowed(type(target)):
            _restore(target, state)
        elif not isinstance(target, _TENSORS):  # attributes of tensors stay behind
            raise TypeError(f"attributes for {_type_name(target)}")

    def _persistent(self) -> None:
        self._stack.append(self._persistent_load(self._stack.pop()))

    # --- The program itself

    def _protocol(self) -> None:
        self._take(1)

    def _frame(self) -> None:
        self._take(8)


def _checked_key(key: Any, parts: int = _MAX_KEY_PARTS) -> Any:
    """Lets only those keys pass whose hash takes no time to speak of."""
    kind = type(key)
    if kind is tuple or kind is torch.Size:
        if len(key) > parts:
            raise TypeError("a dictionary key of too many parts")
        for item in key:
            _checked_key(item, parts // 4)
    elif kind is int:
        if key.bit_length() > 64:
            raise TypeError("an integer of more than 64 bits as dictionary key")
    elif kind in (list, dict, OrderedDict, set, *_TENSORS, StoredStorage):
        raise TypeError(f"a dictionary key of type {kind.__name__}")
    return key


def _set_attributes(target: OrderedDict[Any, Any], state: Any) -> None:
    """Attributes of an OrderedDict are data (``_metadata``); one that hides a method would be a trap."""
    for name, value in dict(state).items():
        if type(name) is not str or hasattr(OrderedDict, name):
            raise TypeError(f"an attribute {show(name)} of an OrderedDict")
        target.__dict__[name] = value


def _restore(target: Any, state: Any) -> None:
    """What the standard unpickler does, for objects of allowed classes."""
    if hasattr(target, "__setstate__"):
        target.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if attributes:
        target.__dict__.update(attributes)
    for name, value in (slots or {}).items():
        setattr(target, name, value)


def _type_name(value: Any) -> str:
    return shorten(type(value).__name__)


_U16, _U32, _I32, _F64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<i"), struct.Struct(">d")
_BINPUT, _LONG_BINPUT, _BINGET, _BININT1 = (
    code[0] for code in (pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.BININT1)
)
_MARK, _TUPLE, _TUPLE2, _STOP = (code[0] for code in (pickle.MARK, pickle.TUPLE, pickle.TUPLE2, pickle.STOP))

# What follows the name of `_rebuild_tensor_v2` in protocol 2, with the numbers as K, M or J has them, and memo indices
# of four bytes, as nearly all are: ((storage, type, key, location, numel), offset, shape, stride, False,
# OrderedDict()), and the call. False says that it does not require gradients, as no tensor of a state dict does.
_INT: Final = rb"K.|M..|J...[\x00-\x7f]"
_INTS: Final = rb"(?:\)|(\(?(?:" + _INT + rb")+[\x85-\x87t])r....)"
_PUT: Final = rb"r(....)"
_GET: Final = rb"(h.|j....)"
_REBUILD_CALL: Final = (
    rb"\(\(((?:h.|j....){2})X(.)\0\0\0([0-9]+)" + _PUT + rb"(?:h.|j....)(" + _INT + rb")tr....Q"
    rb"(" + _INT + rb")" + _INTS + _INTS + rb"\x89" + _GET + rb"\)Rr....tr....R" + _PUT
)
_CALL: Final = re.compile(_REBUILD_CALL, re.DOTALL)
# An item of a state dict, and of its `_metadata`, where the value is {"version": number}. Where the name ends follows
# from what comes after it; its length, which stands before it, has to be compared. Longer ones are done in many steps.
_NAME: Final = rb"X(.)\0\0\0(.{0,255}?)" + _PUT
_TENSOR_ITEM: Final = re.compile(_NAME + _GET + _REBUILD_CALL, re.DOTALL)
_VERSION_ITEM: Final = re.compile(_NAME + rb"}r...." + _GET + rb"(" + _INT + rb")s", re.DOTALL)


class _Fetched(dict[bytes, Any]):
    """What one instruction gets from the memo, or the element type that two of them get there for a storage."""

    def __init__(self, memo: Mapping[int, Any]) -> None:
        super().__init__()
        self._memo = memo

    def __missing__(self, instructions: bytes) -> Any:
        """Looks it up: None for two that do not name a storage."""
        found = [self._memo[_number(get)] for get in re.findall(_GET, instructions, re.DOTALL)]
        value = found[0] if len(found) == 1 else found[1] if _is_storage(*found) else None
        self[instructions] = value
        return value


@lru_cache(maxsize=1 << 16)
def _number(instruction: bytes) -> int:
    """The operand of an instruction that pushes, gets or puts: little endian, not negative."""
    return int.from_bytes(instruction[1:], "little")


@lru_cache(maxsize=4096)
def _layout_of(offset: bytes, shape: bytes | None, stride: bytes | None) -> StoredLayout | None:
    """The layout whose numbers these instructions make; None if they make something else."""
    sizes, steps = _sizes(shape), _sizes(stride)
    return None if sizes is None or steps is None else StoredLayout(_number(offset), sizes, steps)


def _sizes(instructions: bytes | None) -> tuple[int, ...] | None:
    """The tuple that these instructions make, None for the one without any; None if they make another one."""
    if instructions is None:
        return ()
    numbers = tuple(_number(found) for found in re.findall(_INT, instructions, re.DOTALL))
    is_marked, how = instructions.startswith(pickle.MARK), instructions[-1:]
    fits = is_marked if how == pickle.TUPLE else not is_marked and _TUPLES.index(how) + 1 == len(numbers)
    return numbers if fits else None


_TUPLES: Final = (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3)
_PADDING: Final = bytes(5)  # instructions of up to 5 bytes are read without asking whether the data goes on
_PYTHON2_NAMES: Final[dict[tuple[str, str], tuple[str, str]]] = torch._utils.NAME_MAPPING
_PYTHON2_MODULES: Final[dict[str, str]] = torch._utils.IMPORT_MAPPING

_HANDLERS: Final[dict[int, Callable[[SafeUnpickler], None]]] = {
    code[0]: handler
    for code, handler in {
        pickle.LONG_BINGET: SafeUnpickler._long_get,
        pickle.MEMOIZE: SafeUnpickler._memoize,
        pickle.BINUNICODE: SafeUnpickler._push_text,
        pickle.SHORT_BINUNICODE: SafeUnpickler._push_short_text,
        pickle.BINBYTES: SafeUnpickler._push_bytes,
        pickle.SHORT_BINBYTES: SafeUnpickler._push_short_bytes,
        pickle.SHORT_BINSTRING: SafeUnpickler._push_short_text,
        pickle.BININT: SafeUnpickler._push_int,
        pickle.BININT2: SafeUnpickler._push_int2,
        pickle.LONG1: SafeUnpickler._push_long,
        pickle.BINFLOAT: SafeUnpickler._push_float,
        pickle.NEWTRUE: SafeUnpickler._push_true,
        pickle.NEWFALSE: SafeUnpickler._push_false,
        pickle.NONE: SafeUnpickler._push_none,
        pickle.POP: SafeUnpickler._pop,
        pickle.POP_MARK: lambda machine: (machine._pop_mark(), None)[1],
        pickle.EMPTY_LIST: SafeUnpickler._new_list,
        pickle.EMPTY_DICT: SafeUnpickler._new_dict,
        pickle.EMPTY_SET: SafeUnpickler._new_set,
        pickle.EMPTY_TUPLE: SafeUnpickler._tuple0,
        pickle.TUPLE1: SafeUnpickler._tuple1,
        pickle.TUPLE3: SafeUnpickler._tuple3,
        pickle.APPEND: SafeUnpickler._append,
        pickle.APPENDS: SafeUnpickler._append_all,
        pickle.ADDITEMS: SafeUnpickler._add_items,
        pickle.SETITEM: SafeUnpickler._set_item,
        pickle.SETITEMS: SafeUnpickler._set_items,
        pickle.GLOBAL: SafeUnpickler._global,
        pickle.STACK_GLOBAL: SafeUnpickler._stack_global,
        pickle.REDUCE: SafeUnpickler._reduce,
        pickle.NEWOBJ: SafeUnpickler._new_object,
        pickle.BUILD: SafeUnpickler._build,
        pickle.BINPERSID: SafeUnpickler._persistent,
        pickle.PROTO: SafeUnpickler._protocol,
        pickle.FRAME: SafeUnpickler._frame,
    }.items()
}
