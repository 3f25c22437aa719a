"""Traits of operators: what a recorder has to know of each, looked up once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

aten = torch.ops.aten

_EMPTY = {aten.empty.memory_format, aten.empty_strided.default, aten.empty_permuted.default}
_RANDOM_FACTORIES = {aten.randn.default, aten.rand.default, aten.randn.generator, aten.rand.generator}
_FILLS = {aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor}
_FILLS |= {aten.bernoulli_.float, aten.exponential_.default, aten.log_normal_.default, aten.cauchy_.default}
_FILLS |= {aten.random_.default, aten.random_.to, getattr(aten.random_, "from")}
_FILLS |= {aten.geometric_.default, aten.copy_.default}
# Which value, fill or argument ("value") follows the shape that is taken from the first argument.
LIKE: dict[Any, Any] = {
    aten.empty_like.default: None,
    aten.new_empty.default: None,
    aten.new_empty_strided.default: None,
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.full_like.default: "value",
    aten.new_full.default: "value",
    aten.rand_like.default: aten.uniform_.default,
    aten.randn_like.default: aten.normal_.default,
}
_CONSTANTS = {aten.zeros.default, aten.ones.default, aten.full.default, aten.scalar_tensor.default}
_CONSTANTS |= {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.eye.default, aten.eye.m}
_CONSTANTS |= {aten.linspace.default}
_LIFTS = {aten.lift_fresh.default, aten.lift.default}
_SETS = {aten.set_.source_Tensor, aten.set_.source_Storage, aten.set_.source_Storage_storage_offset, aten.set_.default}
_SETS |= {aten.set_.source_Tensor_storage_offset}
_UNDECLARED_WRITES = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}
_UNDECLARED_WRITES |= {aten.batch_norm_update_stats.default, aten.batch_norm_gather_stats_with_counts.default}
_VALUES = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.allclose.default}
_UNLIKE_META = {aten._linalg_svd.default, aten.linalg_eig.default, aten.nonzero_static.default}
_UNLIKE_META |= {aten._fft_c2c.default, aten._fft_c2r.default, aten._fft_r2c.default}
_UNLIKE_META |= {aten.native_batch_norm.default, aten.native_layer_norm.default}
_UNIFORM = {aten.uniform_.default, aten.rand.default, aten.rand.generator}
_NORMAL = {aten.normal_.default, aten.randn.default, aten.randn.generator}
_ELEMENTWISE = {aten.bernoulli_.float, aten.exponential_.default, aten.log_normal_.default}


@dataclass(frozen=True, slots=True)
class Traits:
    """What matters about one operator.

    Attributes:
        func: The operator.
        is_random: It draws from a generator.
        is_uniform: It draws one uniform number for each element.
        is_normal: It draws one normal number for each element.
        is_elementwise: How far it moves a counter-based generator depends on its shape and numbers alone.
        is_fill: It writes its first argument without looking at what is there.
        is_empty: A factory of memory without values.
        is_factory: A factory of memory without, or with random values.
        is_constant: A factory whose values follow from its arguments, which are no tensors.
        is_like: It needs the shape of its first argument only.
        is_lift: It makes a tensor of Python's numbers.
        is_set: It exchanges memory.
        is_pointwise: Each element of its result depends on one of each argument.
        is_unlike_meta: Even of contiguous tensors its kernel may make some of other strides or dtypes than on meta.
        wants_values: It answers with something that is no tensor.
        is_in_place: It returns its first argument, the only one that it writes.
        takes_dtype: It has an argument of this name.
        writes: Position and name of the arguments that it writes.
    """

    func: Any
    is_random: bool
    is_uniform: bool
    is_normal: bool
    is_elementwise: bool
    is_fill: bool
    is_empty: bool
    is_factory: bool
    is_constant: bool
    is_like: bool
    is_lift: bool
    is_set: bool
    is_pointwise: bool
    is_unlike_meta: bool
    wants_values: bool
    is_in_place: bool
    takes_dtype: bool
    writes: tuple[tuple[int, str], ...]


_known: dict[int, Traits] = {}  # by id: an operator's hash is computed in Python, which for each operation is too slow


def traits_of(func: Any) -> Traits:
    """The traits of an ``OpOverload``, or of a Python function that is recorded whole."""
    found = _known.get(id(func))
    if found is None:
        found = _known[id(func)] = _look_at(func)
    return found


def _look_at(func: Any) -> Traits:
    writes = _writes(func)
    return Traits(
        func,
        is_random=torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()),
        is_uniform=func in _UNIFORM,
        is_normal=func in _NORMAL,
        is_elementwise=func in _UNIFORM | _NORMAL | _ELEMENTWISE,
        is_fill=func in _FILLS,
        is_empty=func in _EMPTY,
        is_factory=func in _EMPTY | _RANDOM_FACTORIES,
        is_constant=func in _CONSTANTS,
        is_like=func in LIKE,
        is_lift=func in _LIFTS,
        is_set=func in _SETS,
        is_pointwise=torch.Tag.pointwise in getattr(func, "tags", ()),
        is_unlike_meta=func in _UNLIKE_META,
        wants_values=func in _VALUES,
        is_in_place=_is_in_place(func, writes),
        takes_dtype=_takes_dtype(func),
        writes=writes,
    )


def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    schema = getattr(func, "_schema", None)
    if schema is None:
        return ()
    named = [(i, a.name, a.alias_info) for i, a in enumerate(schema.arguments)]
    if func in _UNDECLARED_WRITES:
        return tuple((i, name) for i, name, _ in named if name in ("running_mean", "running_var"))
    return tuple((i, name) for i, name, alias in named if alias is not None and alias.is_write)


def _takes_dtype(func: Any) -> bool:
    schema = getattr(func, "_schema", None)
    return schema is not None and any(argument.name == "dtype" for argument in schema.arguments)


def _is_in_place(func: Any, writes: tuple[tuple[int, str], ...]) -> bool:
    if [i for i, _ in writes] != [0] or len(func._schema.returns) != 1:
        return False
    return not str(func._schema.arguments[0].type).startswith("List")
