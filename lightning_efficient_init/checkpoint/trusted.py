"""Unpickling with all that a pickle can do, for files whose author is trusted (``weights_only=False``).

The standard unpickler runs what the file says. Tensors are made by torch itself, on the meta device, so that
whatever code the file brings finds tensors where it expects them; which storage of the file each one belongs to is
remembered by the storage's identity. Afterwards the tensors are described as the restricted unpickler describes
them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import IO, Any

import torch

from lightning_efficient_init.checkpoint.tensors import StoredLayout, StoredStorage, StoredTensor
from lightning_efficient_init.checkpoint.tree import Path, map_leaves
from lightning_efficient_init.checkpoint.unpickle import REFUSED, STORAGE_TYPES, stored_storage
from lightning_efficient_init.checkpoint.wording import explain, shorten
from lightning_efficient_init.errors import UnsupportedCheckpointError


def unpickle_trusted(
    data: bytes | IO[bytes], file: str, read_storage: Callable[[Any], StoredStorage] = stored_storage
) -> Any:
    """Unpickles with arbitrary code; tensors come as `StoredTensor`.

    Args:
        data: The pickle, or a stream that is positioned at one.
        file: Path of the file, for errors.
        read_storage: Reads a persistent id.

    Raises:
        UnsupportedCheckpointError: The pickle's own code failed, for instance because a class is not installed.
    """
    unpickler = _TrustingUnpickler(io.BytesIO(data) if isinstance(data, bytes) else data, read_storage)
    try:
        tree = unpickler.load()
    except Exception as error:  # the file's own code may raise anything
        raise UnsupportedCheckpointError(
            explain(
                file,
                expected="a pickle whose code runs here",
                found=f"{type(error).__name__}: {shorten(error)}",
                todo="Install what it was written with, or save a state_dict instead.",
            )
        ) from error
    return map_leaves(tree, (torch.Tensor, torch.storage.TypedStorage, torch.UntypedStorage), unpickler.describe)


class _TrustingUnpickler(pickle.Unpickler):
    """The standard unpickler, with storages on the meta device."""

    def __init__(self, stream: IO[bytes], read_storage: Callable[[Any], StoredStorage]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._read_storage = read_storage
        self._by_key: dict[Any, torch.storage.TypedStorage] = {}
        self._stored: dict[int, StoredStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in REFUSED:
            return REFUSED[name]  # these fail on the meta device, without saying which tensor it was
        return STORAGE_TYPES.get(f"{module}.{name}") or super().find_class(module, name)

    def persistent_load(self, data: Any) -> Any:
        if data[0] == "module":  # legacy files name the source of each module
            return data[1]
        stored = self._read_storage(data)
        key = (stored.key, stored.view_offset, stored.num_bytes, stored.dtype)
        if key not in self._by_key:
            storage = torch.UntypedStorage(stored.num_bytes, device="meta")
            self._by_key[key] = torch.storage.TypedStorage(wrap_storage=storage, dtype=stored.dtype, _internal=True)
            self._stored[storage._cdata] = stored
        return self._by_key[key]

    def describe(self, tensor: Any, _path: Path) -> StoredTensor:
        """Says of a meta tensor what the pickle said of it."""
        if not isinstance(tensor, torch.Tensor):
            return StoredTensor(refusal="a bare storage")
        refusal = _refusal_of(tensor)
        if refusal is not None:
            return StoredTensor(refusal=refusal)
        stored = self._stored.get(tensor.untyped_storage()._cdata)
        if stored is None:
            return StoredTensor(refusal="a tensor that the file's own code has made")
        layout = StoredLayout(tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        return StoredTensor(stored, layout, requires_grad=tensor.requires_grad, is_parameter=is_parameter)


def _refusal_of(tensor: torch.Tensor) -> str | None:
    if tensor.layout is not torch.strided:
        return "a sparse tensor"
    if tensor.is_nested or tensor.is_quantized:
        return "a nested tensor" if tensor.is_nested else "a quantized tensor"
    if tensor.is_conj() or tensor.is_neg():
        return "a lazy conjugate or negative view (call resolve_conj() or resolve_neg())"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a tensor subclass ({type(tensor).__qualname__})"
    return None
