"""Tensors that are still in their file: they look like tensors, and are read when someone looks at their values.

User hooks such as ``LightningModule.on_load_checkpoint`` get the whole checkpoint and may do anything with it. A
`LazyTensor` lets them: shape, dtype and device cost nothing, every operation reads the bytes at that moment and
runs on a real tensor. Nothing read is kept, with one exception. An operation that writes, or that gives out a view
through which someone may write later (``sd["w"][0] = 0``), must find its bytes again, so the tensor it read stays
with the `LazyTensor`; its version counter then tells whether anyone wrote, and so whether the entry still says what
the tensor holds. Under a dispatch mode, as inside ``init_module``, counters are not to be trusted:
``torch._foreach_mul_`` and its like leave them alone there (torch 2.6 to 2.13). What operations write is taken from
their schemas then, and what gives out memory counts as written.

Decided against: reading at the first access and keeping all (a hook that prints norms would bring the checkpoint
into memory); refusing to write (hooks that edit weights in place are documented usage).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_efficient_init.checkpoint.entry import Entry
from lightning_efficient_init.checkpoint.file import CheckpointFile, Seal
from lightning_efficient_init.checkpoint.tree import map_leaves

# What these give out shares memory without sharing a version counter: nobody would know of a write.
_ESCAPES: Final = frozenset(
    {
        torch.Tensor.numpy,
        torch.Tensor.__array__,
        torch.Tensor.__dlpack__,
        torch.Tensor.data_ptr,
        torch.Tensor.untyped_storage,
        torch.Tensor.storage,
        torch.Tensor._typed_storage,
        torch.Tensor.data.__get__,  # type: ignore[attr-defined]
    }
)

# What these tell is known without the values.
_ABOUT: Final = frozenset(
    {
        getattr(torch.Tensor, name).__get__
        for name in [
            "shape",
            "dtype",
            "device",
            "layout",
            "ndim",
            "requires_grad",
            "is_leaf",
            "grad",
            "grad_fn",
            "nbytes",
            "itemsize",
            "output_nr",
            "is_cpu",
            "is_cuda",
            "is_meta",
            "is_sparse",
            "is_quantized",
            "is_nested",
            "_backward_hooks",
        ]
    }
    | {
        getattr(torch.Tensor, name)
        for name in [
            "size",
            "dim",
            "numel",
            "nelement",
            "ndimension",
            "stride",
            "storage_offset",
            "element_size",
            "is_contiguous",
            "is_floating_point",
            "is_complex",
            "is_conj",
            "is_neg",
            "is_signed",
            "get_device",
            "__len__",
            "__hash__",
            "detach",
            "requires_grad_",
        ]
    }
    | {getattr(torch.Tensor, name).__set__ for name in ("requires_grad", "grad")}
    | {torch.is_floating_point, torch.is_complex, torch.numel, torch.detach}
)


class LazyTensor(torch.Tensor):
    """Stands for an entry of a checkpoint; any operation reads it.

    Args:
        entry: The tensor in the file.
        device: Where operations find the real tensor.
        seal: Of the file; without one nobody notices if another file takes its place.
    """

    _source: _Source

    @staticmethod
    def __new__(
        cls: type[LazyTensor], entry: Entry, device: torch.device | str = "cpu", seal: Seal | None = None
    ) -> LazyTensor:
        """Makes one without memory."""
        return cls._of(_Source(entry, torch.device(device), seal))

    @classmethod
    def _of(cls, source: _Source) -> LazyTensor:
        entry = source.entry
        tensor: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, entry.shape, strides=entry.stride, dtype=entry.dtype, device=source.device
        )
        tensor._source = source
        return tensor

    @property
    def entry(self) -> Entry | None:
        """The tensor in the file; None once someone may have written to it, so that only `read` has its values."""
        return None if self._source.is_written() else self._source.sealed_entry()

    @property
    def is_parameter(self) -> bool:
        """Whether it is a `torch.nn.Parameter` to those who ask with ``isinstance``."""
        return isinstance(self, torch.nn.Parameter)

    def read(self) -> torch.Tensor:
        """Gives the real values, on the device: a plain tensor, whatever this one is."""
        return self._source.read()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs whatever Python calls on tensors."""
        if func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            raise TypeError("a tensor of a checkpoint takes no new data: put a new tensor in its place")
        if func not in _ABOUT:
            return _run(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs operations that C++ calls, below the layer that counts versions: what gives out memory escapes."""
        if func is torch.ops.aten.detach.default:
            return cls._of(args[0]._source)
        gives_out_memory = any(argument.alias_info is not None for argument in func._schema.arguments)
        read = _Source.escape if gives_out_memory else _Source.read
        args, kwargs = tree_map_only(LazyTensor, lambda lazy: read(lazy._source), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copy = memo[id(self)] = as_saved(self.read().clone(), self)
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return as_saved(self.read(), self).__reduce_ex__(protocol)


class _Source:
    """Where the values of a `LazyTensor`, and of its detached twins, come from."""

    def __init__(self, entry: Entry, device: torch.device, seal: Seal | None) -> None:
        self.entry = entry
        self.device = device
        self._seal = seal
        self._kept: torch.Tensor | None = None
        self._version = 0
        self._escaped = False

    def read(self) -> torch.Tensor:
        return read_entry(self.sealed_entry(), self.device) if self._kept is None else self._kept

    def sealed_entry(self) -> Entry:
        """The entry, if its file is still what it was."""
        if self._seal is not None:
            self._seal.check(self.entry)
        return self.entry

    def keep(self, real: torch.Tensor, version: int, *, is_counted: bool = True) -> None:
        """From now on gives this memory, whose version was that when it held what is in the file."""
        if self._kept is None:
            self._kept, self._version = real, version
        self._escaped |= not is_counted

    def escape(self) -> torch.Tensor:
        """Gives memory to someone whose writes cannot be noticed."""
        self._escaped = True
        self._kept = self.read()
        return self._kept

    def is_written(self) -> bool:
        return self._escaped or (self._kept is not None and self._kept._version != self._version)


def _run(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls a function on real tensors, and keeps those that it wrote to or gave out."""
    used: dict[_Source, tuple[LazyTensor, torch.Tensor, int]] = {}

    def real_of(lazy: LazyTensor) -> torch.Tensor:
        source = lazy._source
        if source not in used:
            real = source.escape() if func in _ESCAPES else source.read()
            used[source] = lazy, real, real._version
        return used[source][1]

    args, kwargs = tree_map_only(LazyTensor, real_of, (args, kwargs))
    watch = _WatchWrites() if torch._C._len_torch_dispatch_stack() else None
    with watch or nullcontext():
        result = func(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    tensors += watch.written if watch else ()
    for source, (_, real, version) in used.items():
        if real._version != version or any(_share_memory(real, tensor) for tensor in tensors):
            source.keep(real, version, is_counted=watch is None)
    lazies = {id(real): lazy for lazy, real, _ in used.values()}  # `x.float()` of a float tensor is x
    return tree_map_only(torch.Tensor, lambda tensor: lazies.get(id(tensor), tensor), result)


class _WatchWrites(TorchDispatchMode):
    """Notes the tensors that operations write to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments if _is_written(argument)]
        if names:
            given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
            values = tree_leaves([given.get(name) for name in names])
            self.written += [value for value in values if isinstance(value, torch.Tensor)]
        return func(*args, **kwargs)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if other.layout is not torch.strided or isinstance(other, LazyTensor):
        return False
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def read_entry(entry: Entry, device: torch.device | str = "cpu") -> torch.Tensor:
    """Reads one tensor, with the strides it was saved with.

    Args:
        entry: The tensor in the file.
        device: Where it ends up.

    Raises:
        CorruptCheckpointError: The file is shorter than when it was indexed.
        CheckpointReadError: The operating system failed, also when asked again.
    """
    with torch.inference_mode(mode=False):
        if torch.device(device).type == "meta" or entry.numel == 0:
            return torch.empty_strided(entry.shape, entry.stride, dtype=entry.dtype, device=device)
        if entry.chunks:
            return _assemble(entry, device)
        flat = torch.empty(entry.extent_bytes, dtype=torch.uint8, device="cpu")
        with CheckpointFile(entry.file) as file:
            file.read_into(_memory_of(flat), entry.offset, "a tensor")
        return flat.to(device).view(entry.dtype).as_strided(entry.shape, entry.stride)


def _assemble(entry: Entry, device: torch.device | str) -> torch.Tensor:
    """Reads a tensor that is stored in chunks."""
    whole = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    for chunk in entry.chunks:
        block = whole
        for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.entry.shape, strict=True)):
            block = block.narrow(dim, start, size)
        block.copy_(read_entry(chunk.entry))
    return whole.to(device)


def as_saved(tensor: torch.Tensor, leaf: Entry | LazyTensor) -> torch.Tensor:
    """Gives ``tensor``, which has the values of ``leaf``, or the same memory as the parameter that ``leaf`` is."""
    # what a damaged file says of integers is passed over
    requires_grad = leaf.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
    if leaf.is_parameter:
        return torch.nn.Parameter(tensor, requires_grad)
    return tensor.detach().requires_grad_() if requires_grad else tensor


def lazy_tree(tree: Any, device: torch.device | str = "cpu", seal: Seal | None = None) -> Any:
    """Copies a checkpoint's tree with a `LazyTensor` in place of every `Entry`; equal entries become one object.

    Tensors that only overlap in the file are read each on its own, and so are a parameter and its detached self.

    Args:
        tree: The tree.
        device: Where operations find real tensors.
        seal: Of the checkpoint's files, which others may replace in the meantime.
    """
    made: dict[tuple[Entry, bool, bool], torch.Tensor] = {}

    def make(entry: Entry, _: Any) -> torch.Tensor:
        key = entry, entry.is_parameter, entry.requires_grad
        if key not in made:
            made[key] = as_saved(LazyTensor(entry, device, seal), entry)
        return made[key]

    return map_leaves(tree, Entry, make)


def _memory_of(flat: torch.Tensor) -> memoryview:
    """Gives the memory of a tensor of bytes on the CPU, without the need for NumPy."""
    return memoryview((ctypes.c_char * flat.numel()).from_address(flat.data_ptr())).cast("B")
