"""Recording construction: parameters become recipes, everything else is real.

How it works
    Two modes are active under `deferred_init`. The dispatch mode (dispatch.py) sees every operation that reaches a
    kernel. What makes memory without values (``torch.empty``) or with random values gives a *deferred* tensor: a meta
    tensor whose storage carries a `Recipe`. Operations on deferred tensors run on meta, for shapes and aliases, and are
    written down in the recipes of the storages that they write. Everything else (``arange``, ``zeros``, ``tensor`` and
    what is computed from them) runs for real at once, so ``.item()``, NumPy and control flow work as ever; it is
    written down too, since a ``Parameter`` may be made of it. ``Parameter(real)`` gives the memory up and keeps the
    recipe.
    When values of a deferred tensor are asked for (a branch on a random number) its recipe is run, then and there,
    on scratch memory, with exactly the numbers that eager construction would have drawn.
    The function mode (answers.py) is for what does not reach a kernel: ``p.device`` and ``p.is_meta`` answer as they
    would in eager construction, ``p.data = x``, ``p.numpy()``, loading of real weights, and `torch.nn.init` functions,
    which it runs itself so that no mode below (Lightning's ``_EmptyInit``) skips them.
    Where a kernel gives its result other strides than on meta (decompositions, convolutions in channels_last), on which
    the last bits of later sums depend, the operation runs on values as well. Up to 16 MiB the kernel is asked.
    Functions that look at what they are given before any operation (`linalg.svdvals` takes another way for what is no
    ordinary tensor, and while a dispatch mode is active) get real values, and are written down whole. What a compiled
    function makes beside its arguments, on the device that they seem to be on, belongs to the one where they will be.
    Parameters, pickling, TorchScript and layers that want addresses are seen by patches (patches.py).
    When the recording ends, deferred tensors that no parameter shares get their memory and values in place.

What it costs, and where exactness ends
    On the CPU the generator's place after ``uniform_`` and ``normal_`` is arithmetic. Other random operations
    (``trunc_normal_`` of torch 2.13 draws until all values fit) have to run on scratch when the recording ends, for
    the generator, and again when the parameter is materialized. On CUDA a few small tensors show whether the arithmetic
    holds, once for each kind of operation.
    `_VF.lstm`, attention, dropout and norms choose kernels by device before any operation: where a deferred tensor is
    not for the CPU they run on its values, and a parameter made of the result is real from the start.
    So is one that was computed from a sparse tensor.
    The garbage collector waits until the recording ends: it took a fifth of the time, and a full pass over all imported
    libraries, a quarter of a second, may fall into any recording. What is deferred has no memory that it could free.
    What was computed from a parameter, and kept, has its value, but no way back to it for gradients. A view has.
    Parameters that no module registers are found in containers and plain objects that modules have as attributes, and
    in modules there (reach.py). What only a closure holds, or an object further away, gets its values when the
    recording ends, unless a module of its own has registered it; what requires gradients there, and is nobody's
    parameter, with the first module of the recording that is materialized.
    Where autocast is on, arithmetic with deferred tensors is refused: it would pass over them.
    A generator's state that is read while recording (``get_rng_state``) names a place in this recording, and means
    nothing outside of it. What another thread makes or writes in the meantime is its own: it is not recorded.
    Memory of others (NumPy arrays, files) has no recipe: a parameter made of it is real, and shares it as in eager
    construction. Where it is going to be sharded, it is deferred when the recording ends, if it has 1 MiB or less.
    Values from there (a checkpoint, a table) in a parameter make it *loaded*: `empty_init` gives it memory and values.
    So do those of tensors that were made before the recording; Python's numbers do not.
    A sharded version of an *empty* parameter takes its recipe along only if a strategy of this package made it. A deep
    copy does; a pickle is refused; what is copied otherwise is found by its canary at first use, and refused.

Decided against
    FakeTensorMode: five times the time per operation, and neither real buffers nor ``.item()``.
    Real tensors whose storage is freed: ``p.device`` is right, but a kernel that reads them crashes the process.
    Recording everything lazily: then every buffer, list and closure that holds a tensor needs an exchange at the end.
    Loading CUDA kernels for buffers ahead, in another thread: they are 0.1 s of a process's first model, but recording
    got slower by as much as was gained (0.16 to 0.27 s in all without, 0.19 to 0.24 s with, on an H200).
    Values of parameters by drawing at once and keeping the generator's state per parameter: construction would cost
    as much as eager construction. Positions in the stream are arithmetic instead (streams.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_efficient_init.deferred import audit, parameter, recurrent
from lightning_efficient_init.deferred.active import current, set_current
from lightning_efficient_init.deferred.answers import Answers
from lightning_efficient_init.deferred.arguments import CONSTANT_BYTES, META, is_strided
from lightning_efficient_init.deferred.dispatch import Dispatch
from lightning_efficient_init.deferred.patches import patched
from lightning_efficient_init.deferred.recipe import Recipe, Ref, attach, living, recipe_of
from lightning_efficient_init.deferred.replay import evaluate
from lightning_efficient_init.deferred.streams import places
from lightning_efficient_init.deferred.tape import Tape
from lightning_efficient_init.garbage import collections_paused


@contextmanager
def deferred_init() -> Iterator[None]:
    """Record the construction of modules instead of running it.

    Parameters made inside are *deferred*: on the meta device, without memory, each with a recipe for its values.
    Buffers and other tensors are real. `materialize` gives parameters the values that eager construction would have
    given them, bit for bit; random numbers included, whatever is drawn in between. When the context ends the
    generators stand where eager construction would have left them.

    Contexts nest (an inner one adds to the outer one's recording), and each thread records for itself.

    Raises:
        UnrecordableError: From the operation that cannot be recorded; build that part under `eager`.

    Example:
        >>> with deferred_init():
        ...     model = torch.nn.Linear(4, 4)
        >>> is_deferred(model)
        True
        >>> materialize(model).weight.shape
        torch.Size([4, 4])
    """
    with recording():
        yield


@contextmanager
def recording() -> Iterator[Recorder]:
    """`deferred_init`, with the recorder."""
    recorder = current()
    if recorder is not None:
        with recorder.pausing(False), Answers(recorder):  # above modes that were entered since, such as `_EmptyInit`
            yield recorder
        return
    recorder = Recorder()
    places.enter()
    try:
        with patched(), recorder.active():
            yield recorder
        recorder.finish()
    except BaseException:
        recorder.abandon()
        raise
    finally:
        places.leave(recorder.tape.generators)


@contextmanager
def empty_init() -> Iterator[None]:
    """`deferred_init`, after which parameters get memory, but no values: for who loads a checkpoint next.

    Their recipes stay at hand: `uninitialized_parameters` finds what nobody has written, `initialize` writes it. An
    exception leaves everything deferred; inside another recording the outer one decides.
    """
    nested = current() is not None
    with collections_paused():  # not to go through what was recorded twice
        with recording() as recorder:
            yield
        if not nested:
            recorder.allocate()


@contextmanager
def postponed_init(*, is_optional: bool) -> Iterator[None]:
    """`deferred_init` for a module that is going to be sharded: it gets memory then, and not before.

    Args:
        is_optional: Whether its initializers are to run only if nothing else provides values.
    """
    nested = current() is not None
    with recording() as recorder:
        recorder.is_postponed |= not nested
        yield
    if not nested:
        recorder.postpone(is_optional=is_optional)


@contextmanager
def layerwise_init() -> Iterator[None]:
    """`deferred_init`, after which parameters get memory and values, each when its turn comes.

    Values are those of eager construction. What differs is memory: a parameter that keeps its values in another form
    (quantized, say) exists as a plain tensor only while it is its turn.
    """
    nested = current() is not None
    with collections_paused():  # not to go through what was recorded twice
        with recording() as recorder:
            yield
        if not nested:
            recorder.materialize()


@contextmanager
def eager() -> Iterator[None]:
    """Run what is inside for real, parameters too, in the midst of `deferred_init`.

    The way out for what cannot be recorded, and for code that reads weights from files. Deferred tensors from outside
    stay deferred: what is done to them is still recorded. Without a recording this does nothing.
    """
    recorder = current()
    if recorder is None:
        yield
        return
    with recorder.pausing(True):
        yield


class Recorder:
    """The recording of one thread: what is recorded, and what becomes of it when the recording ends.

    Attributes:
        paused: New tensors and parameters are real for now.
        autocast: For which kinds of devices autocast was on when the latest function was called.
        call: Arguments of the function that is being run, if one is.
        tape: Writes operations down.
        recurrent: Recurrent layers that wanted their weights in one piece.
        is_postponed: What is recorded is going to be sharded before it gets memory.
        at_end: Called when the recording ends, before anything gets memory, with None; and before a model is loaded
            in its midst, with that model.
    """

    def __init__(self) -> None:
        self.paused = False
        self.autocast: tuple[str, ...] = ()
        self.call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self.is_postponed = False
        self.tape = Tape()
        self.recurrent: list[weakref.ref[torch.nn.RNNBase]] = []
        self.at_end: list[Callable[[torch.nn.Module | None], None]] = []
        self._parameters: dict[int, weakref.ref[torch.Tensor]] = {}
        self._tensors: dict[int, weakref.ref[torch.Tensor]] = {}
        self._sharing: dict[int, dict[int, weakref.ref[torch.Tensor]]] = {}  # by recipe
        self._twinned: list[Recipe] = []
        self._trained: list[weakref.ref[torch.Tensor]] = []  # that require gradients, and are no parameters

    # -- the lifecycle

    @contextmanager
    def active(self) -> Iterator[None]:
        """See all that happens in this thread."""
        set_current(self)
        try:
            with collections_paused(), Dispatch(self), Answers(self):
                yield
        finally:
            set_current(None)

    @contextmanager
    def pausing(self, paused: bool) -> Iterator[None]:
        """Let new tensors and parameters be real, or (in a recording nested in `eager`) deferred again."""
        before, self.paused = self.paused, paused
        try:
            yield
        finally:
            self.paused = before

    @parameter.undisturbed()
    def finish(self) -> None:
        """Make real what has to be, and guard what stays deferred."""
        self.settle()
        self._refresh_twins()
        shared = self._parameter_recipes()
        groups = self._living_by_recipe()
        lone = [r for r, tensors in groups.items() if r not in shared and not any(t.requires_grad for t in tensors)]
        for recipe, storage in evaluate(lone).items():
            parameter.give_memory(groups.pop(recipe), storage)
        companions: list[weakref.ref[torch.Tensor]] = []
        for recipe, tensors in groups.items():
            if recipe not in shared or len(tensors) > 1:
                recipe.aliases = [weakref.ref(t) for t in tensors]
            if recipe not in shared:
                self._trained += recipe.aliases
            if not _may_be_registered(recipe, tensors):
                companions.append(weakref.ref(tensors[0]))
            for tensor in tensors:
                parameter.guard(tensor)
        if companions:
            for recipe in groups:
                recipe.companions = companions
        recurrent.remember(self._scattered_layers())
        self._tensors.clear()
        self._sharing.clear()

    @parameter.undisturbed()
    def abandon(self) -> None:
        """After an exception nothing is run; whoever kept a part of the model finds it deferred."""
        for tensors in self._living_by_recipe().values():
            for tensor in tensors:
                parameter.guard(tensor)
        self._tensors.clear()
        self._sharing.clear()

    @parameter.undisturbed()
    def allocate(self) -> None:
        """Give memory to the parameters that were recorded here, are alive, and are deferred.

        What no module has registered, and no checkpoint can reach by a name, gets its values as well.
        """
        groups = self._waiting()
        with self._flattening():
            audit.allocate(groups, {r for r, tensors in groups.items() if not _may_be_registered(r, tensors)})

    @parameter.undisturbed()
    def materialize(self) -> None:
        """Give those parameters memory and values, each as soon as no other one needs it to stay as it is."""
        groups = self._waiting()
        with self._flattening():
            evaluate(groups, deliver=lambda recipe, storage: parameter.give_memory(groups[recipe], storage))

    def settle(self, model: torch.nn.Module | None = None) -> None:
        """Do to ``model``, or to all, what was to be done before anything gets memory."""
        for call in self.at_end:
            call(model)

    def _waiting(self) -> dict[Recipe, list[torch.Tensor]]:
        """Tensors that share the memory of a living deferred parameter, or of one in all but name, by recipe."""
        groups: dict[Recipe, list[torch.Tensor]] = {}
        for tensor in living((*self._parameters.values(), *self._trained)):
            recipe = recipe_of(tensor) if tensor.is_meta else None
            if recipe is not None:
                groups[recipe] = living(recipe.aliases) or [tensor]
        return groups

    @contextmanager
    def _flattening(self) -> Iterator[None]:
        layers = self._scattered_layers()
        yield
        recurrent.flatten(layers)

    @parameter.undisturbed()
    def postpone(self, *, is_optional: bool) -> None:
        """Let the parameters that were recorded here wait for a strategy to shard them."""
        self._defer_outside()
        for recipe in self._parameter_recipes():
            recipe.is_postponed, recipe.is_optional = True, is_optional

    # -- keeping track

    def track(self, value: Any) -> None:
        """Remember deferred tensors among ``value``, without keeping them alive."""
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                self.remember(value, recipe_of(value))
        elif isinstance(value, tuple | list):
            for item in value:
                self.track(item)

    def remember(self, tensor: torch.Tensor, recipe: Recipe | None) -> None:
        """Remember a tensor on the meta device, whose memory has this recipe, if it is a deferred one."""
        known = self._tensors.get(id(tensor))
        if known is None or known() is not tensor:
            known = self._tensors[id(tensor)] = weakref.ref(tensor)
        if recipe is not None:
            self._sharing.setdefault(id(recipe), {})[id(tensor)] = known

    def adopt(self, param: torch.Tensor) -> None:
        """Remember a parameter."""
        known = self._parameters.get(id(param))
        if known is None or known() is not param:
            self._parameters[id(param)] = weakref.ref(param)
            self.track(param)

    def aliases(self, recipe: Recipe) -> list[torch.Tensor]:
        """Living tensors that share the memory of ``recipe``."""
        candidates = living(self._sharing.get(id(recipe), {}).values())
        return [t for t in candidates if t.is_meta and recipe_of(t) is recipe]

    def bind(self, tensor: torch.Tensor, *, is_overwritten: bool) -> None:
        """Give a deferred tensor, and all that shares its memory, memory now, and values where those are needed."""
        recipe = recipe_of(tensor)
        assert recipe is not None
        parameter.give_memory(self.aliases(recipe), parameter.memory_for(tensor, recipe, is_overwritten=is_overwritten))

    def _scattered_layers(self) -> list[torch.nn.RNNBase]:
        return recurrent.scattered(
            {id(layer): layer for ref in self.recurrent if (layer := ref()) is not None}.values()
        )

    def _living_by_recipe(self) -> dict[Recipe, list[torch.Tensor]]:
        groups: dict[Recipe, list[torch.Tensor]] = {}
        for tensor in living(self._tensors.values()):
            recipe = recipe_of(tensor) if tensor.is_meta else None
            if recipe is not None:
                groups.setdefault(recipe, []).append(tensor)
        return groups

    def _parameter_recipes(self) -> set[Recipe]:
        found = (recipe_of(p) for p in living(self._parameters.values()) if p.is_meta)
        return {recipe for recipe in found if recipe is not None}

    # -- real memory that a parameter was made of

    def defer(self, data: torch.Tensor) -> torch.Tensor:
        """A deferred tensor in the place of the real ``data``, if its values can be had again; else ``data``."""
        with torch._C.DisableTorchFunction():
            recipe = None if data.is_meta else recipe_of(data)
        if recipe is None or recipe.external or not recipe.ops:
            return data
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():  # a tenth of `undisturbed`'s time
            storage = torch.empty(recipe.num_bytes, dtype=torch.uint8, device=META).untyped_storage()
            attach(storage, recipe)
            recipe.real = weakref.ref(data.untyped_storage())
            self._twinned.append(recipe)
            return Ref.to(data, recipe).on(storage)

    def _defer_outside(self) -> None:
        """Defer parameters of outside memory, which by now holds what it will: ranks may have other values."""
        for param in living(self._parameters.values()):
            if type(param) is not torch.nn.Parameter or param.is_meta or not is_strided(param):
                continue
            if param.untyped_storage().nbytes() > CONSTANT_BYTES:
                continue
            if recipe_of(param) is None:
                self.tape.write_outside(param)
            parameter.exchange(param, self.defer(param))
            parameter.guard(param)

    def refresh(self, tensor: torch.Tensor) -> None:
        """Bring real memory up to date with what was written through the parameter made of it."""
        recipe = None if tensor.is_meta else recipe_of(tensor)
        if recipe is not None and recipe.stale:
            _refresh_memory(recipe, tensor.untyped_storage())

    def expose(self, tensor: torch.Tensor) -> None:
        """The memory of a real tensor can now change without an operation (NumPy shares it)."""
        self.refresh(tensor)
        self.tape.make_external(tensor)

    def _refresh_twins(self) -> None:
        for recipe in self._twinned:
            storage = recipe.real() if recipe.real is not None else None
            if storage is not None and recipe.stale:
                storage._fix_weakref()  # type: ignore[attr-defined]  # see `living`
                _refresh_memory(recipe, storage)


def _may_be_registered(recipe: Recipe, tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a module may have one of these tensors, of one recipe, as a parameter."""
    if recipe.label is None and recipe.ops:
        return False
    return any(isinstance(tensor, torch.nn.Parameter) for tensor in tensors)


def _refresh_memory(recipe: Recipe, storage: torch.UntypedStorage) -> None:
    recipe.stale = False
    with parameter.undisturbed():
        storage.copy_(evaluate([recipe])[recipe], False)
